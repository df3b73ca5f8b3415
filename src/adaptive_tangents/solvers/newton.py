"""A second-order step for the problem (E): conjugate gradients on the true curvature, in the null space of the constraints.

The preconditioner is the alternation's system, which uses the held transform's metric 2(MᵀM)⁻¹ in place of ∇²Ω̃. For squared
error, if the held transform is the best one for β, the first direction is the alternation's step; further directions
correct it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive_tangents.solvers.held_features import Coefficients, Vector
from adaptive_tangents.solvers.problem import Point, Problem, Reduced, System

_MOST = 200
_FORCING = 0.1
_FARTHEST, _SHORTEST = 1e6, 1e-6
_ENOUGH = 0.1  # a step lowers the objective by at least this share of what its slope promises


@dataclass(frozen=True)
class Direction:
    """A step d of β with φd and the number of products; ``path`` holds the iterates after 1, 2, 4, ... products.

    ``downhill`` is a direction of negative curvature, with its outputs; None if none was met.
    """

    step: Coefficients
    outputs: Vector
    products: int
    path: tuple[tuple[Coefficients, Vector], ...] = ()
    downhill: tuple[Coefficients, Vector] | None = None


def newton_direction(
    problem: Problem, system: System, point: Point, reduced: Reduced, stationarity: float, most: int = _MOST
) -> Direction:
    """Minimize the quadratic model at a point as closely as worthwhile, with at most so many products of the curvature.

    Negative curvature ends it too.
    """
    curvature, layout = point.solution.curvature, problem.held.layout
    assert curvature is not None
    gradient, slope = point.gradient, problem.loss.slope(point.outputs)
    step, outputs = torch.zeros_like(reduced.step), torch.zeros_like(reduced.outputs)
    along, along_outputs, size = reduced.step, reduced.outputs, reduced.size
    wanted = min(_FORCING, math.sqrt(stationarity)) ** 2 * size
    here = problem.loss.root(point.outputs)
    path: list[tuple[Coefficients, Vector]] = []
    for count in range(1, min(most, _MOST) + 1):
        with problem.timed("curvature"):
            bent = layout.join(curvature(layout.split(along)))
        pushed = _loss_curvature(problem, here, along_outputs)
        bend = float(along @ bent + along_outputs @ pushed)
        if not bend > 0:
            downhill = along, along_outputs
            if path:
                return Direction(step, outputs, count, tuple(path), downhill)
            return Direction(along, along_outputs, 1, downhill=downhill)
        length = size / bend
        step, outputs = step + length * along, outputs + length * along_outputs
        if count & (count - 1) == 0:
            path.append((step, outputs))
        gradient, slope = gradient + length * bent, slope + length * pushed
        reduced = problem.reduce(system, gradient, slope)
        if not reduced.size > wanted:
            break
        ratio, size = reduced.size / size, reduced.size
        along, along_outputs = reduced.step + ratio * along, reduced.outputs + ratio * along_outputs
    return Direction(step, outputs, count, tuple(path))


def _loss_curvature(problem: Problem, root: Tensor | None, x: Vector) -> Vector:
    """The loss's Hessian times φd; zero for constraints, where φd = 0."""
    if problem.loss.interpolates:
        return torch.zeros_like(x)
    if root is None:
        return 2 / problem.loss.ridge * x
    n, c = root.shape[:2]
    return (root @ (root.mT @ x.reshape(n, c, 1))).flatten()


def line_search(problem: Problem, point: Point, direction: Direction, plain: Reduced) -> tuple[Point, float]:
    """The first of d, d/2, d/4, ... that lowers the objective, with its length; else the best iterate on the path to d."""
    # Near the optimum, differences of the objective are rounding.
    slack = 1e-13 * abs(point.objective) if plain.size < 1e-11 * abs(point.objective) else 0.0

    def moved(step: Coefficients, outputs: Vector, length: float = 1.0) -> Point:
        return problem.point(point.vector + length * step, point.outputs + length * outputs)

    length = 1.0
    while length > 1e-2:
        candidate = moved(direction.step, direction.outputs, length)
        if candidate.objective <= point.objective + slack:
            if direction.downhill is None:
                return candidate, length
            return _furthest(problem, candidate, *direction.downhill), length
        length /= 2
    # The model is wrong about long steps but may be right about short ones: try those, and longer multiples of the best.
    # The held step, or if the metric is the curvature at this point, a part of it, surely lowers the objective.
    tried = [(moved(*step), step) for step in (*direction.path, (plain.step, plain.outputs))]
    part = 1.0
    while point.objective - tried[-1][0].objective < _ENOUGH * part * plain.size - slack and part > _SHORTEST:
        part /= 2
        step = part * plain.step, part * plain.outputs
        tried.append((moved(*step), step))
    best, step = min(tried, key=lambda pair: pair[0].objective)
    length = 2.0
    while length < _FARTHEST and (further := moved(*step, length)).objective < best.objective:
        best, length = further, 2 * length
    return (best, 0.0) if best.objective <= point.objective + slack else (point, 0.0)


def _furthest(problem: Problem, point: Point, step: Coefficients, outputs: Vector) -> Point:
    """Go along a step from a point, doubling its length while the objective falls."""
    best, length = point, 1.0
    while length < _FARTHEST:
        further = problem.point(point.vector + length * step, point.outputs + length * outputs)
        if not further.objective < best.objective:
            break
        best, length = further, 2 * length
    return best
