"""The page of weight-spectra: singular values by layer, effective ranks, and the training."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from adaptive_tangents.experiments.spectra.claims import LEADING, MEASURES
from adaptive_tangents.reporting.drawing import COLORS, DASHES, INK, MUTED, RULE, grid, label, shades, tint
from adaptive_tangents.reporting.pages import Section, Shown, Story, Table, counted, told
from adaptive_tangents.runs.results import Arrays, Results

KINDS = {
    "network": "network, θ_T − θ_0",
    "fixed": "fixed, β",
    "adaptive": "adaptive, B",
    "inner": "adaptive, θ",
}
_FLOOR = 1e-4


def _name(kind: str) -> str:
    return KINDS.get(kind, kind.replace("_", ", λ = "))


def _look(results: Results, group: str, kind: str) -> dict[str, Any]:
    """A curve's style: the network in ink, fixed models gray, adaptive models in color."""
    if kind in ("fixed", "Fixed"):
        return {"color": MUTED, "ls": DASHES, "lw": 1.6}
    if kind == "network":
        return {"color": INK, "lw": 2.2}
    if group != "exact":
        return {"color": tint(COLORS[0], 1 if kind == "adaptive" else 0.45), "lw": 1.8}
    adapted = [key for key in results["ranks"][group] if key != "Fixed"]
    return {"color": tint(COLORS[1], dict(zip(adapted, shades(adapted), strict=True))[kind]), "lw": 1.8}


def _plain(text: str) -> str:
    """The text for a figure's legend, with θ_T in mathtext."""
    return text.replace("θ_T − θ_0", r"$\theta_T - \theta_0$")


def draw_spectra(results: Results, arrays: Arrays) -> Figure:
    """σ_j/σ_1 of every kind of matrix in every layer: geometric means over seeds."""
    groups, layers = results["ranks"], list(results["layers"])
    figure, axes = grid(len(groups), len(layers), 2.25 * len(groups) + 0.5, sharex="col", sharey=True)
    for row, (group, kinds) in zip(axes, groups.items(), strict=True):
        for axis, layer in zip(row, layers, strict=True):
            for kind in kinds:
                values = arrays[f"{group}.{kind}.{layer}"]
                relative = np.maximum(values / values.max(1, keepdims=True), _FLOOR / 10)
                curve = np.exp(np.log(relative).mean(0))
                axis.plot(np.arange(1, len(curve) + 1), curve, label=_plain(_name(kind)), **_look(results, group, kind))
            axis.set(xscale="log", yscale="log", ylim=(_FLOOR, 1.6))
            axis.minorticks_off()
            axis.axvline(LEADING, color=RULE, lw=1, zorder=0)
        row[0].set_ylabel(f"{group if group != 'exact' else 'exact fits'}\n$\\sigma_j / \\sigma_1$")
        row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    for top, bottom, (layer, shape) in zip(axes[0], axes[-1], results["layers"].items(), strict=True):
        top.set_title(f"{label(layer)}, {shape[0]} × {shape[1]}", loc="left", fontsize=9)
        bottom.set_xlabel("index $j$")
    return figure


def draw_ranks(results: Results, arrays: Arrays) -> Figure:
    """Effective ranks by layer, one row per group and one column per measure, with the range over seeds."""
    groups, layers = results["ranks"], list(results["layers"])
    figure, axes = grid(len(groups), len(MEASURES), 2.1 * len(groups) + 0.5, sharex=True)
    places = np.arange(1, len(layers) + 1)
    for row, (group, kinds) in zip(axes, groups.items(), strict=True):
        for axis, measure in zip(row, MEASURES, strict=True):
            for kind, of in kinds.items():
                values = np.array([of[layer][measure] for layer in layers]).T
                look = _look(results, group, kind)
                axis.plot(places, values.mean(0), marker="o", ms=3.5, label=_plain(_name(kind)), **look)
                axis.fill_between(places, values.min(0), values.max(0), color=look["color"], alpha=0.12, lw=0)
            axis.set_ylim(bottom=0)
            axis.set_xticks(places, [str(k) for k in places])
            axis.grid(axis="y", color=RULE, lw=0.5)
        row[0].set_ylabel(f"{group if group != 'exact' else 'exact fits'}\neffective rank")
        row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    for top, bottom, measure in zip(axes[0], axes[-1], MEASURES, strict=True):
        top.set_title(f"{measure} rank", loc="left")
        bottom.set_xlabel("layer")
    return figure


