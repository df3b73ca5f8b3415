"""The page of kernel-alignment: the answer in words, and the arrays of its figures."""

from collections.abc import Mapping
from typing import Any

from adaptive_tangents.experiments.claims import spread
from adaptive_tangents.experiments.kernel_alignment import figures
from adaptive_tangents.reporting import drawing
from adaptive_tangents.reporting.frame import study_tiles
from adaptive_tangents.reporting.pages import Page, number
from adaptive_tangents.reporting.pages import fixed as _fixed
from adaptive_tangents.runs.results import Results

# A smaller change of alignment counts as none.
_NOTICEABLE = 0.02
HEADLINE = (
    "alignment.initial",
    "alignment.average",
    "alignment.final",
    "diagonal.near",
    "diagonal.far",
    "diagonal_ratio",
)

_LABELS = {
    "alignment.initial": "sim(K_0, K_y)",
    "alignment.average": "sim(K̄, K_y)",
    "alignment.final": "sim(K_T, K_y)",
    "diagonal.near": "mean K̄(x, x) near the boundary",
    "diagonal.far": "mean K̄(x, x) far from the boundary",
    "diagonal_ratio": "K̄(x, x), near over far",
    "path_error_db": "accuracy of the path average, dB",
}


def _alignment_arrays(results: Results) -> list[str]:
    kernels = [f"kernel.{name}" for name in ("initial", "average", "final", "adapted")]
    spectra = [f"singular_values.network.{block}" for block in results["blocks"]]
    path = ["linearization.positions", "linearization.error", "training.loss", "place"]
    return [
        f"{t}.{name}" for t in results["targets"] for name in ("teacher", "change", "images", *kernels, *spectra, *path)
    ]


def _alignment_context(results: Results) -> dict[str, Any]:
    """The words that depend on the numbers: the answer, and which target K_0 represents worse by how many measures."""
    targets = results["targets"]
    worse, votes = _represented_worse(targets)
    verdict, answer = _answer(targets, worse, votes)
    data = results["data"]["name"]
    command = results.get("command", f"adaptive-tangents reproduce {results['experiment']} --data {data}")
    turns = _turns(targets)
    return {
        "verdict": verdict, "answer": answer, "worse": worse, "votes": votes, "command": command, "turns": turns,
        "tiles_shown": study_tiles(results),
        "spread": _spread_table(results), "structures": figures.STRUCTURES,
        "model_name": figures.model_name,
    }  # fmt: skip


_SPREAD = {
    "alignment.initial": "sim(K_0, K_y)",
    "alignment.average": "sim(K̄, K_y)",
    "alignment.final": "sim(K_T, K_y)",
    "diagonal_ratio": "K̄(x, x), near over far",
    "representability.leave_one_out_rmse": "leave-one-out error with K_0",
    "linearization_error": "error of the initial linearization at the end",
    "place.near": "point of the path where K_s(x, x) passes K̄(x, x), near",
    "place.far": "the same, far",
    "network.test_error": "network, wrong sign in test",
}


def _spread_table(results: Results) -> list[tuple[str, list[str]]]:
    """Mean and standard deviation over seeds of main numbers and layers' alignments, one column per target."""
    rows = _SPREAD | {
        f"block.{block}.alignment.{stage}": f"sim of {drawing.label(block)}’s part, {word}"
        for block in results["blocks"]
        for stage, word in (("initial", "initial"), ("average", "average"), ("final", "final"))
    }
    found = results["over_seeds"]
    return [
        (name, [_mean_spread(found.get(f"{target}.{key}")) for target in results["targets"]])
        for key, name in rows.items()
    ]


def _mean_spread(values: list[float] | None) -> str:
    return spread(values, number) if values else number(None)


