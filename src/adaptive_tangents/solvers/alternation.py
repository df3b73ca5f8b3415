"""The alternation of two closed forms, for β with M held and for M with β held, with optional Anderson extrapolation."""

import math

import torch
from torch import Tensor

from adaptive_tangents.solvers.continuation import Continuation, Course
from adaptive_tangents.solvers.held_features import Coefficients, Vector
from adaptive_tangents.solvers.problem import Point, Problem, System

_DEPTH = 10
_NEWTON_STEPS = 50
_SETTLED = 1e-7  # a relative move of the outputs, after which only its square is left


def held_coefficients(problem: Problem, system: System, outputs: Vector) -> tuple[Coefficients, Vector, System]:
    """The β that minimizes ‖M⁻ᵀβ‖² + loss for a held M, its outputs φβ, and the system used.

    β = MᵀMφᵀα: one solve for squared error and constraints; Newton's method in α for any other loss.
    """
    alpha = torch.zeros_like(outputs)
    loss = problem.loss
    if system.root is None:
        alpha = system.inverse(problem.targets)
    else:
        outputs = torch.zeros_like(outputs)
        n, c = problem.feats.n, problem.feats.c

        def value(a: Tensor, f: Tensor) -> float:
            return float(a @ f) + loss.value(f)

        for _ in range(_NEWTON_STEPS):
            system = problem.inverted(system.transforms, system.kernel, outputs)
            slope = loss.slope(outputs)
            assert system.root is not None
            # β → β − v with gradient 2M⁻¹M⁻ᵀβ gives α → −u/2.
            right = (system.kernel.apply(slope) / 2 + outputs).reshape(n, c, 1)
            inside = system.inverse((system.root.mT @ right).flatten()).reshape(n, c, 1)
            aim = -(slope - (system.root @ inside).flatten()) / 2
            move = system.kernel.apply(aim) - outputs
            here, length = value(alpha, outputs), 1.0
            while length > 1e-4 and value(alpha + length * (aim - alpha), outputs + length * move) > here:
                length /= 2
            alpha, outputs = alpha + length * (aim - alpha), outputs + length * move
            if float(move.norm()) <= _SETTLED * float(outputs.norm()) or length <= 1e-4:
                break
    vector = system.square(problem.combine(alpha))
    vector, outputs = problem.restored(system, vector, problem.inner(vector))
    return vector, outputs, system


class Alternation(Continuation):
    """Rounds of the two closed forms, extrapolated if that lowers the objective further."""

    alpha: Vector

    def __init__(self, problem: Problem, course: Course, point: Point, system: System, *, extrapolated: bool) -> None:
        super().__init__(problem, course)
        self.problem, self.point, self.system = problem, point, system
        self.memory, self.accelerated = Extrapolation() if extrapolated else None, False
        self.start: Coefficients | None = None  # the coefficients at the start of the round

    def measure(self) -> tuple[float, float]:
        problem, point = self.problem, self.point
        slope = problem.loss.slope(point.outputs)
        if problem.loss.interpolates:
            self.alpha = problem.dual(point, problem.reduce(self.system, point.gradient, slope))
        else:
            self.alpha = -slope / 2
        stationarity = problem.stationarity(point, self.alpha)
        self.course.record(problem, point.objective, stationarity, accelerated=self.accelerated)
        return self.gained, stationarity

    def step(self) -> float:
        problem, before, found = self.problem, self.point, None
        if self.memory is not None and self.start is not None:
            found = self.memory.better(problem, self.start, before)
        self.accelerated = found is not None
        start = before if found is None else found
        self.start = start.vector
        system = problem.system(dict(start.solution.transforms), before.outputs)
        beta, outputs, self.system = held_coefficients(problem, system, before.outputs)
        self.point = problem.point(beta, outputs)
        return abs(before.objective - self.point.objective) / max(abs(self.point.objective), 1e-300)


class Extrapolation:
    """Anderson extrapolation of a map B → T(B): the affine combination of past images with the least combined residual.

    The residual is T(B) − B. If the images meet a linear constraint, so does the combination.
    """

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.residuals: list[Tensor] = []

    def better(self, problem: Problem, start: Coefficients, point: Point) -> Point | None:
        """The extrapolated point if its objective is below the image's, else None."""
        candidate = self._extrapolate(start, point.vector)
        if candidate is None:
            return None
        found = problem.point(candidate, problem.inner(candidate))
        if found.objective < point.objective:
            return found
        self._forget()
        return None

    def _extrapolate(self, start: Coefficients, image: Coefficients) -> Coefficients | None:
        self.images = [*self.images, image][-_DEPTH:]
        self.residuals = [*self.residuals, image - start][-_DEPTH:]
        if len(self.images) < 2:
            return None
        stack = torch.stack(self.residuals)
        gram = stack @ stack.mT
        gram.diagonal().add_(1e-14 * float(gram.diagonal().max()))
        weights, failed = torch.linalg.solve_ex(gram, torch.ones_like(gram[0]))
        total = float(weights.sum())
        if int(failed) or not math.isfinite(total) or total == 0:  # all residuals are zero
            self._forget()
            return None
        mixed: Tensor = weights / total @ torch.stack(self.images)
        return mixed

    def _forget(self) -> None:
        """Keep only the latest round."""
        self.images, self.residuals = self.images[-1:], self.residuals[-1:]
