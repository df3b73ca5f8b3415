"""Derivatives by differences, and how far off those may be: what step and rounding say."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Rules of three and of five points at multiples -2 … 2 of the step, by order of the derivative.
RULES = {
    1: ((0, -1 / 2, 0, 1 / 2, 0), (1 / 12, -8 / 12, 0, 8 / 12, -1 / 12)),
    2: ((0, 1, -2, 1, 0), (-1 / 12, 16 / 12, -30 / 12, 16 / 12, -1 / 12)),
}


class Estimate(NamedTuple):
    """A derivative at 0, and for each entry the largest error it may have."""

    value: Tensor
    error: Tensor

    def check(self, found: Tensor | float) -> None:
        """Fail where what was found is further off than the error."""
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
    """f′(0), or f″(0) with ``order=2``, by five points, which ``at_once`` gives to an elementwise f as a vector.

    Truncation: the rule of five is off by O(step⁴), the rule of three by O(step²), so the two differ by more than the
    first is off. Where f″ jumps by J within reach, f′ by the rule of five is off by up to J·step/6, and then by at most
    twice what the two differ by: three times is allowed.
    Rounding: values off by ``rounding`` of the largest of them, or of ``least`` where that is more, times the weights.
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
    return Estimate(five, 3 * (five - three).abs() + passed_on * rounding * values.abs().max().clamp_min(least))
