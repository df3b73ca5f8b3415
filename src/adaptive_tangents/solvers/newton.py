"""A second-order step for the problem (E): conjugate gradients on the true curvature, in the null space of the constraints.

The preconditioner is the alternation's system, which uses the held transform's metric 2(MᵀM)⁻¹ in place of ∇²Ω̃. For squared
error, if the held transform is the best one for β, the first direction is the alternation's step; further directions
correct it.
"""

import math
from collections.abc import Callable
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
    """A step d of β and the number of products; ``path`` holds the iterates after 1, 2, 4, ... products.

    ``downhill`` is a direction of negative curvature; None if none was met.
    """

    step: Coefficients
    products: int
    path: tuple[Coefficients, ...] = ()
    downhill: Coefficients | None = None


def newton_direction(
    problem: Problem, system: System, point: Point, reduced: Reduced, stationarity: float, most: int = _MOST
) -> Direction:
    """Minimize the quadratic model at a point as closely as worthwhile, with at most so many products of the curvature.

    Negative curvature ends it too.
    """
    curvature, layout = point.solution.curvature, problem.held.layout
    assert curvature is not None
    gradient, slope = point.gradient, problem.loss.slope(point.outputs)
    step = torch.zeros_like(reduced.step)
    along, along_outputs, size = reduced.step, reduced.outputs, reduced.size
    wanted = min(_FORCING, math.sqrt(stationarity)) ** 2 * size
    here = problem.loss.root(point.outputs)
    path: list[Coefficients] = []
    for count in range(1, min(most, _MOST) + 1):
        with problem.timed("curvature"):
            bent = layout.join(curvature(layout.split(along)))
        pushed = _loss_curvature(problem, here, along_outputs)
        bend = float(along @ bent + along_outputs @ pushed)
        if not bend > 0:
            if path:
                return Direction(step, count, tuple(path), along)
            return Direction(along, 1, downhill=along)
        length = size / bend
        step = step + length * along
        if count & (count - 1) == 0:
            path.append(step)
        gradient, slope = gradient + length * bent, slope + length * pushed
        reduced = problem.reduce(system, gradient, slope)
        if not reduced.size > wanted:
            break
        ratio, size = reduced.size / size, reduced.size
        along, along_outputs = reduced.step + ratio * along, reduced.outputs + ratio * along_outputs
    return Direction(step, count, tuple(path))


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
    length, move = 1.0, _mover(problem, point, direction.step)
    while length > 1e-2:
        candidate = move(length)
        if candidate.objective <= point.objective + slack:
            if direction.downhill is None:
                return candidate, length
            return _furthest(_mover(problem, candidate, direction.downhill), candidate, 1.0), length
        length /= 2
    # The model is wrong about long steps but may be right about short ones: try those, and longer multiples of the best.
    moves = [_mover(problem, point, step) for step in (*direction.path, plain.step)]
    tried = [(move(1.0), 1.0, move) for move in moves]
    # The held step, or if the metric is the curvature at this point, a part of it, surely lowers the objective.
    length = 1.0
    while point.objective - tried[-1][0].objective < _ENOUGH * length * plain.size - slack and length > _SHORTEST:
        length /= 2
        tried.append((moves[-1](length), length, moves[-1]))
    best, length, move = min(tried, key=lambda found: found[0].objective)
    best = _furthest(move, best, 2 * length)
    return (best, 0.0) if best.objective <= point.objective + slack else (point, 0.0)


def _mover(problem: Problem, point: Point, step: Coefficients) -> Callable[[float], Point]:
    """The points along a step. What steps give as φd gathers rounding, so that φd is made from the step."""
    outputs = problem.inner(step)
    return lambda length: problem.point(point.vector + length * step, point.outputs + length * outputs)


def _furthest(move: Callable[[float], Point], best: Point, length: float) -> Point:
    """Go along a step from a length on, doubling it while the objective falls."""
    while length < _FARTHEST and (further := move(length)).objective < best.objective:
        best, length = further, 2 * length
    return best
