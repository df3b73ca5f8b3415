"""The figures of kernel-alignment. They draw finished numbers and measure nothing."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from adaptive_tangents.reporting.drawing import COLORS as _COLORS
from adaptive_tangents.reporting.drawing import DASHES as _DASHES
from adaptive_tangents.reporting.drawing import DIVERGING as _DIVERGING
from adaptive_tangents.reporting.drawing import INK, MUTED, PAPER, RULE, STAGES, label, short
from adaptive_tangents.reporting.drawing import fixed as _fixed
from adaptive_tangents.reporting.drawing import grid as _grid
from adaptive_tangents.reporting.drawing import limit_of as _limit
from adaptive_tangents.reporting.drawing import real as _real
from adaptive_tangents.reporting.drawing import shades as _shades
from adaptive_tangents.reporting.drawing import spectrum as _spectrum
from adaptive_tangents.reporting.drawing import tint as _tint
from adaptive_tangents.runs.results import Arrays, Results

STRUCTURES = {"layer_scale": "LayerScale", "left": "Left", "right": "Right", "two_sided": "TwoSided", "full": "Full"}
R2_FLOOR = -0.25


def draw_kernels(results: Results, arrays: Arrays) -> Figure:
    """Heat maps of the kernels, one row per target, samples sorted by the teacher's output."""
    columns = {
        "initial": ("$K_0$", "initial"),
        "average": (r"$\bar{K}$", "average over the path"),
        "final": ("$K_T$", "final"),
        "target": (r"$K_y = \hat{y}\,\hat{y}^{\top}$", "task"),
        "adapted": ("$K_M$", "exact model"),
    }
    targets = results["targets"]
    figure, grid = _grid(
        len(targets), len(columns), 2.08 * len(targets) + 0.6, wspace=0.07, hspace=0.16, top=0.9, bottom=0.06
    )
    for axes, (title, word) in zip(grid[0], columns.values(), strict=True):
        axes.set_title(title, fontsize=13, pad=17)
        axes.text(0.5, 1.03, word, transform=axes.transAxes, ha="center", va="bottom", color=MUTED)
    for row, (target, numbers) in zip(grid, targets.items(), strict=True):
        change = arrays[f"{target}.change"]
        similarity = {**numbers["alignment"], "adapted": numbers["model"][numbers["adapted_key"]]["alignment"]}
        for axes, stage in zip(row, columns, strict=True):
            kernel = np.outer(change, change) if stage == "target" else arrays[f"{target}.kernel.{stage}"]
            draw_heat(axes, kernel, arrays[f"{target}.teacher"], values=stage == "initial")
            if stage in similarity:
                axes.set_xlabel(f"sim {_fixed(similarity[stage])}", labelpad=2)
        row[0].set_ylabel(f"{label(target)} target\nteacher’s output $y$", color=_color(results, target))
    return figure


def draw_diagonal(results: Results, arrays: Arrays) -> Figure:
    """The average kernel's diagonal against the teacher's output, with a running median."""
    figure, (row,) = _grid(1, len(results["targets"]), 3.5, sharey=True)
    for axes, target in zip(row, results["targets"], strict=True):
        y, color = arrays[f"{target}.teacher"], _color(results, target)
        start, average = (arrays[f"{target}.kernel.{stage}"].diagonal() for stage in ("initial", "average"))
        _near(axes, results)
        axes.scatter(y, average, s=9, color=color, alpha=0.35, lw=0)
        axes.plot(*_running_median(y, start), color=MUTED, lw=1.4, ls=_DASHES, label="$K_0$, running median")
        axes.plot(*_running_median(y, average), color=PAPER, lw=4.5)
        axes.plot(*_running_median(y, average), color=color, lw=2.2, label=r"$\bar{K}$, running median")
        axes.set_title(f"{label(target)} target", color=color, loc="left")
        axes.set_xlabel("teacher’s output $y$")
        axes.legend(loc="upper right")
    row[0].set_ylim(bottom=0)
    row[0].set_ylabel(r"$\bar{K}(x, x)$")
    return figure


