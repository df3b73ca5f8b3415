"""The search of a fit on features: Newton's method or the alternation, along the continuation.

With the transforms M held, the least-norm coefficients are those of kernel regression with the adapted kernel K_M; with the
coefficients held, the best transforms come from one decomposition of each block. The alternation repeats these two. Newton's
method instead uses the system in K_M to precondition conjugate gradients on the true curvature.
"""

import math
from typing import Literal

import torch

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.transforms import is_identity
from adaptive_tangents.solvers import costs
from adaptive_tangents.solvers.alternation import Alternation, held_coefficients
from adaptive_tangents.solvers.certificates import certified, missed
from adaptive_tangents.solvers.continuation import ZERO_TARGETS, Continuation, Course, stages
from adaptive_tangents.solvers.curved_systems import curved_system, effort, serves
from adaptive_tangents.solvers.held_features import Vector
from adaptive_tangents.solvers.newton import line_search, newton_direction
from adaptive_tangents.solvers.problem import Point, Problem, Reduced, System
from adaptive_tangents.solvers.results import FEASIBLE, Fit
from adaptive_tangents.structures.base import Matrices

Solver = Literal["newton", "anderson", "alternation"]

_NOT_PULLED = "no output that the loss asks for depends on the coefficients, so the model is zero"


def searched(problem: Problem, course: Course, solver: Solver, start: Matrices | None) -> Fit:
    """Search from M = I, or from a start, for the optimum at τ = 1."""
    pulled = _pulled(problem)
    if not pulled and problem.loss.interpolates:
        return _at_zero(problem, course, 0.0)
    system = problem.first_system()
    if not pulled or problem.loss.trivial:
        return _at_zero(problem, course, system.kernel.jitter)
    beta = problem.zeros
    if start is not None:
        beta = problem.held.layout.join(start).to(beta)
    outputs = problem.inner(beta)
    if start is None:
        beta, outputs, system = held_coefficients(problem, system, outputs)
    else:
        beta, outputs = problem.restored(system, beta, outputs)
    point = problem.point(beta, outputs)
    tempers = [1.0]
    search: Newton | Alternation
    if solver == "newton" and point.solution.curvature is not None:
        problem.temper = math.inf
        course.record(problem, problem.point(beta, outputs).objective, 0.0 if start is None else math.nan)
        curved = serves(problem, point.solution)
        tempers = stages(problem, point.coefficients, near=curved) if start is None else tempers
        search = Newton(problem, course, point, system, curved=curved)
    else:
        search = Alternation(problem, course, point, system, extrapolated=solver != "alternation")
    converged, reason = search.follow(tempers)
    jitter = search.system.kernel.jitter
    return certified(problem, course, search.point, search.alpha, jitter, converged=converged, reason=reason)