def _turns(targets: Mapping[str, Any]) -> list[str]:
    """How far the exact models turn the kernel, for each structure and target, at the strength that turns it most."""
    sentences = []
    for structure in ("Full", "TwoSided"):
        parts = []
        for name, target in targets.items():
            fits = [m for m in target["model"].values() if m["structure"] == structure and m["alignment"] is not None]
            start = target["alignment"]["initial"]
            if fits and start is not None:
                best = max(fits, key=lambda fit: fit["alignment"])
                parts.append(
                    f"{number(best['alignment'])} at λ = {best['strength']:g} for the {drawing.label(name)} target "
                    f"(K_0: {number(start)})"
                )
        if parts:
            sentences.append(f"{structure} raises sim(K_M, K_y) to at most {' and '.join(parts)}.")
    return sentences


def _represented_worse(targets: Mapping[str, Any]) -> tuple[str | None, int]:
    """The target that K_0 represents worse by most of the three measures, and by how many."""
    if len(targets) != 2:
        return None, 0
    first, second = targets
    votes = {first: 0, second: 0}
    for measure, larger_is_worse in (("rkhs_norm", True), ("top10_energy", False), ("leave_one_out_rmse", True)):
        a, b = (targets[target]["representability"][measure] for target in (first, second))
        if a is not None and b is not None and a != b:
            votes[first if (a > b) == larger_is_worse else second] += 1
    worse = max(votes, key=votes.__getitem__)
    return (worse, votes[worse]) if votes[worse] >= 2 else (None, 0)


def _answer(targets: Mapping[str, Any], worse: str | None, votes: int) -> tuple[str, list[str]]:
    """Whether the claim holds in these numbers: a verdict and a few sentences."""
    change = {t: (n["alignment"]["initial"], n["alignment"]["average"]) for t, n in targets.items()}
    gains: dict[str | None, float] = {t: end - start for t, (start, end) in change.items() if None not in (start, end)}
    if not gains:
        return "Unanswered: the alignment could not be measured in this run.", []
    turned = [target for target in targets if gains.get(target, 0) > _NOTICEABLE]
    other = next((t for t in targets if t != worse), None)
    compared = worse in gains and other in gains
    more = compared and gains[worse] > gains[other]
    if not turned:
        verdict = "No: in this run training does not turn the kernel toward the task."
    elif len(turned) < len(targets):
        verdict = f"In part: the kernel turns toward the task for the {' and '.join(turned)} target only."
    elif compared:
        verdict = f"Yes, {'and' if more else 'but not'} more if the initial features represent the target poorly."
    else:
        verdict = "Yes: in this run training turns the kernel toward the task."
    parts = " and ".join(
        f"{_fixed(end)} for the {drawing.label(t)} target "
        f"({'up' if end > start else 'down'} from {_fixed(start)} at the start)"
        for t, (start, end) in change.items()
        if t in gains
    )
    sentences = [f"The kernel’s alignment with the task, averaged over the path of training, sim(K̄, K_y), is {parts}."]
    if compared:
        sentences.append(
            f"By {'all' if votes == 3 else 'two of'} three measures, K_0 represents the {worse} target worse, and its "
            f"alignment rises {'more' if more else 'no more'} than the other’s: by {_fixed(gains[worse])} against "
            f"{_fixed(gains[other])}."
        )
    ratios = {t: n["diagonal_ratio"] for t, n in targets.items() if n["diagonal_ratio"] is not None}
    if ratios:
        sizes = " and ".join(f"{_fixed(ratio)} times for the {drawing.label(t)} target" for t, ratio in ratios.items())
        sentences.append(f"Near the teacher’s sign change K̄(x, x) is {sizes} what it is far from it.")
    return verdict, sentences


PAGE = Page(
    template="experiments/kernel_alignment/page.html.j2",
    figures={
        "kernels": figures.draw_kernels,
        "diagonal": figures.draw_diagonal,
        "digits": figures.draw_digits,
        "layers": figures.draw_layers,
        "decomposition": figures.draw_decomposition,
        "path": figures.draw_path,
        "places": figures.draw_places,
        "spectra": figures.draw_spectra,
        "models": figures.draw_models,
        "explain": figures.draw_explain,
    },
    arrays=_alignment_arrays,
    context=_alignment_context,
    headline=HEADLINE,
    labels=_LABELS,
)
