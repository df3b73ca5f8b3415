"""The figure of a training's records. It draws finished numbers and measures nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from adaptive_tangents.reporting.drawing import COLORS, DASHES, INK, named, real
from adaptive_tangents.runtime import notebook_figure
from adaptive_tangents.tracking.records import Record

# A page shows a figure at 700 pixels: 8 inches at 100 dots keep letters of 8.5 points at 10 pixels.
_WIDTH, _HEAD, _TEXT = 8.0, 9.5, 8.5
_TICKS, _LABELS = 3, 24
_WIDE = 30  # the ratio of traces from which their axis is logarithmic
_ALIGNED = (
    ("alignment_centered", "labels, centered", COLORS[0], "-"),
    ("alignment", "labels", COLORS[0], DASHES),
    ("alignment_change_centered", "change f − f₀, centered", COLORS[1], "-"),
    ("alignment_change", "change f − f₀", COLORS[1], DASHES),
)
_TURNED = (("cka_start", "with the start", INK, "-"), ("cka_last", "with the last record", INK, DASHES))


def draw_history(records: Sequence[Record]) -> Figure:
    """Curves of the whole kernel above, and every group's share, alignment and turn below, by record."""
    kept = [record for record in records if record.whole is not None]
    groups = list(dict.fromkeys(group for record in kept for group in record.groups))
    below = 1.3 + 0.2 * min(len(groups), _LABELS)
    figure = notebook_figure.Figure(figsize=(_WIDTH, 3.6 + below), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[3.6, below])
    upper, lower = parts[0].subplots(1, 3), parts[1].subplots(1, 3, sharey=True)
    _curves(upper[0], kept, _ALIGNED, "Alignment of the kernel")
    _curves(upper[1], kept, _TURNED, "CKA of the kernel")
    _sizes(upper[2], kept)
    shares = np.array([[_share(record, group) for record in kept] for group in groups])
    targets = _numbers(kept, groups, "alignment_centered")
    title = "Centered alignment\nwith the labels"
    if np.isnan(targets).all():
        targets, title = _numbers(kept, groups, "alignment_change_centered"), "Centered alignment\nwith the change"
    shown = (
        (targets, title),
        (_numbers(kept, groups, "cka_start"), "CKA with the start"),
        (shares, "Share of the trace"),
    )
    for axes, (values, told) in zip(lower, shown, strict=True):
        _map(axes, values, groups, [record.step for record in kept], told)
    return figure


def _curves(axes: Axes, records: Sequence[Record], wanted: Sequence[tuple[str, str, str, Any]], title: str) -> None:
    steps = [record.step for record in records]
    lowest = 0.0
    for name, told, color, style in wanted:
        values = [real(getattr(record.whole, name)) for record in records]
        if np.isfinite(values).any():
            axes.plot(steps, values, color=color, ls=style, marker="o", ms=3, lw=1.3, label=told)
            lowest = min(lowest, float(np.nanmin(values)))
    axes.set_ylim(lowest * 1.05, 1.03)
    _headed(axes, title, axes.lines[:])


def _headed(axes: Axes, title: str, entries: Sequence[Any]) -> None:
    """A title and, below the curves, what they are, where the layout makes room for it."""
    _plain(axes, title)
    axes.set_xlabel("step", fontsize=_TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(_TICKS, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    if entries:
        under_label = ScaledTranslation(0, -3.6 * _TEXT / 72, axes.figure.dpi_scale_trans)
        axes.legend(
            entries, [str(line.get_label()) for line in entries], loc="upper left", bbox_to_anchor=(-0.06, 0.0),
            bbox_transform=axes.transAxes + under_label, fontsize=_TEXT, frameon=False, handlelength=2.4, borderaxespad=0,
        )  # fmt: skip


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=_HEAD)
    axes.tick_params(labelsize=_TEXT)


def _sizes(axes: Axes, records: Sequence[Record]) -> None:
    """The trace relative to the first record, and the loss on an axis of its own."""
    steps = [record.step for record in records]
    traces = np.array([real(None if record.whole is None else record.whole.trace) for record in records])
    first = traces[0] if traces[0] > 0 else 1.0
    axes.plot(steps, traces / first, color=COLORS[2], marker="o", ms=3, lw=1.3, label="trace over the first")
    if traces.min() > 0 and traces.max() > _WIDE * traces.min():
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, None)
    entries = axes.lines[:]
    losses = [real(record.loss) for record in records]
    if np.isfinite(losses).any():
        other = axes.twinx()
        other.spines["right"].set_visible(True)
        other.plot(steps, losses, color=COLORS[3], marker="o", ms=3, lw=1.3, label="loss (right)")
        other.set_ylim(0, None)
        other.tick_params(labelsize=_TEXT)
        entries += other.lines[:]
    _headed(axes, "Trace and loss", entries)


def _map(axes: Axes, values: NDArray[Any], groups: Sequence[str], steps: Sequence[int], title: str) -> None:
    top = 1.0 if "Share" not in title else max(1e-12, float(np.nanmax(values, initial=0.0)))
    image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", vmin=0, vmax=top, cmap="viridis")
    ticks = sorted({round(k) for k in np.linspace(0, len(steps) - 1, min(_TICKS, len(steps)))})
    axes.set_xticks(ticks, [f"{steps[k]:,}" for k in ticks])
    rows = range(0, len(groups), max(1, -(-len(groups) // _LABELS)))
    axes.set_yticks(list(rows), [named(groups[k], most=24) for k in rows])
    axes.set_xlabel("step of each record", fontsize=_TEXT)
    _plain(axes, title)
    scale = axes.inset_axes((1.04, 0, 0.06, 1))
    axes.figure.colorbar(image, cax=scale)
    scale.tick_params(labelsize=_TEXT)


def _numbers(records: Sequence[Record], groups: Sequence[str], name: str) -> NDArray[Any]:
    return np.array([[real(getattr(record.groups.get(group), name, None)) for record in records] for group in groups])


def _share(record: Record, group: str) -> float:
    numbers = record.groups.get(group)
    whole = 0.0 if record.whole is None else record.whole.trace
    return float("nan") if numbers is None or whole <= 0 else numbers.trace / whole