def draw_digits(results: Results, arrays: Arrays) -> Figure:
    """The digits at which the kernel's diagonal grew most and least."""
    count, targets = 12, list(results["targets"])
    space = {"left": 0.11, "wspace": 0.12, "hspace": 0.5, "top": 1 - 0.02 / len(targets), "bottom": 0.17 / len(targets)}
    figure, grid = _grid(2 * len(targets), count, 2.1 * len(targets), **space)
    for k, (target, word) in enumerate((target, word) for target in targets for word in ("most", "least")):
        start, average = (arrays[f"{target}.kernel.{stage}"].diagonal() for stage in ("initial", "average"))
        growth = average / start
        order = np.argsort(-growth if word == "most" else growth, kind="stable")
        for axes, sample in zip(grid[k], order, strict=False):
            axes.imshow(arrays[f"{target}.images"][sample], cmap="gray_r", interpolation="none")
            y = _fixed(arrays[f"{target}.teacher"][sample])
            axes.set_xlabel(f"$y$ = {y}\n× {growth[sample]:.1f}", labelpad=2, fontsize=7.5)
        for axes in grid[k]:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        style = {"rotation": 0, "ha": "right", "va": "center", "color": _color(results, target)}
        grid[k, 0].set_ylabel(f"{label(target)},\ngrew {word}", **style)
    return figure


def draw_layers(results: Results, arrays: Arrays) -> Figure:
    """Alignment of each layer's part of the kernel, and its share of the trace."""
    targets, blocks = results["targets"], list(results["blocks"])
    figure, grid = _grid(2, len(targets), 4.6, sharey="row")
    for column, (target, numbers) in zip(grid.T, targets.items(), strict=True):
        color = _color(results, target)
        for axes, kind in zip(column, ("alignment", "trace_share"), strict=True):
            for k, stage in enumerate(STAGES):
                heights = [_real(numbers["block"][block][kind][stage]) for block in blocks]
                places, tint = np.arange(len(blocks)) + 0.27 * (k - 1), _tint(color, (0.3, 0.62, 1)[k])
                bars = axes.bar(places, heights, 0.25, color=tint, label=STAGES[stage])
                axes.bar_label(bars, [_fixed(height) for height in heights], fontsize=7.5, padding=2, color=MUTED)
            axes.set_xticks(range(len(blocks)), [label(block) for block in blocks])
            axes.tick_params(axis="x", length=0)
            axes.margins(y=0.15)
        column[0].set_title(f"{label(target)} target", color=color, loc="left")
        column[0].legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=3)
    grid[0, 0].set_ylabel("sim with $K_y$")
    grid[1, 0].set_ylabel("share of the trace")
    return figure


def draw_decomposition(results: Results, arrays: Arrays) -> Figure:
    """The average kernel as a weighted sum of the initial and the target kernel, and the residual."""
    targets = results["targets"]
    figure, grid = _grid(len(targets), 5, 2.1 * len(targets) + 0.4, wspace=0.24, hspace=0.2, bottom=0.09, top=0.92)
    titles = (r"$\bar{K}$", "$w_0 K_0$", "$w_y K_y$", "residual", "residual’s diagonal")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=12 if "$" in title else 9, fontweight="normal")
    for row, (target, numbers) in zip(grid, targets.items(), strict=True):
        y, change, color = arrays[f"{target}.teacher"], arrays[f"{target}.change"], _color(results, target)
        weights, whole = numbers["decomposition"]["average"], arrays[f"{target}.kernel.average"]
        start = _real(weights["initial_weight"]) * arrays[f"{target}.kernel.initial"]
        task = _real(weights["target_weight"]) * np.outer(change, change)
        residual = whole - start - task
        for k, part in enumerate((whole, start, task, residual)):
            draw_heat(row[k], part, y, limit=_limit(whole), values=k == 0)
            row[k].text(1.12, 0.5, "=++ "[k], transform=row[k].transAxes, ha="center", va="center", fontsize=15)
        row[1].set_xlabel(f"$w_0$ = {short(weights['initial_weight'], 3)}", labelpad=2)
        row[2].set_xlabel(f"$w_y$ = {short(weights['target_weight'], 3)}", labelpad=2)
        row[0].set_ylabel(f"{label(target)} target\nteacher’s output $y$", color=color)
        _near(row[4], results)
        row[4].axhline(0, color=MUTED, lw=0.8)
        row[4].scatter(y, residual.diagonal(), s=4, color=color, alpha=0.3, lw=0)
        row[4].plot(*_running_median(y, residual.diagonal()), color=color, lw=2)
        row[4].set_box_aspect(1)
        row[4].set_xlabel("$y$", labelpad=1)
    return figure


