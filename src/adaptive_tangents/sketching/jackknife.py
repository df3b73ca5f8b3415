"""The error and bias of a measure by the jackknife over repetitions of a sketch (Efron & Stein, Ann. Stat. 1981)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SketchedMeasure:
    """A measure of a sketched kernel, with its error.

    Attributes:
        value, standard_error, bias: the measure of the estimate, its standard error, and its bias.
        repetitions: the number of repetitions they are from.
    """

    value: float
    standard_error: float
    bias: float
    repetitions: int

    @property
    def corrected(self) -> float:
        """The value minus its bias."""
        return self.value - self.bias


def jackknifed(value: float, others: Sequence[float]) -> SketchedMeasure:
    """A measure from all R repetitions, and from all but each: √((R − 1)/R Σ_r(v_r − v̄)²) and (R − 1)(v̄ − v)."""
    count, mean = len(others), sum(others) / len(others)
    error = math.sqrt((count - 1) / count * sum((v - mean) ** 2 for v in others))
    return SketchedMeasure(value, error, (count - 1) * (mean - value), count)
