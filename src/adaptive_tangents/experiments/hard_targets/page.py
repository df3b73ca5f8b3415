"""The page of hard-targets: curves over the temperature, and adaptation against how poorly K_0 represents the target."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from adaptive_tangents.experiments.claims import spread
from adaptive_tangents.experiments.hard_targets.claims import HARDNESS
from adaptive_tangents.reporting.drawing import COLORS, DASHES, INK, MUTED, RULE, grid
from adaptive_tangents.reporting.pages import Section, Shown, Story, Table, number, told
from adaptive_tangents.runs.results import Arrays, Results

_AGAINST = {
    "sharpness": "sharpness 1/τ",
    "gain": "gain of sim(K̄, K_y)",
    "size_nuclear": "‖M − I‖, measured, nuclear",
    "size_frobenius": "the same, Frobenius",
    "gain_exact": "gain of K_M",
    "size_exact_nuclear": "‖M − I‖, exact, nuclear",
    "size_exact_frobenius": "the same, Frobenius",
}
_MEASURED = {
    "rkhs_norm": "RKHS norm",
    "energy_outside": "energy outside the ten leading",
    "leave_one_out": "leave-one-out error",
    "sim_initial": "sim(K_0, K_y)",
    "sim_average": "sim(K̄, K_y)",
    "sim_final": "sim(K_T, K_y)",
    "sim_exact": "sim(K_M, K_y)",
    "size_nuclear": "‖M − I‖, measured, nuclear",
    "size_frobenius": "the same, Frobenius",
    "explained": "held-out R² of that M",
    "size_exact_nuclear": "‖M − I‖, exact, nuclear",
    "size_exact_frobenius": "the same, Frobenius",
    "train_mse": "training loss at the end",
    "path_error_db": "accuracy of the path average, dB",
}


def draw_curve(results: Results, arrays: Arrays) -> Figure:
    """Hardness, alignment and size of the transform over the temperature, with the range over seeds."""
    figure, (row,) = grid(1, 3, 3.5)
    places = arrays["temperatures"]
    for (key, words), color in zip(HARDNESS.items(), COLORS, strict=False):
        _band(row[0], places, arrays[key] / arrays[key][:, :1], words, {"color": color, "lw": 2})
    looks = {
        "sim_initial": ("$K_0$", {"color": MUTED, "ls": DASHES, "lw": 1.6}),
        "sim_average": (r"$\bar{K}$", {"color": COLORS[0], "lw": 2}),
        "sim_final": ("$K_T$", {"color": INK, "lw": 1.6}),
        "sim_exact": ("$K_M$, exact model", {"color": COLORS[1], "lw": 1.6}),
    }
    for key, (words, look) in looks.items():
        _band(row[1], places, arrays[key], words, look)
    for key, words, color in (("size", "measured", COLORS[0]), ("size_exact", "exact model", COLORS[1])):
        for norm, style in (("nuclear", "-"), ("frobenius", ":")):
            values = arrays[f"{key}_{norm}"]
            _band(row[2], places, values / values[:, :1], f"{words}, {norm}", {"color": color, "lw": 2, "ls": style})
    titles = ("How poorly $K_0$ represents $y_τ$", "Alignment with $K_y$", r"Size of $M - I$")
    names = ("relative to the smooth target", "sim", "relative to the smooth target")
    for axis, title, name in zip(row, titles, names, strict=True):
        axis.set(xscale="log", xlabel="temperature τ  (smooth → sign)", ylabel=name)
        axis.set_xlim(places.max() * 1.3, places.min() / 1.3)
        axis.set_title(title, loc="left")
        axis.grid(axis="y", color=RULE, lw=0.5)
        axis.legend(loc="upper left", fontsize=7.5)
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.45 * (high - low))
    return figure


def draw_against(results: Results, arrays: Arrays) -> Figure:
    """Gain of alignment and size of the transform against each measure of hardness, one line per seed."""
    figure, axes = grid(2, len(HARDNESS), 5.4, sharex="col")
    for column, (hard, words) in zip(axes.T, HARDNESS.items(), strict=True):
        for axis, keys in zip(column, (("gain", "gain_exact"), ("size_nuclear", "size_exact_nuclear")), strict=True):
            relative = axis is column[1]
            for key, color, name in zip(keys, COLORS, (r"measured, $\bar{K}$", "exact model, $K_M$"), strict=False):
                values = arrays[key] / arrays[key][:, :1] if relative else arrays[key]
                for k, (x, y) in enumerate(zip(arrays[hard], values, strict=True)):
                    axis.plot(x, y, "o-", color=color, ms=4, lw=1, alpha=0.8, label=name if k == 0 else None)
            axis.grid(color=RULE, lw=0.5)
        column[1].set_xlabel(words)
    axes[0, 0].set_ylabel("gain of sim over $K_0$")
    axes[1, 0].set_ylabel("$M - I$, nuclear norm,\nrelative to the smooth target")
    axes[0, 0].legend(loc="best")
    return figure


def _band(axis: Axes, x: NDArray[np.floating], values: NDArray[np.floating], words: str, look: dict[str, Any]) -> None:
    axis.plot(x, values.mean(0), marker="o", ms=3, label=words, **look)
    axis.fill_between(x, values.min(0), values.max(0), color=look["color"], alpha=0.12, lw=0)


def _correlations(results: Results) -> Table:
    found = results["correlations"]
    rows: list[tuple[str, ...]] = [
        (words, *(_defined(found[hard][key]) for hard in HARDNESS)) for key, words in _AGAINST.items()
    ]
    note = f"Spearman’s ρ over {len(results['temperatures'])} temperatures, mean and standard deviation over seeds."
    return Table(("", *HARDNESS.values()), rows, note)


def _defined(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return spread(known, number) if len(known) == len(values) else "—"


def _measured(results: Results) -> Table:
    rows: list[tuple[str, ...]] = [
        (
            words,
            *(
                spread([row[k] for row in results["measured"][key]], number)
                for k in range(len(results["temperatures"]))
            ),
        )
        for key, words in _MEASURED.items()
    ]
    return Table(("", *(f"τ = {t:g}" for t in results["temperatures"])), rows)


def _verdict(results: Results) -> str:
    claims = results["claims"]
    answers = {"holds": "yes", "holds in part": "in part", "does not hold": "no"}
    questions = {
        "aligns": "does the trained kernel align more",
        "transform": "is the measured transform larger",
        "exact.size": "is the exact model’s transform larger",
        "exact.aligns": "does the exact model’s kernel align more",
    }
    found = [f"{words}: {answers[claims[key]['verdict']]}" for key, words in questions.items()]
    return f"Where K_0 represents the target more poorly, {'; '.join(found)}."


def _story(results: Results) -> Story:
    config = results["config"]
    return Story(
        title="Do features adapt more to harder targets?",
        lead="Students learn tanh(y/τ) of a teacher’s output y: a smooth target for large τ, its sign for small τ. The page "
        "compares how far their features adapt with how poorly the initial features represent the target.",
        verdict=_verdict(results),
        sections=(
            Section("curve", "From smooth to sign", (
                "The curves show, as the target becomes sharper, how poorly the initial features represent it and how far "
                "the features adapt. If both rise, harder targets come with more adaptation.",
                Shown("curve", "Hardness, alignment and transform size over the temperature",
                      "Over the temperature: how poorly K_0 represents the target, the alignment of the kernels with the "
                      "task, and the size of transforms. Bands are the range over seeds. Look for curves that rise "
                      "together."),
                _measured(results),
            )),
            Section("against", "Adaptation against representability", (
                "The figure plots adaptation against three measures of how poorly K_0 represents the target; rising lines "
                "mean more adaptation to harder targets. The measures are the RKHS norm of the target, its energy outside "
                "the ten leading eigenvectors, and the leave-one-out error of kernel interpolation.",
                Shown("against", "Gain of alignment and transform size against each measure of representability",
                      "One line per seed, starting at the smooth target. Look for lines that rise to the right."),
                _correlations(results),
            )),
            Section("made-of", "What was measured", (
                "These settings define the numbers above. "
                "Students and training are those of kernel-alignment; all targets have unit mean square. The measured "
                "transform is the two-sided M that best maps the initial to the average features (explain). The exact one "
                f"is that of TwoSided, λ = {config['strength']:g}, fitted to the same {config['kernel_samples']} digits. "
                "Sizes are of M − I, over both sides of all layers.",
            )),
        ),
    )  # fmt: skip


def _arrays(results: Results) -> list[str]:
    sims = [f"sim_{kind}" for kind in ("initial", "average", "final", "exact")]
    return ["temperatures", *HARDNESS, *sims, *(key for key in _AGAINST if key != "sharpness")]


PAGE = told({"curve": draw_curve, "against": draw_against}, _arrays, _story)
