"""The figures of forecast. They draw finished numbers and measure nothing."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from adaptive_tangents.experiments.forecast.claims import ADAPTIVE, AGREES, epochs_of
from adaptive_tangents.experiments.forecast.problems import EPOCHS
from adaptive_tangents.experiments.kernel_alignment.figures import draw_heat
from adaptive_tangents.reporting.drawing import COLORS, DASHES, INK, MUTED, RULE, fixed, grid, label, legend_above
from adaptive_tangents.runs.results import Arrays, Results

COLUMNS = {
    "initial": ("$K_0$", "initial"),
    "forecast": (r"$\hat{K}$", "forecast"),
    "average": (r"$\bar{K}$", "average over training"),
    "final": ("$K_T$", "final"),
    "target": ("$K_y$", "task"),
}
_SHOWN = ("mlp-smooth", "mlp-sign")
_LOOKS: dict[str, tuple[str, dict[str, Any]]] = {
    "forecast": ("forecast", {"color": COLORS[1], "marker": "D", "s": 40}),
    "fixed": ("Fixed", {"color": COLORS[0], "marker": "o", "s": 34}),
    "left": ("Left", {"color": COLORS[0], "marker": "<", "s": 34}),
    "two_sided": ("TwoSided", {"color": COLORS[2], "marker": "s", "s": 30}),
    "shuffled": ("shuffled targets", {"facecolor": "none", "edgecolor": INK, "marker": "o", "s": 34}),
    "quadratic": ("second-order model", {"color": COLORS[3], "marker": "^", "s": 36}),
}


def main_cases(results: Results) -> dict[str, Mapping[str, Any]]:
    """The networks with every comparison."""
    return {key: case for key, case in results["cases"].items() if not case["varied"]}


def draw_kernels(results: Results, arrays: Arrays) -> Figure:
    """Heat maps of the initial, the foretold, the average, the final and the task's kernel, one row a network."""
    rows = [key for key in _SHOWN if key in results["cases"]] or list(main_cases(results))[:2]
    figure, panels = grid(
        len(rows), len(COLUMNS), 2.08 * len(rows) + 0.6, wspace=0.07, hspace=0.16, top=0.9, bottom=0.06
    )
    for axes, (title, word) in zip(panels[0], COLUMNS.values(), strict=True):
        axes.set_title(title, fontsize=13, pad=17)
        axes.text(0.5, 1.03, word, transform=axes.transAxes, ha="center", va="bottom", color=MUTED)
    for row, key in zip(panels, rows, strict=True):
        case, y = results["cases"][key], arrays[f"{key}.y"]
        numbers = {
            kind: case["methods"][m]["average"][0] for kind, m in (("initial", "nothing"), ("forecast", "forecast"))
        }
        for axes, kind in zip(row, COLUMNS, strict=True):
            kernel = y @ y.T if kind == "target" else arrays[f"{key}.kernel.{kind}"]
            draw_heat(axes, kernel, arrays[f"{key}.told"], values=kind == "initial")
            if kind in numbers:
                axes.set_xlabel(rf"CKA with $\bar{{K}}$: {fixed(numbers[kind])}", labelpad=2)
        row[0].set_ylabel(case["words"])
    return figure


