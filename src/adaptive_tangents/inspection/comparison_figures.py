"""The figures of a comparison. They draw finished numbers and measure nothing."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from adaptive_tangents.reporting.drawing import (
    COLORS,
    DIVERGING,
    MUTED,
    RULE,
    STAGES,
    fixed,
    grid,
    limit_of,
    named,
    real,
)
from adaptive_tangents.runs.results import Arrays, Results

SHOWN = 24
_STAGES = {"start": STAGES["initial"], "average": STAGES["average"], "end": STAGES["final"]}
_SIDES = ("a", "b")


def draw_kernels(results: Results, arrays: Arrays) -> Figure:
    """The kernels of both at the start, averaged and at the end, centered, with samples sorted alike."""
    stages = [s for s in _STAGES if all(f"{side}.kernel.{s}" in arrays for side in _SIDES)]
    height = 0.9 + 2 * 8.4 / len(stages)
    figure, rows = grid(
        2, len(stages), height, left=0.13, wspace=0.05, hspace=0.06, top=1 - 0.4 / height, bottom=0.3 / height
    )
    for row, side, name in zip(rows, _SIDES, results["names"], strict=True):
        order = arrays[f"{side}.order"].astype(int)
        for axes, stage in zip(row, stages, strict=True):
            kernel = _centered(arrays[f"{side}.kernel.{stage}"])[np.ix_(order, order)]
            limit = limit_of(kernel)
            axes.imshow(kernel, cmap=DIVERGING, vmin=-limit, vmax=limit, rasterized=True)
            axes.spines[:].set_visible(False)
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(named(name, most=22), rotation=0, ha="right", va="center", labelpad=8)
    for axes, stage in zip(rows[0], stages, strict=True):
        axes.set_title(_STAGES[stage], fontsize=13)
    for axes, stage in zip(rows[1], stages, strict=True):
        if results["kernels"] is not None:
            axes.set_xlabel(f"CKA of the two {fixed(results['kernels'][stage]['cka'])}", labelpad=4)
    return figure


def draw_layers(results: Results, arrays: Arrays) -> Figure:
    """The part of K_T − K₀ by layer, of both."""
    rows = [row for row in results["layers"] if row["change_share_a"] is not None or row["change_share_b"] is not None]
    heavy = sorted(rows, key=lambda row: -max(abs(row[f"change_share_{side}"] or 0.0) for side in _SIDES))[:SHOWN]
    rows = [row for row in rows if row in heavy]
    figure, ((axes,),) = grid(1, 1, 1.0 + 0.34 * len(rows))
    places = np.arange(len(rows))
    for side, name, color, shift in zip(_SIDES, results["names"], COLORS, (-0.19, 0.19), strict=False):
        values = [100 * real(row[f"change_share_{side}"]) for row in rows]
        axes.barh(places + shift, values, height=0.36, color=color, label=named(name))
    _names(axes, [row["layer"] for row in rows])
    axes.axvline(0, color=MUTED, lw=0.8)
    axes.set_xlabel("part of $K_T - K_0$, %")
    axes.legend(loc="best")
    return figure


def draw_blocks(results: Results, arrays: Arrays) -> Figure:
    """Block by block, one network against the other: parts of the change, and the alignment at the end."""
    panels = [
        ("change_share", "Part of $K_T - K_0$, %", 100.0),
        ("alignment", "Sim with the network’s change, at the end", 1.0),
    ]
    panels = [panel for panel in panels if len(_both(results, panel[0])) > 1]
    figure, (row,) = grid(1, max(2, len(panels)), 4.2)
    for axes in row[len(panels) :]:
        axes.set_axis_off()
    for axes, (key, title, scale) in zip(row, panels, strict=False):
        found = _both(results, key)
        points = scale * np.array([pair for _, pair in found], float)
        low, high = min(0.0, float(points.min())), float(points.max())
        axes.plot([low, high], [low, high], color=RULE, lw=1, zorder=1)
        axes.scatter(*points.T, s=30, color=COLORS[0], lw=0, zorder=3, alpha=0.8)
        apart = np.argsort(-points.max(1))[:5]
        for k in apart:
            right = points[k, 0] > (low + high) / 2
            axes.annotate(
                named(found[k][0], most=26), points[k], (-6 if right else 6, 4), textcoords="offset points", fontsize=7,
                color=MUTED, ha="right" if right else "left",
            )  # fmt: skip
        axes.set_title(title, loc="left")
        axes.set(xlabel=named(results["names"][0]), ylabel=named(results["names"][1]))
    return figure


def draw_functions(results: Results, arrays: Arrays) -> Figure:
    """The change f_T − f_0 of every sample and output, one network against the other."""
    a, b = (arrays[f"{side}.gained"] for side in _SIDES)
    figure, (row,) = grid(1, 2, 4.2)
    axes = row[0]
    row[1].set_axis_off()
    low, high = float(min(a.min(), b.min())), float(max(a.max(), b.max()))
    axes.plot([low, high], [low, high], color=RULE, lw=1, zorder=1)
    for k in range(a.shape[1]):
        color = COLORS[k % len(COLORS)] if 1 < a.shape[1] <= len(COLORS) else COLORS[0]
        label = f"output {k}" if 1 < a.shape[1] <= len(COLORS) else None
        axes.scatter(a[:, k], b[:, k], s=12, lw=0, alpha=0.6, color=color, label=label, zorder=3)
    if 1 < a.shape[1] <= len(COLORS):
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1))
    axes.set(xlabel=f"$f_T - f_0$, {named(results['names'][0])}", ylabel=f"$f_T - f_0$, {named(results['names'][1])}")
    return figure


def applies(results: Results, name: str) -> bool:
    """Whether a comparison has what the figure shows."""
    if name == "layers":
        return any(row["change_share_a"] is not None or row["change_share_b"] is not None for row in results["layers"])
    if name == "blocks":
        return any(len(_both(results, key)) > 1 for key in ("change_share", "alignment"))
    return results["functions"] is not None if name == "functions" else True


def _both(results: Results, key: str) -> list[tuple[str, tuple[float, float]]]:
    """The places at which both have a number."""
    pairs = [(row["place"], (row[f"{key}_a"], row[f"{key}_b"])) for row in results["places"]]
    return [(place, pair) for place, pair in pairs if None not in pair]


def _names(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [named(name) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _centered(kernel: NDArray[Any]) -> NDArray[Any]:
    rows: NDArray[Any] = kernel - kernel.mean(0)
    centered: NDArray[Any] = rows - rows.mean(1, keepdims=True)
    return centered
