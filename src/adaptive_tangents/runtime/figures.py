"""Small figures of results in memory. Matplotlib is imported when one is drawn, and its settings stay as they are."""

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from adaptive_tangents.errors import TangentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _MUTED = "#1b1f24", "#6a717c"
# Okabe-Ito: distinct under every common color-vision deficiency, and in gray.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#1b1f24", "#6a717c")
MOST_LINES, MOST_BARS = len(_COLORS), 16


def panels(call: str, count: int, bars: int = 0) -> "tuple[Figure, list[Axes]]":
    """A figure of panels side by side, high enough for so many bars; raises TangentError where matplotlib is absent."""
    try:
        import_module("matplotlib.figure")
    except ImportError as error:
        raise TangentError(
            f"{call}: matplotlib is not installed; pip install 'adaptive-tangents[report]' installs it"
        ) from error
    from adaptive_tangents.runtime import notebook_figure

    figure = notebook_figure.Figure(
        figsize=(1.0 + 3.4 * count, 1.4 + max(1.8, 0.2 * min(bars, MOST_BARS))), layout="constrained"
    )
    axes = [figure.add_subplot(1, count, k + 1) for k in range(count)]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=8)
    return figure, axes


def bars(
    axes: "Axes", values: Mapping[str, float], title: str, label: str, notes: Mapping[str, str] | None = None
) -> None:
    """A bar for each of the first names, with a note behind it."""
    names = list(values)[:MOST_BARS]
    places = range(len(names))
    axes.barh(places, [values[name] for name in names], color=_COLORS[0], height=0.6)
    axes.set_yticks(places, [plain(name) for name in names])
    axes.invert_yaxis()
    for place, name in zip(places, names, strict=True):
        if notes and name in notes:
            axes.annotate(
                notes[name], (max(0.0, values[name]), place), (3, 0), textcoords="offset points", va="center",
                color=_MUTED, fontsize=7.5,
            )  # fmt: skip
    axes.margins(x=0.2)
    _named(axes, title, label, "")


def lines(
    axes: "Axes", curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, labels: tuple[str, str],
    *, log: str = "", ticks: Sequence[int] = (),
) -> None:  # fmt: skip
    """A line for each of the first curves; ``log`` names the axes with a logarithmic scale, ``ticks`` those of x.

    Where nothing is positive, the scale is linear.
    """
    for (name, (x, y)), color in zip(curves.items(), _COLORS, strict=False):
        axes.plot(x, y, "o-", ms=2.5, lw=1, color=color, label=plain(name))
    positive = {axis: math.isfinite(getattr(axes.dataLim, f"minpos{axis}")) for axis in log}
    options: dict[str, Any] = {f"{axis}scale": "log" for axis in log if positive[axis]}
    axes.set(**options)
    if ticks:
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
    elif "x" not in log:
        _whole(axes.xaxis)
    if len(curves) > 1:
        axes.legend(fontsize=7.5, frameon=False)
    _named(axes, title, *labels)


def heat(axes: "Axes", matrix: Any, title: str, label: str) -> None:
    """A square matrix as a picture, its colors symmetric around zero."""
    largest = float(abs(matrix).max()) or 1.0
    axes.imshow(matrix, cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
    _whole(axes.xaxis)
    _whole(axes.yaxis)
    _named(axes, title, label, label)


def _whole(axis: Any) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def plain(name: str) -> str:
    """A name as a label: no formula, and not too long."""
    name = name if len(name) <= 32 else f"{name[:15]}…{name[-16:]}"
    return name.replace("$", r"\$")


def _named(axes: "Axes", title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    axes.set_xlabel(x, fontsize=8.5)
    axes.set_ylabel(y, fontsize=8.5)
