"""The page of kernel-spectra: eigenvalues, leading eigenvectors, their share of the target, and the diagonals."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adaptive_tangents.experiments.claims import spread
from adaptive_tangents.reporting.drawing import COLORS, DASHES, INK, MUTED, RULE, STAGES, fixed, grid, label, tint
from adaptive_tangents.reporting.pages import Section, Shown, Story, Table, counted, told
from adaptive_tangents.runs.results import Arrays, Results

KERNELS = {**STAGES, "adapted": "$K_M$"}
NAMES = {"initial": "K_0", "average": "K̄", "final": "K_T", "adapted": "K_M"}
_FLOOR = 1e-5
_ROWS = {
    "share": "leading eigenvalue, centered",
    "share_plain": "leading eigenvalue, not centered",
    "rank": "effective rank, not centered",
    "leading": "target in the leading eigenvector",
    "top": "target in the ten leading",
    "distance": "K(x, x) against distance, ρ",
    "diagonal": "K(x, x) against K_0(x, x), ρ",
}


def _look(kind: str, color: str) -> dict[str, Any]:
    looks: dict[str, dict[str, Any]] = {
        "initial": {"color": MUTED, "ls": DASHES, "lw": 1.6},
        "average": {"color": color, "lw": 2.2},
        "final": {"color": INK, "lw": 1.6},
        "adapted": {"color": COLORS[2], "lw": 1.6},
    }
    return looks[kind]


def _color(results: Results, target: str) -> str:
    return COLORS[list(results["targets"]).index(target)]


def draw_spectra(results: Results, arrays: Arrays) -> Figure:
    """Eigenvalues as shares of the trace, plain and centered: geometric means over seeds."""
    targets = list(results["targets"])
    figure, axes = grid(2, len(targets), 5.6, sharex=True, sharey=True)
    for column, target in zip(axes.T, targets, strict=True):
        for axis, (key, words) in zip(column, {"spectrum": "as they are", "centred": "centered"}.items(), strict=True):
            for kind in results["kernels"]:
                values = np.maximum(arrays[f"{target}.{kind}.{key}"], _FLOOR / 10)
                # Centering makes the last eigenvalue zero.
                curve = np.exp(np.log(values).mean(0))[: -1 if key == "centred" else None]
                look = _look(kind, _color(results, target))
                axis.plot(np.arange(1, len(curve) + 1), curve, label=KERNELS[kind], **look)
            axis.set(xscale="log", yscale="log", ylim=(_FLOOR, 1.3))
            axis.set_title(f"{label(target)} target, kernels {words}", color=_color(results, target), loc="left")
        column[0].legend(loc="lower left")
        column[-1].set_xlabel("index of the eigenvalue")
    for axis in axes[:, 0]:
        axis.set_ylabel("share of the trace")
    return figure


def draw_vectors(results: Results, arrays: Arrays) -> Figure:
    """The three leading eigenvectors of each centered kernel and the target over the teacher's output, first seed."""
    targets, kinds = list(results["targets"]), results["kernels"]
    figure, axes = grid(len(targets), len(kinds), 2.5 * len(targets) + 0.3, sharex=True, sharey=True)
    for row, target in zip(axes, targets, strict=True):
        y, color = arrays[f"{target}.teacher"][0], _color(results, target)
        wanted = arrays[f"{target}.target"][0] - arrays[f"{target}.target"][0].mean()
        for axis, kind in zip(row, kinds, strict=True):
            vectors = arrays[f"{target}.{kind}.vectors"][0]
            for k in reversed(range(len(vectors))):
                size, shade = (7, 1.0) if k == 0 else (3.5, 0.55 if k == 1 else 0.32)
                axis.scatter(y, vectors[k], s=size, color=tint(color, shade), lw=0, alpha=0.7, label=f"$v_{k + 1}$")
            axis.plot(y, wanted / np.sqrt(np.mean(wanted**2)), color=INK, lw=1, label="target")
            held = results["over_seeds"][f"{target}.leading.{kind}"][0]
            axis.set_title(f"{KERNELS[kind]}: $v_1$ holds {fixed(held)}", loc="left", fontsize=9.5, fontweight="normal")
            axis.set_ylim(-4, 4)
        row[0].set_ylabel(f"{label(target)} target\neigenvectors", color=color)
        row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), markerscale=1.8, handletextpad=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("teacher’s output $y$")
    return figure


def draw_energy(results: Results, arrays: Arrays) -> Figure:
    """The share of the target in the leading eigenvectors of each centered kernel, with the range over seeds."""
    targets = list(results["targets"])
    figure, (row,) = grid(1, len(targets), 3.2, sharey=True)
    for axis, target in zip(row, targets, strict=True):
        for kind in results["kernels"]:
            values, look = arrays[f"{target}.{kind}.energy"], _look(kind, _color(results, target))
            count = np.arange(1, values.shape[1] + 1)
            axis.plot(count, values.mean(0), label=KERNELS[kind], **look)
            axis.fill_between(count, values.min(0), values.max(0), color=look["color"], alpha=0.12, lw=0)
        axis.set(xscale="log", xlabel="leading eigenvectors", ylim=(None, 1.01))
        axis.set_title(f"{label(target)} target", color=_color(results, target), loc="left")
        axis.grid(axis="y", color=RULE, lw=0.5)
        axis.legend(loc="lower right")
    row[0].set_ylabel("share of the target")
    return figure


