"""The page of feature-change: R² of each structure by layer, and measured against predicted transforms."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from adaptive_tangents.reporting.drawing import COLORS, INK, MUTED, RULE, grid, label, legend_above, real, shades, tint
from adaptive_tangents.reporting.pages import Section, Shown, Story, Table, fixed, number, told
from adaptive_tangents.runs.results import Arrays, Results

STRUCTURES = {"layer_scale": "LayerScale", "left": "Left", "right": "Right", "two_sided": "TwoSided", "full": "Full"}
NAMES = {"mlp": "MLP", "cnn": "CNN", "transformer": "transformer"}
FLOOR = -0.25
_LOOKS: dict[str, dict[str, Any]] = {
    "layer_scale": {"color": MUTED, "marker": "s", "s": 22},
    "left": {"color": COLORS[0], "marker": "<", "s": 30},
    "right": {"color": COLORS[1], "marker": ">", "s": 30},
    "two_sided": {"color": COLORS[2], "marker": "D", "s": 42},
    "full": {"facecolor": "none", "edgecolor": INK, "marker": "o", "s": 42},
}


def _short(name: str) -> str:
    return label(name.removesuffix(".weight").replace("layers.", "").replace("attention.", ""))


def draw_r2(results: Results, arrays: Arrays, *, goal: str) -> Figure:
    """Held-out R² of each structure, per layer and in total, one panel per network."""
    networks = results["networks"]
    most = max(len(numbers["blocks"]) for numbers in networks.values()) + 1
    figure, (row,) = grid(1, len(networks), 1.3 + 0.23 * most)
    for axes, (kind, numbers) in zip(row, networks.items(), strict=True):
        found, blocks = numbers["explain"][goal], ["total", *numbers["blocks"]]
        for structure, of_blocks in found.items():
            values = np.array([real(of_blocks.get(name)) for name in blocks])
            axes.scatter(np.maximum(values, FLOOR), range(len(blocks)), label=STRUCTURES[structure], zorder=3,
                         **_LOOKS[structure])  # fmt: skip
        axes.axvline(0, color=MUTED, lw=0.8)
        axes.axhline(0.5, color=RULE, lw=0.8)
        axes.set_yticks(range(len(blocks)), ["all layers", *map(_short, blocks[1:])])
        axes.set(xlim=(FLOOR - 0.04, 1.04), ylim=(len(blocks) - 0.5, -0.5), xlabel="held-out $R^2$")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=RULE, lw=0.6)
        axes.set_title(NAMES.get(kind, kind), loc="left")
    legend_above(figure, row[0], columns=5)
    return figure


def draw_sides(results: Results, arrays: Arrays) -> Figure:
    """Singular values of each layer's measured factors, largest first; the predicted ones are dotted."""
    networks = results["networks"]
    figure, panels = grid(2, len(networks), 5.6, sharex=True, sharey="row")
    for column, (kind, numbers) in zip(panels.T, networks.items(), strict=True):
        for axes, side, symbol in zip(column, ("left", "right"), ("M_L", "M_R"), strict=True):
            names = [key.rpartition(".")[0] for key in numbers["sides"] if key.endswith(f".{side}")]
            for name, amount in zip(names, shades(names), strict=True):
                color = tint(COLORS[0 if side == "left" else 1], amount)
                for which, line in (("measured", "-"), ("predicted", ":")):
                    values = arrays[f"{kind}.{name}.{side}.{which}"]
                    axes.plot(np.arange(1, len(values) + 1), np.maximum(values, 0.03), ls=line, lw=1.5, color=color,
                              label=_short(name) if which == "measured" else None)  # fmt: skip
            axes.axhline(1, color=MUTED, lw=0.8)
            axes.set(xscale="log", yscale="log")
            axes.grid(color=RULE, lw=0.5)
            axes.set_title(f"{NAMES.get(kind, kind)}, ${symbol}$", loc="left")
            if names:
                axes.legend(loc="upper right", fontsize=6.5 if len(names) > 6 else 8, ncols=2 if len(names) > 6 else 1)
        column[-1].set_xlabel("index $j$")
    for axes in panels[:, 0]:
        axes.set_ylabel(r"$\sigma_j(M)$")
    return figure


