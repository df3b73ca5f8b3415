"""The claims of hard-targets: each statement, what would refute it, and its verdict from rank correlations."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from adaptive_tangents.experiments.claims import Verdict, claim, rank_correlation, spread

# Three measures of how poorly K_0 represents a target; larger is worse.
HARDNESS = {"rkhs_norm": "RKHS norm", "energy_outside": "energy outside", "leave_one_out": "leave-one-out error"}
# Quantities grow together if their rank correlation, mean over seeds, is at least this.
STRONG = 0.7
AGAINST = ("gain", "size_nuclear", "size_frobenius", "gain_exact", "size_exact_nuclear", "size_exact_frobenius")


def correlations(
    arrays: Mapping[str, Float[np.ndarray, "seeds k"]], temperatures: tuple[float, ...]
) -> dict[str, dict[str, list[float]]]:
    """Spearman's correlation over temperatures of each hardness with the sharpness 1/τ, gains and sizes."""
    sharp = 1 / np.array(temperatures)
    return {
        hard: {"sharpness": [rank_correlation(sharp, row) for row in arrays[hard]]}
        | {key: [rank_correlation(*rows) for rows in zip(arrays[hard], arrays[key], strict=True)] for key in AGAINST}
        for hard in HARDNESS
    }


def claims(
    arrays: Mapping[str, np.ndarray], found: Mapping[str, Mapping[str, list[float]]]
) -> dict[str, dict[str, Any]]:
    """Every claim in words, its verdict, and the numbers behind it."""
    nuance = "aligns more where the target is poorly represented by the initial features"
    sentences = {
        "premise": ("The sharper the target, the more poorly K_0 represents it", "sharpness", "premise of the nuance"),
        "aligns": ("The more poorly K_0 represents the target, the more sim(K̄, K_y) gains over K_0", "gain", nuance),
        "transform": ("… the larger the two-sided transform from initial to average features", "size_nuclear", None),
        "exact.size": ("… the larger M − I of the exact two-sided model", "size_exact_nuclear", "theory"),
        "exact.aligns": ("… the more the exact model’s K_M gains", "gain_exact", None),
    }
    made = {}
    for key, (text, against, published) in sentences.items():
        text = text.replace("…", "The more poorly K_0 represents the target,")
        series = arrays.get(against)
        beside = ("forecast.hard",) if key == "exact.aligns" else ()
        made[key] = _together(text, {hard: found[hard][against] for hard in HARDNESS}, series, published, beside)
    gain = arrays["gain"]
    made["ends"] = claim(
        "The sign’s alignment gains more than the smooth target’s",
        bool((gain[:, -1] > gain[:, 0]).all()),
        refuted_by="a seed in which it does not",
        published="0.40 against 0.17",
        evidence=f"gains {spread(gain[:, -1])} against {spread(gain[:, 0])}",
    )
    return made


def _together(
    text: str,
    found: Mapping[str, list[float]],
    values: np.ndarray | None,
    published: str | None,
    beside: tuple[str, ...],
) -> dict[str, Any]:
    """A claim that something grows with each of the three measures of hardness."""
    means = {hard: float(np.mean(of_seeds)) for hard, of_seeds in found.items()}
    strong = [hard for hard, mean in means.items() if mean >= STRONG]
    verdict: Verdict = "holds" if len(strong) == len(means) else "holds in part" if strong else "does not hold"
    parts = [
        f"{HARDNESS[hard]}: ρ {f'= {spread(of_seeds)}' if np.isfinite(means[hard]) else 'is not defined'}"
        for hard, of_seeds in found.items()
    ]
    if values is not None:
        parts.append(f"from {spread(values[:, 0])} (smooth) to {spread(values[:, -1])} (sign)")
    return claim(
        text,
        verdict,
        refuted_by=f"a rank correlation over temperatures below {STRONG:g}, mean over seeds, by all three measures",
        published=published,
        evidence="; ".join(parts),
        why="" if verdict == "holds" else f"not by {', '.join(HARDNESS[hard] for hard in means if hard not in strong)}",
        beside=beside,
    )