def _pulled(problem: Problem) -> bool:
    """Whether the loss pulls coefficients away from zero; raises TangentError where zero features are to interpolate."""
    loss, outputs = (
        problem.loss,
        torch.zeros(problem.n * problem.feats.c, dtype=torch.float64, device=problem.feats.device),
    )
    slope = loss.slope(outputs)
    if loss.interpolates:
        slope = torch.randn(len(outputs), generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    if bool(problem.combine(slope.to(outputs)).any()):
        return True
    if loss.interpolates and not loss.trivial:
        raise TangentError(
            "fit: the features are zero, so no β interpolates targets that are not; use a positive ridge, or see why no "
            "output depends on these parameters (dead units?)"
        )
    return False


def _at_zero(problem: Problem, course: Course, jitter: float) -> Fit:
    """The fit at β = 0, where nothing pulls it away."""
    point = problem.point(problem.zeros, problem.inner(problem.zeros))
    course.record(problem, point.objective, 0.0)
    alpha = torch.zeros_like(point.outputs)
    reason = ZERO_TARGETS if problem.loss.trivial else _NOT_PULLED
    return certified(problem, course, point, alpha, jitter, converged=True, reason=reason)


def examined(problem: Problem, course: Course, coefficients: Matrices) -> Fit:
    """The fit at given coefficients, with the best transforms for them."""
    _pulled(problem)
    problem.first_system()
    vector = problem.held.layout.join(coefficients)
    point = problem.point(vector, problem.inner(vector))
    search = Newton(problem, course, point, problem.system(point.solution.transforms, point.outputs))
    _, stationarity = search.measure()
    reason = f"coefficients as given, stationarity {stationarity:.1e} (asked: {course.wanted:.1e})"
    jitter, met = search.system.kernel.jitter, stationarity <= course.wanted
    miss = missed(problem.loss, point.outputs)
    if problem.loss.interpolates and miss is not None and miss > FEASIBLE:
        met, reason = False, f"coefficients as given, which miss the targets by {miss:.1e} relative"
    return certified(problem, course, point, search.alpha, jitter, converged=met, reason=reason)


class Newton(Continuation):
    """Newton's method: a point, the system that preconditions its steps, and whether that is stale."""

    reduced: Reduced  # the held transform's step at the point
    alpha: Vector
    stationarity: float

    def __init__(self, problem: Problem, course: Course, point: Point, system: System, *, curved: bool = False) -> None:
        super().__init__(problem, course)
        self.problem, self.point, self.system = problem, point, system
        self.plain = system.kernel if curved else None  # K₀, if systems are made from the curvature
        self.products, self.stale, self.moved = 0, True, True
        self.due = self.solved = False  # a new system was put off, or made before this round
        kernel = effort(problem.held) if curved else None
        self.patience, self.patience_of_factor = costs.patience(problem.feats, problem.form, problem.held.cost, kernel)

    def enter(self) -> None:
        self.point = self.problem.point(self.point.vector, self.point.outputs)

    def begin(self) -> None:
        # Reuse the previous stage's system; the iteration count of conjugate gradients shows when it is stale.
        adapts = bool(self.system.transforms) or not is_identity(self.point.solution.transforms)
        self.products, self.stale = 0, self.due
        # Where anything adapts, take at least one step: it squares the error.
        self.moved = not adapts

    def refresh(self) -> None:
        problem, point = self.problem, self.point
        if self.still:
            # Outputs tracked through the steps gather rounding, which may look like a lower objective: from here on,
            # compute them from the coefficients and the step.
            point = problem.point(point.vector, problem.inner(point.vector))
        # At the end of a stage, a new system is for the next one.
        put_off = self.stale and not self.due and self._ends(point)
        self.solved = (self.stale or self.due) and not put_off
        self.due = put_off
        if self.solved:
            curved = None if self.plain is None else curved_system(problem, point, self.plain)
            self.system = curved or problem.system(point.solution.transforms, point.outputs)
        elif self.system.root is not None and self.products > self.patience_of_factor:
            old = self.system
            self.system = problem.inverted(old.transforms, old.kernel, point.outputs, old.metric)
        beta, outputs = problem.restored(self.system, point.vector, point.outputs)
        self.point = point if beta is point.vector else problem.point(beta, outputs)

    def _ends(self, point: Point) -> bool:
        """Whether the stage ends at this point, as far as is known without a system."""
        if self.problem.loss.interpolates:
            return False
        alpha = -self.problem.loss.slope(point.outputs) / 2
        return self.problem.stationarity(point, alpha) <= self.aim

    def measure(self) -> tuple[float, float]:
        problem, point = self.problem, self.point
        self.reduced = problem.reduce(self.system, point.gradient, problem.loss.slope(point.outputs))
        self.alpha = problem.dual(point, self.reduced)
        self.stationarity = problem.stationarity(point, self.alpha)
        self.course.record(problem, point.objective, self.stationarity, solved=self.solved, products=self.products)
        change = self.reduced.size / 2 / max(abs(point.objective), 1e-300)
        return change if self.moved or problem.temper != 1.0 else math.inf, self.stationarity

    def step(self) -> float:
        before = self.point
        # With an old system there is no more to a step than what would remake it.
        most = [] if self.solved else [math.ceil(2 * self.patience)]
        direction = newton_direction(self.problem, self.system, before, self.reduced, self.stationarity, *most)
        self.point, length = line_search(self.problem, before, direction, self.reduced)
        self.products, self.moved = direction.products, True
        # A wrong model is seldom the system's fault: it is stale only if no part of the step lowers the objective.
        self.stale = length == 0 or self.products > self.patience
        return (before.objective - self.point.objective) / max(abs(before.objective), 1e-300)
