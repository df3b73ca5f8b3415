"""What a fit says of its solution: how well it meets constraints, how stationary it is, how far below any other could be."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from scipy.optimize import minimize_scalar
from torch import Tensor

from adaptive_tangents.solvers.losses import Loss, SquaredError
from adaptive_tangents.solvers.problem import Point, Problem, Vector
from adaptive_tangents.solvers.results import Fit, Round
from adaptive_tangents.structures.base import Structure

FEASIBLE = 1e-6  # a constraint missed by more, relative, is not met
_SMALLEST_SCALE = 1e-9  # of the dual coefficients, to have a finite bound


@dataclass(frozen=True)
class Record:
    """What is known of a search besides where it ended."""

    history: tuple[Round, ...]
    smallest_eigenvalue: float
    jitter: float
    dropped: int


def certified(problem: Problem, point: Point, alpha: Vector, record: Record, *, converged: bool, reason: str) -> Fit:
    """The fit at a point, with all its certificates; one that misses its constraints has not converged."""
    loss, structure = problem.loss, problem.structure
    n, c = problem.feats.n, problem.feats.c
    squared = isinstance(loss, SquaredError)
    outputs = problem.inner(point.coefficients)
    feasibility = None
    if squared:
        size = float(problem.targets.norm())
        feasibility = float((outputs - problem.targets).norm()) / size if size > 0 else 0.0
    if converged and loss.interpolates and feasibility is not None and feasibility > FEASIBLE:
        converged = False
        reason = (
            f"the targets are missed by {feasibility:.1e} relative: the kernel is too ill-conditioned for the "
            f"{problem.form} form; use form='dense' or a positive ridge"
        )
    bound, why = lower_bound(structure, loss, problem.combine(alpha), alpha)
    return Fit(
        coefficients=point.coefficients, transforms=point.solution.transforms, dual=alpha.reshape(n, c),
        structure=structure, loss="squared error" if squared else "cross-entropy", ridge=loss.ridge,
        objective=point.solution.penalty + loss.value(outputs), feasibility=feasibility,
        stationarity=problem.stationarity(point, alpha), lower_bound=bound, lower_bound_reason=why,
        converged=converged, reason=reason, history=record.history, smallest_eigenvalue=record.smallest_eigenvalue,
        jitter=record.jitter, dropped=record.dropped, form=problem.form, timings=dict(problem.timings),
        features=problem.feats, targets=problem.targets.reshape(n, c) if squared else None,
    )  # fmt: skip


def lower_bound(
    structure: Structure, loss: Loss, generators: Mapping[str, Tensor], alpha: Tensor
) -> tuple[float | None, str]:
    """D(a), the loss's bound less Ω̃*(Σ a_kΦ(x_k)), at a = 2sα, the scale s searched; None where no s > 0 gives one.

    ``generators`` are Σ α_kΦ(x_k), one matrix a block, or matrices for which Ω̃* is the same.
    """

    def value(s: float) -> float:
        return loss.bound(2 * s * alpha) - structure.dual({name: 2 * s * g for name, g in generators.items()})

    if not bool(alpha.any()):
        return value(0.0), "the targets are zero"
    finite, infinite = _SMALLEST_SCALE, 2.0
    if not math.isfinite(value(finite)):
        return None, "none: this penalty's dual is infinite away from zero; stationarity alone certifies"
    if math.isfinite(value(infinite)):
        finite = infinite
    while infinite - finite > 1e-15 * infinite:
        middle = (finite + infinite) / 2
        finite, infinite = (middle, infinite) if math.isfinite(value(middle)) else (finite, middle)
    found = minimize_scalar(lambda s: -value(s), bounds=(0, finite), method="bounded", options={"xatol": 1e-12})
    best = max(v for s in (0.0, float(found.x), min(1.0, finite)) if math.isfinite(v := value(s)))
    return best, "evaluated at the scaled dual coefficients"