def draw_path(results: Results, arrays: Arrays) -> Figure:
    """Training loss, and the error of the initial linearization along the straight path to the trained weights."""
    figure, ((left, right),) = _grid(1, 2, 3.2)
    for target in results["targets"]:
        style = {"color": _color(results, target), "lw": 2, "label": label(target)}
        loss = arrays[f"{target}.training.loss"]
        left.plot(np.arange(1, len(loss) + 1), loss, **style)
        right.plot(arrays[f"{target}.linearization.positions"], arrays[f"{target}.linearization.error"], **style)
    left.set(xlabel="epoch", ylabel="training loss (mean squared error)", yscale="log")
    right.set(xlabel=r"position $s$, $\theta_s = \theta_0 + s(\theta_T - \theta_0)$", ylabel="relative error")
    right.set(xlim=(0, 1), ylim=(0, None))
    left.set_title("Training", loc="left")
    right.set_title("Error of the initial linearization", loc="left")
    for axes in (left, right):
        axes.legend()
    return figure


def draw_places(results: Results, arrays: Arrays) -> Figure:
    """Where on the path each sample's K_s(x, x) passes its average, against the teacher's output."""
    figure, (row,) = _grid(1, len(results["targets"]), 3.0, sharey=True)
    for axes, target in zip(row, results["targets"], strict=True):
        y, place, color = arrays[f"{target}.teacher"], arrays[f"{target}.place"], _color(results, target)
        known = np.isfinite(place)
        _near(axes, results)
        axes.scatter(y[known], place[known], s=9, color=color, alpha=0.35, lw=0)
        if known.any():
            axes.plot(*_running_median(y[known], place[known]), color=color, lw=2.2, label="running median")
            axes.legend(loc="upper right")
        axes.set_title(f"{label(target)} target", color=color, loc="left")
        axes.set(xlabel="teacher’s output $y$", ylim=(0, 1))
    row[0].set_ylabel(r"$s$ where $K_s(x, x) = \bar{K}(x, x)$")
    return figure


def draw_spectra(results: Results, arrays: Arrays) -> Figure:
    """Singular values of the network's weight change and of the exact models' coefficients, per layer."""
    targets = results["targets"]
    prefix = f"{next(iter(targets))}.singular_values.network."
    matrices = [block for block in results["blocks"] if len(arrays[prefix + block]) > 1] or list(results["blocks"])
    figure, grid = _grid(len(targets), len(matrices), 2.35 * len(targets) + 0.6, sharex="col", sharey=True)
    for row, (target, numbers) in zip(grid, targets.items(), strict=True):
        color, model = _color(results, target), numbers["model"]
        # Full has the coefficients of Fixed, so its curve would be hidden.
        shown = [key for key in model if model[key]["structure"] != "Full"]
        adapted = sorted((k for k in shown if model[k]["strength"] is not None), key=lambda k: -model[k]["strength"])
        tints = dict(zip(adapted, _shades(adapted), strict=True))
        for axes, block in zip(row, matrices, strict=True):
            for key in (key for key in shown if f"{target}.singular_values.{key}.{block}" in arrays):
                look = {"color": _tint(color, tints[key])} if key in tints else {"color": MUTED, "ls": _DASHES}
                spectrum = _spectrum(arrays[f"{target}.singular_values.{key}.{block}"])
                axes.plot(*spectrum, lw=1.6, label=model_name(model[key]), **look)
            spectrum = _spectrum(arrays[f"{target}.singular_values.network.{block}"])
            axes.plot(*spectrum, color=INK, lw=2.2, label=r"network, $\theta_T - \theta_0$")
            axes.set(xscale="log", yscale="log", ylim=(1e-4, 1.6))
        row[0].set_ylabel(f"{label(target)} target\n$\\sigma_j / \\sigma_1$", color=color)
        row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    for top, bottom, block in zip(grid[0], grid[-1], matrices, strict=True):
        top.set_title(label(block), loc="left")
        bottom.set_xlabel("index $j$")
    return figure


