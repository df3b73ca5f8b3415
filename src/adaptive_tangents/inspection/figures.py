"""The figures of an inspection. They draw finished numbers and measure nothing."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from adaptive_tangents.inspection.names import told_apart
from adaptive_tangents.inspection.starts import grew
from adaptive_tangents.reporting.drawing import (
    COLORS,
    DASHES,
    DIVERGING,
    INK,
    MUTED,
    PAPER,
    RULE,
    STAGES,
    fixed,
    grid,
    limit_of,
    logarithmic,
    named,
    real,
    short,
    spectrum,
    tint,
)
from adaptive_tangents.runs.results import Arrays, Results

SHOWN_BLOCKS = 24
RANKS = {"change": "weight change Δθ", "fixed": "kernel regression on $K_0$", "two_sided": "exact model, TwoSided"}
STRUCTURES = {"layer_scale": "LayerScale", "left": "Left", "right": "Right", "two_sided": "TwoSided"}
_FLOOR = -0.25
_WORDS = {"initial": "start", "average": "average over the path", "final": "end"}


def draw_kernels(results: Results, arrays: Arrays) -> Figure:
    """Heat maps of K₀, K̄, K_T and of the kernels of the change and the labels: centered, with samples sorted."""
    order, ticks = sorting(results, arrays)
    panels = [(STAGES[stage], _WORDS[stage], arrays[f"kernel.{stage}"], stage) for stage in held(arrays)]
    panels.append((r"$K_y = \hat{y}\,\hat{y}^{\top}$", "the network’s change", _outer(arrays["change"]), ""))
    if "target" in arrays:
        panels.append((r"$K_{\mathrm{label}}$", "the labels", _outer(arrays["target"]), ""))
    figure, (row,) = grid(1, len(panels), 2.05 + 3.1 / len(panels), left=0.09, wspace=0.08, top=0.82, bottom=0.14)
    for axes, (title, words, kernel, stage) in zip(row, panels, strict=True):
        ordered = centered(kernel)[np.ix_(order, order)]
        limit = limit_of(ordered)
        axes.imshow(ordered, cmap=DIVERGING, vmin=-limit, vmax=limit, rasterized=True)
        axes.set_title(title, fontsize=13, pad=17)
        axes.text(0.5, 1.03, words, transform=axes.transAxes, ha="center", va="bottom", color=MUTED)
        axes.spines[:].set_visible(False)
        axes.set(xticks=[], yticks=[])
        if stage:
            axes.set_xlabel(f"centered sim {fixed(results['alignment_centered']['change'][stage])}", labelpad=3)
    row[0].set_yticks([place for place, _ in ticks], [word for _, word in ticks], fontsize=7.5)
    row[0].tick_params(length=0)
    return figure


def sorting(results: Results, arrays: Arrays) -> tuple[NDArray[Any], list[tuple[float, str]]]:
    """The samples' order and tick labels: by class, then by the change of the first output."""
    change = arrays["change"][:, 0]
    if results["data"]["labels"] != "classes":
        return np.argsort(change), [(0, short(float(change.min()))), (len(change) - 1, short(float(change.max())))]
    y = arrays["y"]
    means = {int(k): float(change[y == k].mean()) for k in np.unique(y)}
    order = np.lexsort((change, np.array([means[int(k)] for k in y])))
    sorted_y, ticks = y[order], []
    for kind in sorted(means, key=means.__getitem__):
        ticks.append((float(np.flatnonzero(sorted_y == kind).mean()), class_name(results, kind)))
    return order, ticks if len(ticks) <= 20 else []


def class_name(results: Results, kind: int) -> str:
    """The class's name if known, else its number."""
    names = results["data"]["classes"]
    return named(told_apart(names)[kind], most=24) if names is not None and 0 <= kind < len(names) else str(kind)


