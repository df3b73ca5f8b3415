"""A second-order step for the problem (E): conjugate gradients on the true curvature, in the space the constraints leave.

The preconditioner is the system of the alternation, which is exact for the metric 2(MᵀM)⁻¹ that the held transform gives in
place of ∇²Ω̃. For squared error, while that transform is the best one for β, the first direction is the alternation's own
step; each further one corrects it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive_tangents.model import Point, Problem, Reduced, System, Vector, plus, product
from adaptive_tangents.structures import Matrices

_MOST = 200
_FORCING = 0.1


@dataclass(frozen=True)
class Direction:
    """A step d of β with φd, after how many products, and whether negative curvature ended the search for it."""

    step: dict[str, Tensor]
    outputs: Vector
    products: int
    truncated: bool


def newton_direction(
    problem: Problem, system: System, point: Point, reduced: Reduced, stationarity: float
) -> Direction:
    """Minimise the quadratic model at a point as closely as is worth while, up to where it curves downwards."""
    curvature: Callable[[Matrices], dict[str, Tensor]] | None = point.solution.curvature
    assert curvature is not None
    gradient, slope = dict(point.solution.gradient), problem.loss.slope(point.outputs)
    step = {name: torch.zeros_like(x) for name, x in reduced.step.items()}
    outputs = torch.zeros_like(reduced.outputs)
    along, along_outputs, size = reduced.step, reduced.outputs, reduced.size
    wanted = min(_FORCING, math.sqrt(stationarity)) ** 2 * size
    here = problem.loss.root(point.outputs)
    for count in range(1, _MOST + 1):
        with problem.timed("curvature"):
            bent = curvature(along)
        pushed = _loss_curvature(problem, here, along_outputs)
        bend = product(along, bent) + float(along_outputs @ pushed)
        if not bend > 0:
            return Direction(step, outputs, count, True) if count > 1 else Direction(along, along_outputs, 1, True)
        length = size / bend
        step, outputs = plus(step, length, along), outputs + length * along_outputs
        gradient, slope = plus(gradient, length, bent), slope + length * pushed
        reduced = problem.reduce(system, gradient, slope)
        if not reduced.size > wanted:
            break
        ratio, size = reduced.size / size, reduced.size
        along, along_outputs = plus(reduced.step, ratio, along), reduced.outputs + ratio * along_outputs
    return Direction(step, outputs, count, False)


def _loss_curvature(problem: Problem, root: Tensor | None, x: Vector) -> Vector:
    """The loss's Hessian times φd, zero for constraints, which φd = 0 meets."""
    if problem.loss.interpolates:
        return torch.zeros_like(x)
    if root is None:
        return 2 / problem.loss.ridge * x
    n, c = root.shape[:2]
    return (root @ (root.mT @ x.reshape(n, c, 1))).flatten()


def line_search(problem: Problem, point: Point, direction: Direction, plain: Reduced) -> tuple[Point, float]:
    """The first of d, d/2, d/4, ... that lowers the objective, else the held system's step if it does, and its length."""
    # Below this, differences of the objective are rounding.
    slack = 1e-13 * abs(point.objective) if plain.size < 1e-11 * abs(point.objective) else 0.0
    length = 1.0
    while length > 1e-2:
        candidate = problem.point(
            plus(point.coefficients, length, direction.step), point.outputs + length * direction.outputs
        )
        if candidate.objective <= point.objective + slack:
            return candidate, length
        length /= 2
    candidate = problem.point(plus(point.coefficients, 1.0, plain.step), point.outputs + plain.outputs)
    return (candidate, 0.0) if candidate.objective <= point.objective + slack else (point, 0.0)