def draw_diagonals(results: Results, arrays: Arrays) -> Figure:
    """Diagonal against diagonal, first seed, colored by the distance from the boundary."""
    targets = list(results["targets"])
    pairs = (("initial", "average"), ("initial", "final"), ("average", "final"), ("initial", "adapted"))
    figure, axes = grid(len(targets), len(pairs), 2.5 * len(targets) + 0.3)
    for row, target in zip(axes, targets, strict=True):
        distance = np.abs(arrays[f"{target}.teacher"][0])
        for axis, (first, second) in zip(row, pairs, strict=True):
            x, y = (arrays[f"{target}.{kind}.diagonal"][0] for kind in (first, second))
            points = axis.scatter(x, y, c=distance, s=8, lw=0, cmap="viridis", vmin=0, vmax=1)
            axis.set_xlabel(f"{KERNELS[first]}$(x, x)$", labelpad=1)
            axis.set_ylabel(f"{KERNELS[second]}$(x, x)$", labelpad=2)
            _line(axis, x, y)
        row[0].set_title(f"{label(target)} target", color=_color(results, target), loc="left")
        figure.colorbar(points, ax=row[-1], label="distance $|y|$")
    return figure


def _line(axis: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Draw the line where the second kernel is the first times one factor."""
    ends = np.array([x.min(), x.max()])
    axis.plot(ends, ends * (x @ y) / (x @ x), color=MUTED, lw=1, ls=DASHES)


def _table(results: Results, target: str) -> Table:
    found = results["over_seeds"]
    rows: list[tuple[str, ...]] = []
    for key, words in _ROWS.items():
        cells = [found.get(f"{target}.{key}.{kind}") for kind in results["kernels"]]
        rows.append((words, *(spread(v, ".1f" if key == "rank" else ".2f") if v else "—" for v in cells)))
    decibels = found[f"{target}.path_error_db"]
    note = (
        f"{label(target).capitalize()} target. The relative error of the path average is −{np.mean(decibels):.0f} dB."
    )
    return Table(("", *(NAMES[kind] for kind in results["kernels"])), rows, note)


def _verdict(results: Results) -> str:
    claims = results["claims"]
    answers = {"holds": "yes", "holds in part": "in part", "does not hold": "no"}
    questions = {
        "share": "does the leading share of the centered kernel’s trace grow",
        "leading": "does that eigenvector turn toward the target",
        "hard": "do the leading ten gain more for the sign",
        "adapted": "does the exact model do the same",
    }
    found = [f"{words}: {answers[claims[key]['verdict']]}" for key, words in questions.items()]
    return f"In training, {'; '.join(found)}."


def _story(results: Results) -> Story:
    config, targets = results["config"], list(results["targets"])
    n, seeds = config["kernel_samples"], counted(config["seeds"], "seed")
    tables = [_table(results, target) for target in targets]
    return Story(
        title="Which part of the kernel does training change?",
        lead=f"The page compares the spectra of tangent kernels on {n} digits: initial, averaged over the path, final, and "
        "of the exact two-sided model, for a smooth target and for its sign.",
        verdict=_verdict(results),
        sections=(
            Section("spectra", "Eigenvalues", (
                "The curves show which eigenvalues grow in training, plain and centered; eigenvalues that rise mark the "
                "directions that training strengthens. A ReLU network’s features share a mean over the digits, so the "
                "leading eigenvector of each plain kernel is nearly constant, and its eigenvalue measures that mean. The "
                "centered kernel HKH, H = I − 11ᵀ/n, shows what tells the digits apart.",
                Shown("spectra", "Eigenvalues of the four kernels in shares of the trace, plain and centered",
                      f"Eigenvalues as shares of the trace, geometric means over {seeds}. Look for one or two leading "
                      "eigenvalues that rise above K_0’s while the rest keeps its slope."),
                *tables,
            )),
            Section("vectors", "Leading eigenvectors", (
                "The figures show whether the kernels’ leading eigenvectors turn toward the target, which means that the "
                "kernel learns the target as its main direction.",
                Shown("vectors", "The leading eigenvectors of the centered kernels over the teacher’s output",
                      "The three leading eigenvectors of the centered kernels and the target over the teacher’s output, for "
                      "the first seed, all of unit mean square. Look for the first vector becoming the target."),
                Shown("energy", "The share of the target in the leading eigenvectors, for each kernel",
                      "How much of the target lies in the leading eigenvectors of the centered kernels; bands are the range "
                      "over seeds. Look for where K_M lies between K_0 and K̄."),
            )),
            Section("diagonals", "Diagonals", (
                "The figure compares the kernels’ diagonals sample by sample: samples above the line gained more.",
                Shown("diagonals", "Diagonals of the kernels against each other, sample by sample",
                      "K(x, x) of one kernel against another, first seed. The color is the distance of the teacher’s output "
                      "from zero; the dashed line is one factor for all. Look for samples near the boundary above it."),
            )),
            Section("made-of", "What was measured", (
                "These settings define the numbers above. "
                "Students, targets and training are those of kernel-alignment. K_M is that of TwoSided with Quadratic "
                f"penalties, λ = {config['strength']:g}, interpolating the same digits.",
            )),
        ),
    )  # fmt: skip


def _arrays(results: Results) -> list[str]:
    keys = ("spectrum", "centred", "energy", "vectors", "diagonal")
    return [
        *(f"{target}.{key}" for target in results["targets"] for key in ("target", "teacher")),
        *(f"{target}.{kind}.{key}" for target in results["targets"] for kind in results["kernels"] for key in keys),
    ]


PAGE = told(
    {"spectra": draw_spectra, "vectors": draw_vectors, "energy": draw_energy, "diagonals": draw_diagonals},
    _arrays,
    _story,
)