def draw_course(results: Results, arrays: Arrays) -> Figure:
    """Agreement with the averaged kernel against cost: the network's own way, and every forecast."""
    cases = main_cases(results)
    columns = 2 if len(cases) in (2, 4) else min(3, len(cases))
    rows = -(-len(cases) // columns)
    figure, panels = grid(rows, columns, 2.9 * rows + 0.3, sharey=True)
    for axes, case in zip(panels.flat, cases.values(), strict=False):
        kept = [k for k in EPOCHS if k < case["epochs"]]
        own = [case["methods"][f"epoch{k}"]["average"] for k in kept]
        floor = _least_cost(case) / 2
        for seed, start in enumerate(case["methods"]["nothing"]["average"]):
            way = [start, *(values[seed] for values in own), 1.0]
            axes.plot([floor, *kept, case["epochs"]], way, color=MUTED, lw=1, marker=".", ms=4,
                      label="network’s own way" if seed == 0 else None)  # fmt: skip
        for name, (words, look) in _LOOKS.items():
            for nth, method in enumerate(m for m in case["methods"] if m == name or m.startswith(f"{name}_")):
                places = epochs_of(case, method)
                if np.isnan(places).all():  # the second-order model, trained as long as the network
                    places = np.full(len(places), float(case["epochs"]))
                values = np.array(case["methods"][method]["average"], dtype=float)
                axes.scatter(places, values, label=words if nth == 0 else None, zorder=3, **look)
        axes.axhline(AGREES, color=RULE, lw=1, ls=DASHES)
        axes.set(xscale="log", xlabel="cost in epochs of the training")
        axes.set_title(case["words"], loc="left")
        axes.grid(color=RULE, lw=0.5)
    for axes in panels.flat[len(cases) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel(r"CKA with $\bar{K}$")
    fullest = max(range(len(cases)), key=lambda k: len(list(cases.values())[k]["methods"]))
    legend_above(figure, panels.flat[fullest], columns=7)
    return figure


def _least_cost(case: Mapping[str, Any]) -> float:
    costs = [cost for method in case["methods"] for cost in epochs_of(case, method) if cost > 0]
    return float(min(costs, default=1.0))


def draw_layers(results: Results, arrays: Arrays) -> Figure:
    """Each layer's share of the squared change, foretold and true."""
    cases = main_cases(results)
    most = max(len(case["layers"]) for case in cases.values())
    figure, (row,) = grid(1, len(cases), 1.4 + 0.24 * max(most, 5))
    for axes, case in zip(row, cases.values(), strict=True):
        places = np.arange(len(case["layers"]))
        for method, words, look in (
            ("trained", "training", {"color": INK, "marker": "|", "s": 130, "lw": 2}),
            ("forecast", "forecast", {"color": COLORS[1], "marker": "D", "s": 30}),
            ("fixed", "forecast, Fixed", {"color": COLORS[0], "marker": "o", "s": 26}),
        ):
            shares = np.maximum(np.array(case["by_layer"][method]["share"], dtype=float), 1e-4)
            axes.scatter(shares, places, label=words, zorder=3, **look)
        axes.set_yticks(places, [short_name(name) for name in case["layers"]])
        axes.set(xscale="log", xlim=(7e-5, 1.5), ylim=(len(places) - 0.5, -0.5), xlabel="share of the squared change")
        axes.tick_params(axis="y", length=0, labelsize=7.5 if most > 10 else 8)
        axes.grid(color=RULE, lw=0.5)
        axes.set_title(case["words"], loc="left")
    legend_above(figure, row[0], columns=3)
    return figure


def draw_directions(results: Results, arrays: Arrays) -> Figure:
    """Overlap of the foretold and the true leading directions of change, by layer and side."""
    cases = main_cases(results)
    most = max(len(case["layers"]) for case in cases.values())
    figure, panels = grid(2, len(cases), 2.2 + 0.36 * max(most, 5), sharex=True)
    for column, case in zip(panels.T, cases.values(), strict=True):
        for axes, side, words in zip(column, ("left", "right"), ("outputs", "inputs"), strict=True):
            told = np.array(case["by_layer"]["forecast"][side], dtype=float)
            kept = np.flatnonzero(~np.isnan(told))
            places = np.arange(len(kept))
            chance = np.array(case["by_layer"]["forecast"][f"chance_{side}"], dtype=float)[kept]
            axes.barh(places, chance, 0.6, color=RULE, label="chance")
            for method, name, look in (
                ("shuffled", "shuffled targets", {"facecolor": "none", "edgecolor": INK, "marker": "o", "s": 30}),
                ("fixed", "forecast, Fixed", {"color": COLORS[0], "marker": "o", "s": 22}),
                ("forecast", "forecast", {"color": COLORS[1], "marker": "D", "s": 30}),
            ):
                if method in case["by_layer"]:
                    values = np.array(case["by_layer"][method][side], dtype=float)[kept]
                    axes.scatter(values, places, label=name, zorder=3, **look)
            axes.set_yticks(places, [short_name(case["layers"][k]) for k in kept])
            axes.set(xlim=(-0.03, 1.03), ylim=(len(kept) - 0.5, -0.5))
            axes.tick_params(axis="y", length=0, labelsize=7.5 if most > 10 else 8)
            axes.grid(axis="x", color=RULE, lw=0.5)
            axes.set_title(f"{case['words']}, {words}", loc="left", fontsize=9)
        column[-1].set_xlabel("overlap")
    legend_above(figure, panels[0, 0], columns=4)
    return figure


def draw_varied(results: Results, arrays: Arrays) -> Figure:
    """Agreement for other targets, ways of training and widths."""
    cases = results["cases"]
    figure, ((axes,),) = grid(1, 1, 1.2 + 0.26 * len(cases))
    for place, case in enumerate(cases.values()):
        for method, words, look in (
            ("nothing", "$K_0$", {"color": MUTED, "marker": "x", "s": 30}),
            ("fixed", "Fixed", {"color": COLORS[0], "marker": "o", "s": 30}),
            (ADAPTIVE, "TwoSided", {"color": COLORS[2], "marker": "s", "s": 30}),
            (
                "forecast",
                "forecast, chosen of both",
                {"facecolor": "none", "edgecolor": COLORS[1], "marker": "D", "s": 70},
            ),
        ):
            values = case["methods"][method]["average"]
            axes.scatter(values, [place] * len(values), label=words if place == 0 else None, zorder=3, **look)
    axes.axvline(AGREES, color=RULE, lw=1, ls=DASHES)
    axes.set_yticks(range(len(cases)), [f"{case['words']}" for case in cases.values()])
    axes.set(ylim=(len(cases) - 0.5, -0.5), xlabel=r"CKA with $\bar{K}$")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=RULE, lw=0.5)
    legend_above(figure, axes, columns=4)
    return figure


def short_name(name: str) -> str:
    """A layer's name without what all have."""
    for part in ("body.encoder.", "layers.", "layer.", "attention.", ".weight", "self.", "dense."):
        name = name.replace(part, "")
    return label(name)
