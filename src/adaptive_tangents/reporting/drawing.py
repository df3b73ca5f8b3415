"""What all figures share: the style, the page's width and colors, and rendering to PNG and SVG."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from io import BytesIO, StringIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from adaptive_tangents.runs.results import Arrays, Results
from adaptive_tangents.runtime import notebook_figure

Draw = Callable[[Results, Arrays], Figure]

INK, MUTED, RULE, PAPER = "#1b1f24", "#6a717c", "#d8dbe0", "#ffffff"
STAGES = {"initial": "$K_0$", "average": r"$\bar{K}$", "final": "$K_T$"}
# Okabe-Ito: distinct under every common color-vision deficiency, and in gray.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
DIVERGING = LinearSegmentedColormap.from_list(
    "kernel", ["#08306b", "#2f79b5", "#a9cfe5", "#fbfaf7", "#f6c08f", "#d9691c", "#7a2a04"]
)
DASHES = (0, (4, 2))


@dataclass(frozen=True)
class Drawing:
    """One figure in both formats: PNG bytes and SVG text."""

    png: bytes
    svg: str


def render(draw: Draw, name: str, results: Results, arrays: Arrays) -> Drawing:
    """Draw a figure; `name` makes the SVG's identifiers unique on the page."""
    raster, vector = BytesIO(), StringIO()
    undated = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    style: dict[Any, Any] = {**_style(), "svg.hashsalt": name}
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # a box stands for it
        figure = draw(results, arrays)
        if (engine := figure.get_layout_engine()) is not None:
            figure.dpi = mpl.rcParams["savefig.dpi"]
            engine.execute(figure)
            figure.set_layout_engine(None)  # else each file draws the figure once more, without pixels, for its layout
        figure.savefig(raster, format="png", metadata={"Software": None})
        figure.savefig(vector, format="svg", metadata=undated)
    return Drawing(png=raster.getvalue(), svg=re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", vector.getvalue()))


def styled(draw: Draw, results: Results, arrays: Arrays) -> Figure:
    """A figure in the style of the pages, to show or to save."""
    style: dict[Any, Any] = _style()
    with mpl.rc_context(style):
        return draw(results, arrays)


def grid(
    rows: int, columns: int, height: float, *, sharex: Any = False, sharey: Any = False, **space: float
) -> tuple[Figure, NDArray[Any]]:
    """A figure as wide as the page and its (rows, columns) axes; spacing is manual if heat maps must line up."""
    figure = notebook_figure.Figure(figsize=(10, height), layout=None if space else "constrained")
    if space:
        figure.subplots_adjust(**{"left": 0.07, "right": 0.995, **space})
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)


def legend_above(figure: Figure, axes: Axes, *, columns: int) -> None:
    """One legend above all panels, from the entries of one: inside a panel it would cover curves."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=columns, columnspacing=1.2)


def limit_of(kernel: NDArray[Any]) -> float:
    """The value at which a kernel's colors saturate."""
    # Otherwise the diagonal and a few large pairs would wash out everything else.
    return float(np.nanquantile(np.abs(kernel), 0.99)) or 1.0


def spectrum(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Indices from 1, and values relative to the largest."""
    return np.arange(1, len(values) + 1), values / (values.max() or 1.0)


def logarithmic(axes: Axes, along: str) -> None:
    """Logarithmic scales along "x", "y" or both, each unless nothing drawn is positive there."""
    for axis in along:
        if np.isfinite(getattr(axes.dataLim, f"minpos{axis}")):
            axes.set(**{f"{axis}scale": "log"})


def tint(color: str, amount: float) -> str:
    """A color mixed with white; amount 1 is the color itself."""
    red, green, blue = (1 - amount * (1 - channel) for channel in to_rgb(color))
    return to_hex((red, green, blue))


def shades(items: list[str]) -> NDArray[Any]:
    """Amounts for `tint`, from light to full, one per item."""
    return np.linspace(0.3, 1, len(items))


def real(value: float | None) -> float:
    """The number, or NaN for None."""
    return float("nan") if value is None else float(value)


def fixed(value: float | None, *, none: str = "–") -> str:
    """Two decimals with a true minus sign; ``none`` if there is no number."""
    return none if value is None or not np.isfinite(value) else f"{value:.2f}".replace("-", "−")


def label(text: str) -> str:
    """A key as words: `kernel_samples` -> `kernel samples`."""
    return text.replace("_", " ")


def named(name: str, *, most: int = 48) -> str:
    r"""A user's name as a label that matplotlib draws as it is: of a long one, its end.

    >>> print(named("cost_in_$"))
    cost_in_\$
    """
    plain = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", name)
    shown = plain if len(plain) <= most else "…" + plain[1 - most :]
    # A dollar sign begins a formula, and a legend leaves out names that begin with an underscore.
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")


def short(value: float | None, digits: int = 2) -> str:
    """A number for a label: few digits, a true minus sign, a dash for None."""
    return "–" if value is None or not np.isfinite(value) else f"{value:.{digits}g}".replace("-", "−")


@cache
def _style() -> Any:
    # Helvetica or a font with its metrics if installed; DejaVu Sans comes with matplotlib.
    installed = set(font_manager.get_font_names())
    fonts = [f for f in ("Helvetica Neue", "Helvetica", "Arial", "Liberation Sans") if f in installed][:1]
    return {
        "font.family": [*fonts, "DejaVu Sans"],
        "mathtext.fontset": "stix",
        "font.size": 9,
        "savefig.dpi": 160,
        "figure.facecolor": PAPER,
        "axes.facecolor": "none",
        "axes.edgecolor": MUTED,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.labelcolor": INK,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "axes.unicode_minus": True,
    }
