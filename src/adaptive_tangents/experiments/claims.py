"""The building blocks of claims: a statement with its verdict, numbers over seeds in words, rank correlation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy.stats import rankdata

from adaptive_tangents.runs.record import flatten

Verdict = Literal["holds", "holds in part", "does not hold"]


def claim(
    text: str,
    verdict: bool | Verdict,
    *,
    refuted_by: str,
    evidence: str,
    published: str | None = None,
    why: str = "",
    beside: tuple[str, ...] = (),
) -> dict[str, Any]:
    """A claim in words, what would refute it, what was published, what was measured, and whether it holds.

    ``beside`` names claims of other studies, STUDY.CLAIM, that are to be read with it.

    >>> claim("1 < 2", 1 < 2, refuted_by="1 not below 2", evidence="1, 2")["verdict"]
    'holds'
    """
    if isinstance(verdict, bool):
        verdict = "holds" if verdict else "does not hold"
    return {
        "claim": text,
        "holds": verdict == "holds",
        "verdict": verdict,
        "evidence": evidence,
        "refuted_by": refuted_by,
        "published": published,
        "why": why,
        **({"beside": list(beside)} if beside else {}),
    }


def spread(values: "list[float] | np.ndarray", form: str | Callable[[float], str] = ".2f") -> str:
    """Mean and standard deviation over seeds in words; a single value is shown alone.

    ``form`` is a format or a function from a number to its text.

    >>> spread([0.1, 0.2, 0.3]), spread([0.1234]), spread([1.0, 3.0], lambda value: f"{value:g} dB")
    ('0.20 ± 0.10', '0.12', '2 dB ± 1.41421 dB')
    """
    values = np.asarray(values, dtype=float)
    parts = values.mean(), *((values.std(ddof=1),) if len(values) > 1 else ())
    shown = [form(float(part)) if callable(form) else f"{part:{form}}" for part in parts]
    return " ± ".join(shown).replace("-", "−")


def rank_correlation(a: "list[float] | np.ndarray", b: "list[float] | np.ndarray") -> float:
    """Spearman's correlation, with mean ranks for ties; NaN if one side is constant or has fewer than two values.

    >>> round(rank_correlation([1.0, 2.0, 3.0], [10.0, 1000.0, 20.0]), 6)
    0.5
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def over_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The values over runs of every number that all runs have, by its path."""
    flat = [flatten(numbers) for numbers in runs]
    shared = [key for key in flat[0] if all(numbers.get(key) is not None for numbers in flat)]
    return {key: [float(numbers[key] or 0.0) for numbers in flat] for key in shared}
