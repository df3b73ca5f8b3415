"""The claims of lora-ranks: each statement, what would refute it, and its verdict from the numbers of all seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptive_tangents.experiments.claims import Verdict, claim, rank_correlation, spread

ADVISED = {
    "weights": "the change of weights of full fine-tuning",
    "outputs": "what full fine-tuning does to the outputs",
    "forecast": "the change foretold before training",
}
AGREES = 0.5  # of two rankings of the layers
ERRORS = 2.0  # standard errors that a mean difference must exceed

Seeds = Sequence[Mapping[str, Any]]
Claims = dict[str, dict[str, Any]]


def claims(seeds: Seeds, budgets: Sequence[int]) -> Claims:
    """Every claim about what was measured, in words, with its verdict and numbers."""
    made: Claims = {}
    for budget in budgets:
        for arm, words in ADVISED.items():
            made[f"lower.{arm}.{budget}"] = _lower(seeds, arm, words, budget)
    made |= _fewer(seeds) | _foretold(seeds, budgets)
    return made


def differences(seeds: Seeds, arm: str, budget: int) -> np.ndarray:
    """Uniform rank's held-out loss minus that of advised ranks, by seed: positive where advice is better."""
    return np.array([e["arms"][f"uniform.{budget}"]["loss"] - e["arms"][f"{arm}.{budget}"]["loss"] for e in seeds])


def standing(values: np.ndarray) -> Verdict:
    """Whether a mean difference is above zero by two standard errors; a single seed shows none."""
    clear = len(values) > 1 and values.mean() > ERRORS * values.std(ddof=1) / len(values) ** 0.5
    return "holds" if clear else "does not hold"


def _lower(seeds: Seeds, arm: str, words: str, budget: int) -> dict[str, Any]:
    gain = differences(seeds, arm, budget)
    uniform, advised = ([e["arms"][f"{of}.{budget}"] for e in seeds] for of in ("uniform", arm))
    losses = [spread([each["loss"] for each in of], ".3f") for of in (uniform, advised)]
    accuracies = [spread([100 * each["accuracy"] for each in of], ".1f") for of in (uniform, advised)]
    wins = int((gain > 0).sum())
    verdict = standing(gain)
    return claim(
        f"With the parameters of rank {budget} in every layer, adapters whose ranks follow {words} have a lower held-out "
        "loss than uniform rank",
        verdict,
        refuted_by=f"a mean difference over seeds that is not above zero by {ERRORS:g} standard errors",
        evidence=(
            f"uniform {losses[0]}, advised {losses[1]}; difference {spread(gain, '.3f')}, lower in {wins} of {len(gain)} "
            f"seeds; accuracy {accuracies[0]}% and {accuracies[1]}%"
        ),
        why="" if verdict == "holds" else "the difference is within the scatter over seeds" if gain.mean() > 0
        else "uniform rank has the lower loss",
    )  # fmt: skip


def median_ranks(seeds: Seeds, arm: str) -> list[float]:
    """The median over layers of the rank that holds 90% of the change, by seed."""
    return [float(np.median(list(each["ranks"][f"{arm}.share"].values()))) for each in seeds]


def _fewer(seeds: Seeds) -> Claims:
    plain, by_outputs = median_ranks(seeds, "weights"), median_ranks(seeds, "outputs")
    lower = [b < a for a, b in zip(plain, by_outputs, strict=True)]
    return {"fewer": claim(
        "What full fine-tuning changes in the outputs takes fewer ranks than what it changes in the weights",
        all(lower),
        refuted_by="a seed in which 90% of the change takes as many ranks in the median layer",
        evidence=f"90% in the median layer: rank {spread(plain, '.0f')} of the weights, {spread(by_outputs, '.0f')} weighed "
        "by the outputs",
        published="updates have a low intrinsic rank (Hu and others 2021)",
    )}  # fmt: skip


def agreements(seeds: Seeds, budget: int) -> list[float]:
    """Rank correlation over layers of the ranks from the forecast with those by what full fine-tuning did to the outputs."""
    return [
        rank_correlation(*(list(each["ranks"][f"{arm}.{budget}"].values()) for arm in ("forecast", "outputs")))
        for each in seeds
    ]


def _foretold(seeds: Seeds, budgets: Sequence[int]) -> Claims:
    made = {}
    for budget in budgets:
        found = agreements(seeds, budget)
        known = [value for value in found if value == value]
        made[f"foretold.{budget}"] = claim(
            f"The forecast puts the parameters of rank {budget} into the layers where full fine-tuning needs them",
            len(known) == len(found) and float(np.mean(known)) > AGREES,
            refuted_by=f"a mean rank correlation of the layers' ranks of {AGREES:g} or less",
            evidence=f"rank correlation {spread(known)} with ranks by what full fine-tuning does to the outputs"
            if known else "the ranks of all layers are equal",
        )  # fmt: skip
    return made