def draw_blocks(results: Results, arrays: Arrays) -> Figure:
    """Every block's share of the trace, growth, alignment and CKA, in the order of the network."""
    names = shown_blocks(results)
    blocks = results["blocks"]
    titles = ("share of the trace", "growth of the trace", "sim with the change", "CKA of start and end")
    figure, (row,) = grid(1, 4, 1.0 + 0.21 * len(names), sharey=True)
    places = np.arange(len(names))
    looks = {"initial": (tint(INK, 0.3), "o"), "average": (tint(COLORS[0], 0.6), "D"), "final": (COLORS[1], "o")}
    for axes, key in zip((row[0], row[2]), ("trace_share", "alignment"), strict=True):
        values = {s: np.array([real(blocks[name][key][s]) for name in names]) for s in STAGES}
        axes.hlines(places, values["initial"], values["final"], color=RULE, lw=2.5, zorder=1)
        for stage, (color, marker) in looks.items():
            size = 16 if marker == "D" else 26
            axes.scatter(values[stage], places, s=size, color=color, marker=marker, label=STAGES[stage], zorder=3, lw=0)
    growth = np.array([real(grew(blocks[name], len(blocks))) for name in names])
    row[1].hlines(places, 1, growth, color=tint(COLORS[1], 0.5), lw=2.5)
    row[1].scatter(growth, places, s=26, color=COLORS[1], lw=0, zorder=3)
    row[1].axvline(1, color=MUTED, lw=0.8)
    if np.any(growth > 0):
        row[1].set_xscale("log")
    cka = np.array([real(blocks[name]["cka"]) for name in names])
    row[3].hlines(places, cka, 1, color=tint(COLORS[2], 0.4), lw=2.5)
    row[3].scatter(cka, places, s=26, color=COLORS[2], lw=0, zorder=3)
    for axes, title in zip(row, titles, strict=True):
        _rows(axes, names)
        axes.set_title(title, loc="left", fontsize=9)
    row[3].set_xlim(min(0.0, float(np.nanmin(cka, initial=0.0))), 1.02)
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, handletextpad=0.1)
    return figure