def _verdict(results: Results) -> str:
    """The answer in a line or two: the verdicts on the network, the adaptive model and the exact fits."""
    claims = results["claims"]
    words = {"holds": "yes", "holds in part": "in part", "does not hold": "no"}

    def told(key: str) -> str:
        found = [words[claim["verdict"]] for name, claim in claims.items() if name.partition(".")[::2] in asked[key]]
        return ", ".join(dict.fromkeys(found)) or "not measured"

    groups = [group for group in results["ranks"] if group != "exact"]
    asked = {
        "network": [(group, "network") for group in groups],
        "adaptive": [(group, "adaptive") for group in groups],
        "exact": [("exact", model) for model in results["ranks"]["exact"]],
    }
    return (
        "Is the effective rank lower than with fixed features? "
        f"The network’s change: {told('network')}; the B of adaptive features trained by SGD: {told('adaptive')}; "
        f"their exact fit: {told('exact')}."
    )


def _ranks_table(results: Results, group: str) -> Table:
    layers = list(results["layers"])
    rows = [
        (_name(kind), *(" / ".join(f"{np.mean(of[layer][measure]):.1f}" for measure in MEASURES) for layer in layers))
        for kind, of in results["ranks"][group].items()
    ]
    note = f"{' / '.join(MEASURES)} rank, mean over {counted(results['config']['seeds'], 'seed')}."
    return Table(("", *(label(layer) for layer in layers)), rows, note)


def _errors_table(results: Results) -> Table:
    rows: list[tuple[str, ...]] = [
        (group, _name(model), f"{np.mean(errors):.3f}", f"{np.std(errors, ddof=1):.3f}" if len(errors) > 1 else "—")
        for group, models in results["errors"].items()
        for model, errors in models.items()
    ]
    return Table(
        ("", "model", "test error", "standard deviation"), rows, f"On {results['data']['test']:,} test digits."
    )


def _story(results: Results) -> Story:
    config, groups = results["config"], list(results["ranks"])
    trained = [group for group in groups if group != "exact"]
    n, seeds = config["samples"], counted(config["seeds"], "seed")
    tables = [part for group in groups for part in (f"{_where(group)}:", _ranks_table(results, group))]
    return Story(
        title="Is the weight change low-rank?",
        lead=f"A network of {config['depth']} dense layers learns the ten digits from {n:,} of them. It is compared "
        "with its linearization with fixed and with adaptive features, trained by the same SGD, and with exact fits.",
        verdict=_verdict(results),
        sections=(
            Section("spectra", "Singular values", (
                "The curves show the singular values of one matrix per layer and model: the earlier a curve falls, the lower "
                "the rank. The matrices are the network’s change θ_T − θ_0, the fixed model’s coefficients β, and the "
                "adaptive model’s inner θ and effective B = Mᵀθ, with biases as one more column.",
                Shown("spectra", "Singular values of every model’s matrices, layer by layer, relative to the largest",
                      f"Singular values relative to the largest, geometric means over {seeds}. The vertical line marks the "
                      f"{LEADING}th, one per class. Look for how early a curve falls: a few large values mean an "
                      "approximately low rank, however many small ones follow."),
            )),
            Section("ranks", "Effective ranks", (
                "The figure and the tables give three effective ranks, soft counts of large singular values σ: lower means "
                "fewer directions. Small σ weigh least in the stable rank, Σσ² over the largest σ², more in the "
                "participation rank (Σσ²)²/Σσ⁴, and most in the entropy rank exp(−Σ p log p), p = σ/Σσ. A verdict "
                "counts all layers by all three.",
                Shown("ranks", "Effective ranks of every model, layer by layer, by three measures",
                      "Effective ranks; bands are the range over seeds. Look for whether the adaptive model’s B is near the "
                      "network’s change or near the fixed model’s coefficients."),
                *tables,
            )),
            Section("training", "What was trained", (
                "The table gives the test errors of all models, which show whether they learned. Training is "
                f"{config['epochs']} epochs of {n:,} digits by SGD on the cross-entropy, learning rate "
                f"{config['learning_rate']:g}, momentum {config['momentum']:g}, batches of {config['batch_size']}: "
                f"{' and '.join(trained)}. The published figure uses fresh subsets: its pipeline draws n digits from the "
                "whole training set at every epoch, so the network sees many more than n. Exact fits interpolate one-hot "
                "labels of the fixed subset under squared error; λ is the strength of the penalty on M.",
                _errors_table(results),
            )),
        ),
    )  # fmt: skip


def _where(group: str) -> str:
    return "Exact fits" if group == "exact" else f"Trained on a {group}"


def _arrays(results: Results) -> list[str]:
    return [
        f"{group}.{kind}.{layer}"
        for group, kinds in results["ranks"].items()
        for kind in kinds
        for layer in results["layers"]
    ]


PAGE = told({"spectra": draw_spectra, "ranks": draw_ranks}, _arrays, _story)
