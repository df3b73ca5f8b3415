"""Derivatives by finite differences, with error bounds from step and rounding."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Weights of the three- and five-point rules at multiples -2 … 2 of the step, by order of the derivative.
RULES = {
    1: ((0, -1 / 2, 0, 1 / 2, 0), (1 / 12, -8 / 12, 0, 8 / 12, -1 / 12)),
    2: ((0, 1, -2, 1, 0), (-1 / 12, 16 / 12, -30 / 12, 16 / 12, -1 / 12)),
}


class Estimate(NamedTuple):
    """A derivative at 0, and for each entry the largest error it may have."""

    value: Tensor
    error: Tensor

    def check(self, found: Tensor | float) -> None:
        """Fail if ``found`` is off by more than the error."""
        gap = (torch.as_tensor(found, dtype=torch.float64).reshape(self.value.shape) - self.value).abs()
        assert bool((gap <= self.error).all()), f"{found} where differences give {self.value} ± {self.error}"


def derivative(
    function: Callable[[Tensor], Tensor | float],
    step: float,
    *,
    rounding: float = 1e-14,
    least: float = 0.0,
    order: int = 1,
    at_once: bool = False,
) -> Estimate:
    """f′(0), or f″(0) with ``order=2``, from five points; ``at_once`` passes them to an elementwise f as one vector.
    Then f may also have several values at each point, (5, …): one derivative for each.

    Truncation: the five-point rule has error O(step⁴), the three-point rule O(step²), so their difference exceeds the error
    of the first. If f″ jumps by J nearby, the five-point rule for f′ is off by up to J·step/6, at most twice their
    difference; three times is allowed.
    Rounding: each value is off by ``rounding`` times the largest value (of its derivative if there are several), or times
    ``least`` if larger.
    """
    points = step * torch.arange(-2, 3, dtype=torch.float64)
    if at_once:
        values = torch.as_tensor(function(points))
    else:
        made = [torch.as_tensor(function(t), dtype=torch.float64) for t in points if t != 0 or order == 2]
        values = torch.stack(made if order == 2 else [*made[:2], torch.zeros_like(made[0]), *made[2:]])
    three, five = (
        torch.tensordot(torch.tensor(rule, dtype=torch.float64), values, 1) / step**order for rule in RULES[order]
    )
    passed_on = sum(map(abs, RULES[order][1])) / step**order
    largest = values.abs().amax(0) if at_once else values.abs().max()
    return Estimate(five, 3 * (five - three).abs() + passed_on * rounding * largest.clamp_min(least))