def draw_match(results: Results, arrays: Arrays, *, which: str) -> Figure:
    """Overlap of measured and predicted principal subspaces at each side, beside shuffled labels and chance."""
    networks = {k: n for k, n in results["networks"].items() if _compared(n)} or dict(results["networks"])
    most = max(len(_compared(numbers)) for numbers in networks.values())
    figure, (row,) = grid(1, len(networks), 1.4 + 0.2 * max(most, 4))
    for axes, (kind, numbers) in zip(row, networks.items(), strict=True):
        sides = _compared(numbers)
        for k, side in enumerate(sides.values()):
            axes.plot([0, side["match"]["beyond"]], [k, k], color=RULE, lw=5, solid_capstyle="butt", zorder=1)
        places = range(len(sides))
        for key, look, name in (
            ("match", {"color": COLORS[2], "marker": "D", "s": 36}, "the labels"),
            ("shuffled", {"facecolor": "none", "edgecolor": INK, "marker": "o", "s": 36}, "shuffled labels"),
        ):
            values = [side[key][which] for side in sides.values()]
            axes.scatter(values, places, label=f"predicted from {name}", zorder=3, **look)
        axes.plot([], [], color=RULE, lw=5, label="95 % of random subspaces")
        axes.set_yticks(places, [_side_name(key) for key in sides])
        axes.set(xlim=(0, 1), ylim=(len(sides) - 0.5, -0.5), xlabel="overlap")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=RULE, lw=0.6)
        axes.set_title(NAMES.get(kind, kind), loc="left")
    legend_above(figure, row[0], columns=5)
    return figure


