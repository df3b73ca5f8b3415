"""The problem (E) in terms of kernels, for structures whose Ω̃ depends only on norms of blocks.

An optimal β is B_ℓ = q_ℓ φ_ℓᵀα with one factor q_ℓ = z_ℓ² for each block, so ‖B_ℓ‖² = q_ℓ² αᵀK_ℓα, and only q is unknown:
α solves (Σ_ℓ q_ℓ K_ℓ + ρI)α = r. Features are never formed, and kernels are read tile by tile.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.kernels.products import KernelProducts
from adaptive_tangents.kernels.regression import preconditioner
from adaptive_tangents.kernels.tiles import Cached, Sum, Tiled
from adaptive_tangents.linalg.conjugate_gradients import Solve, iterate
from adaptive_tangents.linalg.kernel_systems import DenseKernel
from adaptive_tangents.solvers.constraints import Constraints, examined
from adaptive_tangents.solvers.losses import SquaredError
from adaptive_tangents.solvers.problem import Tempered, relative
from adaptive_tangents.structures.base import Solution, Structure

Norms = Float[Tensor, " g"]

EXACT, _ROUGH = 1e-13, 1e-6  # relative residuals: for α, and for Newton's matrix
_CHANGED = 1.5  # a preconditioner is remade when some q_ℓ changes by more than this factor


@dataclass(frozen=True)
class State:
    """A point of the search: the norms v planned for and Ω̃ there; then q, α, each K_ℓα; Ω̃ at the norms reached."""

    planned: Norms
    aim: Solution
    weights: Norms
    alpha: Float[Tensor, " k"]
    images: Float[Tensor, "g k"]
    solve: Solve
    residual: float
    steps: int
    solution: Solution
    objective: float

    @property
    def kappa(self) -> Norms:
        """αᵀK_ℓα."""
        return (self.images @ self.alpha).clamp_min(0)

    @property
    def norms(self) -> Norms:
        """‖B_ℓ‖."""
        return self.weights * self.kappa.sqrt()

    @property
    def outputs(self) -> Float[Tensor, " k"]:
        """φβ."""
        return self.weights @ self.images

    @property
    def slopes(self) -> Norms:
        """ω̃′(‖B_ℓ‖)."""
        return slopes(self.solution)

    @property
    def stationarity(self) -> float:
        """‖∇Ω̃(β) − 2φᵀα‖/‖2φᵀα‖, if α solves its system exactly."""
        root = self.kappa.sqrt()
        size = float(2 * root.norm())
        return relative(float((self.slopes - 2 * root).norm()), size)


def slopes(solution: Solution) -> Norms:
    """ω̃′ of every norm."""
    return torch.stack([x.flatten()[0] for x in solution.gradient.values()])


class KernelProblem(Tempered):
    """Kernels with a structure and a loss, as functions of q."""

    loss: SquaredError

    def __init__(
        self,
        parts: Mapping[str, Tiled],
        structure: Structure,
        loss: SquaredError,
        form: str,
        room: int,
        summed: int = 0,
    ) -> None:
        self.summed = summed  # bytes for tiles of the sum, which every product of a solve needs
        self.parts, self.structure, self.loss, self.form, self.room = parts, structure, loss, form, room
        self.like = next(iter(parts.values())).zeros(len(parts))
        self.temper, self.constraints, self.jitter = 1.0, Constraints(), 0.0
        self.timings: dict[str, float] = {}
        self.near: tuple[Norms, Solve] | None = None
        self.before: Tensor | None = None

    @property
    def n(self) -> int:
        return next(iter(self.parts.values())).n

    def matrices(self, norms: Norms) -> dict[str, Tensor]:
        """A 1 × 1 matrix for each block, its norm; the structure needs no more of β."""
        return {name: v.reshape(1, 1) for name, v in zip(self.parts, norms, strict=True)}

    def bends(self, solution: Solution) -> Norms | None:
        """ω̃″ at every norm."""
        if solution.curvature is None:
            return None
        found = solution.curvature({name: self.like.new_ones(1, 1) for name in self.parts})
        return torch.stack([found[name].flatten()[0] for name in self.parts])

    def state(self, planned: Norms) -> State:
        """The state with q = z² = 2v/ω̃′(v) at these norms v."""
        aim = self.solution(self.matrices(planned))
        found = slopes(aim)
        q = torch.where(planned > 0, 2 * planned / torch.where(found > 0, found, 1.0), 1.0)
        solve = self._dense(q) if self.form == "dense" else self._free(q)
        targets = self.loss.targets
        with self.timed("systems"):
            alpha, steps = solve(targets, EXACT)
        images = self.products(alpha)
        outputs = q @ images
        residual = float((outputs + self.loss.ridge * alpha - targets).norm() / targets.norm())
        self.before = alpha
        norms = q * (images @ alpha).clamp_min(0).sqrt()
        solution = self.solution(self.matrices(norms))
        objective = solution.penalty + self.loss.value(outputs)
        return State(
            planned, aim, q, alpha, images, lambda x: solve(x, _ROUGH)[0], residual, steps, solution, objective
        )

    def nothing(self) -> State:
        """The state for zero targets."""
        zeros, alpha = torch.zeros_like(self.like), torch.zeros_like(self.loss.targets)
        aim = self.solution(self.matrices(zeros))
        images = alpha.expand(len(zeros), -1)
        return State(zeros, aim, zeros + 1, alpha, images, lambda x: x, 0.0, 0, aim, 0.0)

    def products(self, x: Float[Tensor, " k"]) -> Float[Tensor, "g k"]:
        """Every K_ℓ x."""
        with self.timed("products"):
            return torch.stack([KernelProducts(part).apply(x) for part in self.parts.values()])

    def whole(self, q: Norms) -> Sum:
        """Σ_ℓ q_ℓ K_ℓ."""
        return Sum(list(self.parts.values()), q.tolist())

    def _dense(self, q: Norms) -> Callable[[Tensor, float], tuple[Tensor, int]]:
        with self.timed("kernels"):
            kernel = DenseKernel(self.whole(q).matrices()[0], self.constraints.kept)
        if math.isnan(self.constraints.smallest_eigenvalue):
            with self.timed("constraints"):
                self.constraints = examined(kernel, self.loss, samples=self.n)
        ridge = self.loss.ridge
        with self.timed("factorizations"):
            once = kernel.shifted(ridge)
        self.jitter = kernel.jitter

        def solve(x: Tensor, tol: float) -> tuple[Tensor, int]:
            found = once(x)
            for _ in range(2 if tol == EXACT else 0):
                found = found + once(x - kernel.apply(found) - ridge * found)
            return found, 0

        return solve

    def _free(self, q: Norms) -> Callable[[Tensor, float], tuple[Tensor, int]]:
        operator = KernelProducts(Cached(self.whole(q), self.summed), ridge=self.loss.ridge)
        if self.near is None or float((self.near[0] / q).log().abs().max()) > math.log(_CHANGED):
            with self.timed("preconditioners"):
                self.near = q, preconditioner(operator, self.room)
        near = self.near[1]

        def solve(x: Tensor, tol: float) -> tuple[Tensor, int]:
            start = self.before if tol == EXACT else None
            found = iterate(operator.apply, x, near, tol=tol, start=start)
            return found.solution, found.steps

        return solve