def draw_models(results: Results, arrays: Arrays) -> Figure:
    """Alignment and test error of the exact models against the strength λ, beside the network's."""
    figure, (row,) = _grid(1, 2, 3.5)
    marks = {"TwoSided": "o-", "Full": "s:"}
    solved = [model for numbers in results["targets"].values() for model in numbers["model"].values()]
    strengths = [model["strength"] for model in solved if model["strength"] is not None]
    for target, numbers in results["targets"].items():
        color, models, name = _color(results, target), numbers["model"].values(), label(target)
        network = (numbers["alignment"]["average"], numbers["network"]["test_mse"])
        for axes, kind, level in zip(row, ("alignment", "test_mse"), network, strict=True):
            axes.axhline(_real(level), color=_tint(color, 0.35), lw=4, zorder=0, label=f"{name}, network")
            for fixed in (m for m in models if m["strength"] is None):
                axes.axhline(_real(fixed[kind]), color=color, lw=1, ls=_DASHES, label=f"{name}, {fixed['structure']}")
            for structure in dict.fromkeys(m["structure"] for m in models if m["strength"] is not None):
                points = sorted((m["strength"], _real(m[kind])) for m in models if m["structure"] == structure)
                x, y = zip(*points, strict=True)
                axes.plot(x, y, marks.get(structure, "D-."), color=color, ms=5, label=f"{name}, {structure}")
    for axes, quantity in zip(row, ("sim with $K_y$", "test mean squared error"), strict=True):
        axes.set(xlabel="strength λ of the penalty on $M$  (weaker adaptation →)", ylabel=quantity)
        axes.set_ylim(bottom=0)
        if strengths:
            # Explicit limits: an axis without a finite point cannot become logarithmic.
            axes.set(xlim=(min(strengths) / 1.5, max(strengths) * 1.5), xscale="log")
    row[0].set_title("Alignment of $K_M$", loc="left")
    row[1].set_title("Test error", loc="left")
    row[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def draw_explain(results: Results, arrays: Arrays) -> Figure:
    """Held-out R² of each structured transform, from the initial to the average features."""
    targets, blocks = results["targets"], list(results["blocks"])
    rows = max((len(numbers["explain"]) for numbers in targets.values()), default=1)
    figure, (row,) = _grid(1, len(targets), 1.15 + 0.34 * rows, sharey=True)
    for axes, (target, numbers) in zip(row, targets.items(), strict=True):
        explain, color = numbers["explain"], _color(results, target)
        looks = {b: {"s": 46, "color": _tint(color, t)} for b, t in zip(blocks, _shades(blocks), strict=True)}
        looks["total"] = {"s": 190, "color": INK, "marker": "|", "lw": 2.4}
        for block, look in looks.items():
            values = np.array([_real(explain[structure].get(block)) for structure in explain])
            name = "all layers" if block == "total" else label(block)
            axes.scatter(np.maximum(values, R2_FLOOR), range(len(explain)), label=name, zorder=3, **look)
        axes.axvline(0, color=MUTED, lw=0.8)
        axes.set_yticks(range(len(explain)), [STRUCTURES.get(s, label(s)) for s in explain])
        axes.set(xlim=(R2_FLOOR - 0.03, 1.03), ylim=(len(explain) - 0.5, -0.5), xlabel="held-out $R^2$")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=RULE, lw=0.6)
        axes.set_title(f"{label(target)} target", color=color, loc="left")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=4, columnspacing=0.9, handletextpad=0.1)
    return figure


def draw_heat(axes: Axes, kernel: NDArray[Any], y: NDArray[Any], *, values: bool, limit: float | None = None) -> None:
    """Draw one kernel, with zero in the middle of the colors and a tick at the teacher's sign change."""
    limit = _limit(kernel) if limit is None else limit
    axes.imshow(kernel, cmap=_DIVERGING, vmin=-limit, vmax=limit, rasterized=True)
    boundary = int(np.searchsorted(y, 0))
    ticks = [0, *([boundary] if 0 < boundary < len(y) - 1 else []), len(y) - 1]
    axes.set_xticks(ticks, [""] * len(ticks))
    axes.set_yticks(ticks, ["0" if k == boundary else short(y[k]) for k in ticks] if values else [""] * len(ticks))
    axes.tick_params(length=2.5, width=0.6, pad=2, labelsize=7.5)
    axes.spines[:].set_visible(False)


def _near(axes: Axes, results: Results) -> None:
    near = results["config"]["near"]
    axes.axvspan(-near, near, color=RULE, alpha=0.45, lw=0)


def _running_median(x: NDArray[Any], values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    width = min(len(x), max(5, len(x) // 14))
    order = np.argsort(x, kind="stable")
    windows = (np.lib.stride_tricks.sliding_window_view(v[order], width) for v in (x, values))
    center, middle = (np.median(window, axis=-1) for window in windows)
    return center, middle


def _color(results: Results, target: str) -> str:
    return _COLORS[list(results["targets"]).index(target) % len(_COLORS)]


def model_name(model: Mapping[str, Any]) -> str:
    """The name of an exact model, from its structure and strength: `TwoSided, λ = 0.1`."""
    return str(model["structure"]) + ("" if model["strength"] is None else f", λ = {short(model['strength'], 3)}")