def _compared(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {key: side for key, side in numbers["sides"].items() if side["match"] and side["shuffled"]}


def _side_name(key: str) -> str:
    name, _, side = key.rpartition(".")
    return f"{_short(name)}, {side}"


def _arrays(results: Results) -> list[str]:
    return [
        f"{kind}.{key}.{which}"
        for kind, numbers in results["networks"].items()
        for key in numbers["sides"]
        for which in ("measured", "predicted")
    ]


def _story(results: Results) -> Story:
    claims = results["claims"]
    return Story(
        "Is the change of features a transform of each layer?",
        f"Three networks are trained to tell two classes of images apart ({results['data']['name']}). The premise "
        "of LeJeune and Alemohammad (An Adaptive Tangent Feature Perspective of Neural Networks, CPAL 2024, "
        "arXiv:2308.15478) is that training changes their tangent features as a transform M of the initial ones "
        "would, layer by layer on both sides. Here that M is measured and compared with the one that the exact model "
        "finds from the initial features and the labels alone.",
        verdict(claims),
        (_change_section(results), _transform_section(results), _predicted_section(results), _network_section(results)),
    )


def verdict(claims: Mapping[str, Any]) -> str:
    """Whether a transform describes the change, and whether it is the predicted one, in a few sentences."""
    premise = {
        "holds": "Yes: in every network a two-sided transform of each layer explains most of the change of features.",
        "holds in part": "In part: in some networks a two-sided transform of each layer explains most of the change.",
        "does not hold": "No: in no network does a two-sided transform of each layer explain most of the change of features.",
    }[claims["premise"]["verdict"]]
    if claims["premise"]["verdict"] != "does not hold" and claims["layers"]["verdict"] != "holds":
        premise += " This holds for all layers together; for some layers it explains less than half."
    same = {
        "holds": "It is the transform that the exact model predicts.",
        "holds in part": "At some sides it acts in the directions that the exact model predicts.",
        "does not hold": "It is not the transform that the exact model predicts from the labels",
    }[claims["same"]["verdict"]]
    if claims["same"]["verdict"] == "does not hold":
        by_labels = {claims[key]["verdict"] for key in ("labels", "written_labels")} == {"holds"}
        shuffled = "." if by_labels else "; at some, that of shuffled labels agrees as much."
        agreed = {claims[key]["verdict"] for key in ("directions", "written")} != {"does not hold"}
        same += (
            ", though the two agree more than chance at some of the sides" + shuffled
            if agreed
            else ", nor do the two agree more than chance anywhere."
        )
    return f"{premise} {same}"


def _change_section(results: Results) -> Section:
    rows = [
        (NAMES.get(kind, kind), {"average": "φ_0 → φ̄", "final": "φ_0 → φ_T"}[goal],
         *(fixed(found[structure]["total"]) for structure in STRUCTURES))
        for kind, numbers in results["networks"].items() for goal, found in numbers["explain"].items()
    ]  # fmt: skip
    config = results["config"]
    caption = (
        "Held-out R² of each structure, per layer and in total: 1 explains the whole change, 0 none of it. Values "
        "below −0.25 are drawn at the left edge. "
    )
    return Section("change", "What a transform explains", (
        "The figures show how much of the feature change a transform of the initial features explains on held-out "
        f"images: R² near 1 confirms the premise. Of {config['samples']} training images, half fit the transform, a "
        "quarter chooses its ridge toward the identity, and the last quarter gives R². Full is one transform over all "
        "layers, by kernel regression.",
        Shown("average", "Held-out R squared of each structure per layer, for the average features",
              caption + "The change is from the initial features to their average over the path of training, in which "
              "the network is exactly linear. Look for the distance from LayerScale to TwoSided."),
        Shown("final", "Held-out R squared of each structure per layer, for the final features",
              caption + "The change is from the initial to the final features. Look for layers where R² is lower than "
              "for the average."),
        Table(("network", "change", *STRUCTURES.values()), rows, "R² for all layers together."),
    ))  # fmt: skip


def _transform_section(results: Results) -> Section:
    rows: list[tuple[str, ...]] = [
        (f"{NAMES.get(kind, kind)}: {_side_name(key)}", str(side["width"]), ", ".join(fixed(v) for v in side["largest"]),
         number(side["participation"]))
        for kind, numbers in results["networks"].items() for key, side in numbers["sides"].items()
    ]  # fmt: skip
    return Section("transforms", "The measured transforms", (
        "The curves show the singular values of each layer’s transform: few values far above 1 mean that it acts along few "
        "directions.",
        Shown("sides", "Singular values of the factors M_L and M_R of each layer",
              "Singular values of the measured two-sided transforms from the initial to the average features "
              "(lines), and of those that the exact model predicts (dotted). Each layer has a shade, the first layers "
              "the lightest; the thin line is the identity. Look for few values far above 1."),
        Table(("side", "width", "largest singular values", "participation ratio of M − I"), rows),
    ))  # fmt: skip


def _predicted_section(results: Results) -> Section:
    fresh = [
        (NAMES.get(kind, kind), *(fixed(numbers["fresh"][key]["total"]) for key in (
            "measured", "scale", "predicted", "shuffled", "predicted_scaled", "shuffled_scaled")))
        for kind, numbers in results["networks"].items()
    ]  # fmt: skip
    sides = [
        (f"{NAMES.get(kind, kind)}: {_side_name(key)}", ", ".join(f"{a:.0f}°" for a in side["match"]["angles"]),
         *(fixed(side[which][each]) for each in ("overlap", "written") for which in ("match", "shuffled")),
         *(fixed(side["match"][each]) for each in ("expected", "beyond", "cosine", "expected_cosine")))
        for kind, numbers in results["networks"].items() for key, side in _compared(numbers).items()
    ]  # fmt: skip
    k = results["config"]["directions"]
    return Section("predicted", "Is it the predicted one?", (
        "The figures compare the measured transforms with those that the exact model predicts: large overlaps would "
        "mean that it predicts how features change. The exact two-sided model is fitted to the labels with the initial "
        "features and never sees the trained network. Of the strengths tried, the one with the lowest error on "
        "held-out images is used. The model is not fitted to the feature change, so its R² may be far below 0. The "
        "control is the same model with shuffled labels.",
        _preference(results),
        Table(("network", "measured", "best scale", "predicted", "shuffled", "scale, predicted", "scale, shuffled"), fresh,
              "R² of the change from φ_0 to φ̄ on fresh images, all layers together. The last two columns fit two "
              "numbers per layer: a scale of φ_0 and the amplitude of the predicted transform."),
        Shown("read", "Overlap of the subspaces in which measured and predicted transforms read, at each side",
              f"What they read: at each side, the {k} right singular vectors of M − I with the largest values, for the "
              "measured and for the predicted transform. The overlap is the mean squared cosine of the principal "
              "angles, 1 for equal subspaces. Gray: the range of 95 % of random subspaces. Look for diamonds beyond the "
              "gray and beyond the rings."),
        Shown("written", "Overlap of the subspaces in which measured and predicted transforms write, at each side",
              f"What they write: the same for the {k} left singular vectors. Look for diamonds beyond the rings: where "
              "the rings lie as far out, the agreement does not come from the labels."),
        "A measured side is not symmetric, so the directions that it reads differ from those that it writes. At first "
        "only the former were compared, and that choice was made after both had been seen. Here both are compared, and "
        "each has its own claims.",
        Table(("side", "angles", "read", "shuffled", "written", "shuffled", "chance", "95 %", "cosine", "chance"), sides,
              "Principal angles of the directions read; overlaps, also for shuffled labels; the mean and the 95th "
              "percentile by chance; the cosine of the two M − I, and its mean if one of them is rotated at random."),
    ))  # fmt: skip


def _preference(results: Results) -> str:
    """How much adaptation the labels favor: whether the chosen strength is at the edge of those tried."""
    edge, worse = [], []
    for kind, numbers in results["networks"].items():
        chosen, errors = f"{numbers['fit']['strength']:g}", numbers["fit"]["errors"]
        edge += [NAMES.get(kind, kind)] if chosen == max(errors, key=float) else []
        worse += [NAMES.get(kind, kind)] if errors[chosen] >= numbers["fit"]["fixed_error"] else []
    tried = ", ".join(f"{share:g}" for share in results["config"]["strengths"])
    return (
        f"The relative strengths tried are λ = {tried}; the larger λ, the nearer M is to the identity. The largest was "
        f"chosen for {_listed(edge)}, and no strength had a lower error than the fixed kernel for {_listed(worse)}."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "no network"


def _network_section(results: Results) -> Section:
    rows: list[tuple[str, ...]] = [
        (NAMES.get(kind, kind), f"{100 * n['test_error']:.1f} %", number(n["train_mse"]), f"{n['path_error_db']:.0f}",
         f"{n['fit']['strength']:g}", number(n["fit"]["errors"][f"{n['fit']['strength']:g}"]),
         number(n["fit"]["fixed_error"]), "yes" if n["fit"]["converged"] else "no")
        for kind, n in results["networks"].items()
    ]  # fmt: skip
    head = ("network", "wrong in test", "training error", "path average, dB", "λ, relative", "exact model, error",
            "fixed, error", "converged")  # fmt: skip
    return Section("networks", "The networks", (
        "The table gives the errors of the networks and of the exact models: both learned if these are small. MLP: two "
        "dense ReLU layers; CNN: three 3×3 convolutions, each followed by ReLU and average pooling; "
        "transformer: two layers of self-attention and dense ReLU layers on 4 × 4 patches. All have one output, which "
        "is trained to ±1 with the mean squared error.",
        Table(head, rows, "The errors of the exact models are mean squared errors on held-out images. Decibels say how "
              "exactly the network’s change is linear in the average features."),
    ))  # fmt: skip


PAGE = told(
    {
        "average": partial(draw_r2, goal="average"), "final": partial(draw_r2, goal="final"), "sides": draw_sides,
        "read": partial(draw_match, which="overlap"), "written": partial(draw_match, which="written"),
    },
    _arrays,
    _story,
)  # fmt: skip