def draw_trajectory(results: Results, arrays: Arrays) -> Figure:
    """Alignment, CKA and growth of the kernel at every checkpoint."""
    points = results["trajectory"]
    x = np.arange(len(points))
    figure, (row,) = grid(1, 3, 3.0)
    key = alignment_key(results)
    _line(row[0], x, [p[key] for p in points], COLORS[0], "with the change, $K_y$")
    labels = "alignment_labels" if key == "alignment" else "alignment_labels_centered"
    if any(p[labels] is not None for p in points):
        _line(row[0], x, [p[labels] for p in points], COLORS[1], "with the labels")
    if (shown := performance_key(results)) is not None:
        _line(row[1], x, [p["performance"][shown] for p in points], MUTED, shown, ls=DASHES)
    _line(row[1], x, [p["cka_start"] for p in points], COLORS[2], "CKA with $K_0$")
    _line(row[1], x, [p["cka_end"] for p in points], COLORS[3], "CKA with $K_T$")
    _line(row[2], x, [p["growth"] for p in points], COLORS[1], None)
    logarithmic(row[2], "y")
    alignment = "Alignment of $K_t$" if key == "alignment" else "Centered alignment of $K_t$"
    for axes, title in zip(row, (alignment, "Likeness", "Growth of the trace, $K_t$ over $K_0$"), strict=True):
        axes.set_title(title, loc="left")
        step = max(1, len(points) // 6)
        axes.set_xticks(x[::step], [short_name(points[k]["name"]) for k in x[::step]], rotation=30, ha="right")
        axes.grid(axis="y", color=RULE, lw=0.6)
    row[0].set_ylim(bottom=min(0.0, row[0].get_ylim()[0]))
    for axes in row[:2]:
        axes.legend(loc="best")
    return figure


def alignment_key(results: Results) -> str:
    """The name of the alignment that tells of every checkpoint: centered, unless it is not defined."""
    points = results["trajectory"]
    centered = all(p.get("alignment_centered") is not None for p in points)
    return "alignment_centered" if centered else "alignment"


def held(arrays: Arrays) -> list[str]:
    """The stages whose kernels there are; an interrupted run may lack the average."""
    return [stage for stage in STAGES if f"kernel.{stage}" in arrays]


def performance_key(results: Results) -> str | None:
    """The name of the performance number, "accuracy" or "mse", or None if unknown."""
    first = results["trajectory"][0]["performance"]
    return None if first is None else next(iter(first))


def short_name(name: str) -> str:
    """A checkpoint's name; of a long one, its end."""
    return named(name, most=12)


def draw_spectra(results: Results, arrays: Arrays) -> Figure:
    """Eigenvalues of the three kernels, and of the weight change in the blocks that carry most of the kernel."""
    figure, ((left, right),) = grid(1, 2, 3.3)
    for stage, color in zip(STAGES, (MUTED, COLORS[0], COLORS[1]), strict=True):
        if stage not in held(arrays):
            continue
        left.plot(*spectrum(arrays[f"spectrum.{stage}"]), color=color, lw=2, label=f"{STAGES[stage]}, {_WORDS[stage]}")
    logarithmic(left, "xy")
    left.set(ylim=(1e-6, 1.6), xlabel="index", ylabel="eigenvalue over the largest")
    left.set_title("Spectra of the kernels", loc="left")
    left.legend(loc="lower left")
    blocks = results["blocks"]
    moved = [name for name in matrices(results) if blocks[name]["change_norm"] > 0]
    heavy = sorted(moved, key=lambda name: -real(blocks[name]["trace_share"]["final"]))[:6]
    for k, name in enumerate(heavy):
        values = arrays[f"singular_values.change.{name}"]
        look = {"color": tint(COLORS[k % 3], 1 - 0.45 * (k // 3)), "ls": DASHES if k >= 3 else "-"}
        right.plot(*spectrum(values), lw=1.8, label=named(name), **look)
    logarithmic(right, "xy")
    right.set(ylim=(1e-4, 1.6), xlabel="index", ylabel=r"$\sigma_j / \sigma_1$")
    right.set_title("Singular values of the weight change Δθ", loc="left")
    if heavy:
        right.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def draw_ranks(results: Results, arrays: Arrays) -> Figure:
    """Effective rank of each block's weight change and of the models' coefficients, beside the full rank."""
    names = [name for name in shown_blocks(results) if name in matrices(results)]
    figure, ((axes,),) = grid(1, 1, 1.0 + 0.21 * len(names))
    places = np.arange(len(names))
    blocks = results["blocks"]
    full = np.array([min(blocks[name]["shape"]) for name in names])
    axes.scatter(full, places, marker="|", s=70, color=MUTED, label="full rank", zorder=2)
    ranks = {"change": [blocks[name]["effective_rank"]["participation"] for name in names]}
    for key in results["models"]:
        ranks[key] = [blocks[name]["model_rank"][key]["participation"] for name in names]
    marks = {"change": ("o", COLORS[1]), "fixed": ("D", tint(INK, 0.4)), "two_sided": ("s", COLORS[0])}
    for key, values in ranks.items():
        marker, color = marks[key]
        places_of = np.array([real(v) for v in values])
        axes.scatter(places_of, places, s=30, marker=marker, color=color, label=RANKS[key], zorder=3, lw=0)
    logarithmic(axes, "x")
    axes.set_xlabel("effective rank, $(\\Sigma\\sigma^2)^2 / \\Sigma\\sigma^4$")
    _rows(axes, names)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def draw_explain(results: Results, arrays: Arrays) -> Figure:
    """Held-out R² of each structured transform of the initial features, per block."""
    blocks = results["blocks"]
    names = [name for name in shown_blocks(results) if any(v is not None for v in blocks[name]["explain"].values())]
    figure, ((axes,),) = grid(1, 1, 1.0 + 0.21 * max(1, len(names)))
    places = np.arange(len(names))
    marks = {"layer_scale": ("|", MUTED, 60), "left": ("<", COLORS[2], 26), "right": (">", COLORS[0], 26)}
    marks["two_sided"] = ("o", COLORS[1], 34)
    for key, (marker, color, size) in marks.items():
        values = np.array([real(blocks[name]["explain"].get(key)) for name in names])
        axes.scatter(
            np.maximum(values, _FLOOR), places, marker=marker, color=color, s=size, label=STRUCTURES[key], zorder=3
        )
    axes.axvline(0, color=MUTED, lw=0.8)
    axes.set(xlim=(_FLOOR - 0.03, 1.03), xlabel="held-out $R^2$ of the feature change")
    _rows(axes, names)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def draw_growth(results: Results, arrays: Arrays) -> Figure:
    """Growth of K(x, x) sample by sample, against how far the network's output moved."""
    figure, ((left, right),) = grid(1, 2, 3.2)
    growth = sample_growth(arrays)
    change = arrays["change"]
    moved = change[:, 0] if change.shape[1] == 1 else np.linalg.norm(change, axis=1)
    wrong = arrays["predicted"] != arrays["y"] if "predicted" in arrays else np.zeros(len(growth), bool)
    for mask, color, word in ((~wrong, COLORS[0], "right at the end"), (wrong, COLORS[1], "wrong at the end")):
        if mask.any():
            named = word if "predicted" in arrays else None
            left.scatter(moved[mask], growth[mask], s=13, color=color, alpha=0.65, lw=0, label=named)
    left.set_xlabel("change of the output" if change.shape[1] == 1 else "size of the change of the outputs")
    grown = STAGES[held(arrays)[1]].strip("$")
    logarithmic(left, "y")
    left.set(ylabel=f"${grown}(x,x) / K_0(x,x)$")
    left.set_title("Sample by sample", loc="left")
    if "predicted" in arrays:
        left.legend()
    kinds = _kinds(results, arrays)
    groups = sorted(((np.median(growth[mask]), word, growth[mask]) for word, mask in kinds), key=lambda g: g[0])
    for place, (_, _word, values) in enumerate(groups):
        right.scatter(values, np.full(len(values), place), s=8, color=tint(COLORS[0], 0.45), lw=0)
        right.scatter(np.median(values), place, s=120, marker="|", color=INK, lw=2)
    right.set_yticks(range(len(groups)), [word for _, word, _ in groups])
    logarithmic(right, "x")
    right.set(xlabel=f"${grown}(x,x) / K_0(x,x)$")
    right.set_title("By class" if results["data"]["labels"] == "classes" else "By size of the change", loc="left")
    return figure


def _kinds(results: Results, arrays: Arrays) -> list[tuple[str, NDArray[Any]]]:
    """Samples by class, or by quarter of the size of their change."""
    if results["data"]["labels"] == "classes" and len(np.unique(arrays["y"])) <= 20:
        return [(class_name(results, int(k)), arrays["y"] == k) for k in np.unique(arrays["y"])]
    size = np.linalg.norm(arrays["change"], axis=1)
    quarters = np.minimum(3, np.argsort(np.argsort(size)) * 4 // max(1, len(size)))
    words = ("smallest quarter", "second", "third", "largest quarter")
    return [(word, quarters == k) for k, word in enumerate(words) if (quarters == k).any()]


def draw_images(results: Results, arrays: Arrays) -> Figure:
    """The images on which the kernel grew most and least, with label and prediction."""
    growth, index = sample_growth(arrays), arrays["images.index"]
    order = index[np.argsort(-growth[index], kind="stable")]
    count = max(1, min(10, len(order) // 2))
    figure, rows = grid(2, count, 3.1, left=0.075, wspace=0.12, hspace=0.5, top=0.99, bottom=0.15)
    places = {int(sample): k for k, sample in enumerate(index)}
    for row, word, chosen in zip(rows, ("most", "least"), (order[:count], order[::-1][:count]), strict=True):
        for axes, sample in zip(row, chosen, strict=False):
            picture = arrays["images"][places[int(sample)]]
            gray = picture.shape[-1] == 1
            axes.imshow(picture[..., 0] if gray else picture, cmap="gray" if gray else None, interpolation="none")
            axes.set_xlabel("\n".join([f"× {short(float(growth[sample]), 3)}", *_caption(results, arrays, int(sample))]),
                            labelpad=2, fontsize=7)  # fmt: skip
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        row[0].set_ylabel(f"grew\n{word}", rotation=0, ha="right", va="center")
    return figure


def _caption(results: Results, arrays: Arrays, sample: int) -> list[str]:
    if results["data"]["labels"] != "classes":
        return (
            [f"$y$ = {short(float(arrays['y'].reshape(len(arrays['y']), -1)[sample, 0]), 3)}"] if "y" in arrays else []
        )
    words = [class_name(results, int(arrays["y"][sample]))]
    if "predicted" in arrays:
        guess = int(arrays["predicted"][sample])
        words.append("✓" if guess == int(arrays["y"][sample]) else f"→ {class_name(results, guess)}")
    return words


def sample_growth(arrays: Arrays) -> NDArray[Any]:
    """K̄(x, x)/K₀(x, x) of every sample, or that of K_T if there is no average."""
    start = np.maximum(arrays["kernel.initial"].diagonal(), 1e-300)
    growth: NDArray[Any] = arrays[f"kernel.{held(arrays)[1]}"].diagonal() / start
    return growth


def matrices(results: Results) -> list[str]:
    """Blocks that are matrices; all blocks if none is."""
    blocks: Mapping[str, Any] = results["blocks"]
    return [name for name, numbers in blocks.items() if min(numbers["shape"]) > 1] or list(blocks)


def shown_blocks(results: Results) -> list[str]:
    """The matrices in the network's order; if there are too many, those with the largest share of K_T."""
    names, blocks = matrices(results), results["blocks"]
    heavy = sorted(names, key=lambda name: -real(blocks[name]["trace_share"]["final"]))[:SHOWN_BLOCKS]
    return [name for name in names if name in heavy]


def centered(kernel: NDArray[Any]) -> NDArray[Any]:
    """The kernel of centered features, HKH."""
    rows: NDArray[Any] = kernel - kernel.mean(0)
    centered: NDArray[Any] = rows - rows.mean(1, keepdims=True)
    return centered


def _outer(y: NDArray[Any]) -> NDArray[Any]:
    product: NDArray[Any] = y @ y.T
    return product


def _rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [named(name) for name in names], fontsize=7.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=RULE, lw=0.4)


def _line(
    axes: Axes, x: NDArray[Any], values: list[float | None], color: str, label: str | None, ls: Any = "-"
) -> None:
    heights = [real(value) for value in values]
    axes.plot(x, heights, color=color, lw=2, ls=ls, marker="o", ms=4.5, mec=PAPER, label=label)
