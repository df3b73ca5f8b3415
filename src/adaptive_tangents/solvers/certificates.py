"""Certificates of a solution: how well it meets constraints, how stationary it is, and a lower bound on any objective."""

import math
from collections.abc import Mapping
from typing import Any

import scipy
from torch import Tensor

from adaptive_tangents.solvers.continuation import Course
from adaptive_tangents.solvers.held_features import Vector
from adaptive_tangents.solvers.losses import Loss, SquaredError
from adaptive_tangents.solvers.problem import Point, Problem, Tempered
from adaptive_tangents.solvers.results import FEASIBLE, Fit
from adaptive_tangents.structures.base import Structure

_ROUNDING = 2.0  # a stationarity below so many times what was asked differs from it by rounding
_SMALLEST_SCALE = 1e-9  # of the dual coefficients: if the bound is infinite here, there is none


def certified(
    problem: Problem, course: Course, point: Point, alpha: Vector, jitter: float, *, converged: bool, reason: str
) -> Fit:
    """The ``Fit`` at a point, with all certificates; with a ridge, these are made from the coefficients alone."""
    outputs = problem.inner(point.vector)
    if not problem.loss.interpolates:
        alpha = -problem.loss.slope(outputs) / 2
    generators, stationarity = problem.held.layout.split(problem.combine(alpha)), problem.stationarity(point, alpha)
    return Fit(
        coefficients={name: point.coefficients[name] for name in problem.feats.blocks},
        transforms=point.solution.transforms, features=problem.feats,
        objective=point.solution.penalty + problem.loss.value(outputs),
        **certificates(problem, course, outputs, alpha, generators, stationarity, jitter, converged=converged, reason=reason),
    )  # fmt: skip


def certificates(
    problem: Tempered,
    course: Course,
    outputs: Vector,
    alpha: Vector,
    generators: Mapping[str, Tensor],
    stationarity: float,
    jitter: float,
    *,
    converged: bool,
    reason: str,
) -> dict[str, Any]:
    """The certificates that fits on features and on kernels share.

    A fit that misses its constraints, or by its coefficients is not stationary, has not converged. ``generators`` are as in
    ``lower_bound``.
    """
    loss, constraints, n = problem.loss, problem.constraints, problem.n
    targets = loss.targets if isinstance(loss, SquaredError) else None
    feasibility = missed(loss, outputs)
    if converged and loss.interpolates and feasibility is not None and feasibility > FEASIBLE:
        converged, remedy = False, "" if problem.form == "dense" else "form='dense' or "
        reason = (
            f"the targets are missed by {feasibility:.1e} relative: the kernel is too ill-conditioned for the {problem.form} "
            f"form; use {remedy}a positive ridge"
        )
    if converged and stationarity > _ROUNDING * course.wanted:
        converged = False
        reason = (
            f"the search ended, but rounding in it was too large: by its coefficients, stationarity is {stationarity:.1e} "
            f"(asked: {course.wanted:.1e}); use a larger ridge, or raise tol"
        )
    bound, why = lower_bound(problem.structure, loss, generators, alpha)
    return {
        "structure": problem.structure, "loss": loss.name, "ridge": loss.ridge, "stationarity": stationarity,
        "feasibility": feasibility,
        "lower_bound": bound, "lower_bound_reason": why, "converged": converged, "reason": reason,
        "history": tuple(course.history), "smallest_eigenvalue": constraints.smallest_eigenvalue,
        "jitter": jitter, "dropped": constraints.dropped, "form": problem.form,
        "dual": alpha.reshape(n, -1), "targets": None if targets is None else targets.reshape(n, -1),
        "timings": dict(problem.timings),
    }  # fmt: skip


def missed(loss: Loss, outputs: Vector) -> float | None:
    """By how much outputs miss the targets of squared error and interpolation, relative to these."""
    if not isinstance(loss, SquaredError):
        return None
    return float((outputs - loss.targets).norm()) / (float(loss.targets.norm()) or 1.0)


def lower_bound(
    structure: Structure, loss: Loss, generators: Mapping[str, Tensor], alpha: Tensor
) -> tuple[float | None, str]:
    """The dual objective D(a), the loss's bound minus Ω̃*(Σ a_kΦ(x_k)), at a = 2sα with the best s, or None.

    None says that Ω̃* is infinite for every s > 0. ``generators`` are Σ α_kΦ(x_k), one matrix for each block, or others with
    the same Ω̃*.
    """

    def value(s: float) -> float:
        return loss.bound(2 * s * alpha) - structure.dual({name: 2 * s * g for name, g in generators.items()})

    if not bool(alpha.any()):
        return value(0.0), "the targets are zero" if loss.trivial else "the dual coefficients are zero"
    finite, infinite = _SMALLEST_SCALE, 2.0
    if not math.isfinite(value(finite)):
        return None, "none: this penalty's dual is infinite away from zero; stationarity alone certifies"
    if math.isfinite(value(infinite)):
        finite = infinite
    while infinite - finite > 1e-15 * infinite:
        middle = (finite + infinite) / 2
        finite, infinite = (middle, infinite) if math.isfinite(value(middle)) else (finite, middle)
    found = scipy.optimize.minimize_scalar(
        lambda s: -value(s), bounds=(0, finite), method="bounded", options={"xatol": 1e-12}
    )
    best = max(v for s in (0.0, float(found.x), min(1.0, finite)) if math.isfinite(v := value(s)))
    return best, "evaluated at the scaled dual coefficients"
