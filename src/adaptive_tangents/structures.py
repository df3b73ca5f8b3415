"""Structures 𝓜: which transforms of the features are allowed, and the regulariser Ω̃ each induces (theory §3).

A structure turns coefficients, one matrix B a block, into everything the solver asks for: the best transform, Ω̃(B), its
gradient, and the dual Ω̃* for lower bounds. To add one that acts block by block, subclass ``BlockStructure`` and write
``_solution`` (all of it comes from one decomposition of B) and ``_dual``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.penalties import Penalty, Quadratic, shares
from adaptive_tangents.transforms import Joint, LowRank, Sides, Transform

Matrices = Mapping[str, Float[Tensor, "_o _i"]]


@dataclass(frozen=True)
class Solution:
    """The inner minimum over M at given coefficients: the transforms, Ω̃(β) and ∇Ω̃(β) = 2 M⁻¹M⁻ᵀβ."""

    transforms: Mapping[str, Transform]
    penalty: float
    gradient: Matrices


class Structure(ABC):
    """A class of transforms; every method takes one matrix a block."""

    @abstractmethod
    def solution(self, coefficients: Matrices) -> Solution:
        """The best transforms for β, with the penalty and its gradient."""

    @abstractmethod
    def dual(self, matrices: Matrices) -> float:
        """Ω̃*(G) = sup over β of ⟨G, β⟩ − Ω̃(β), an upper bound of it, or infinity."""

    def update(self, coefficients: Matrices) -> Mapping[str, Transform]:
        """The transforms M that attain Ω̃(β)."""
        return self.solution(coefficients).transforms

    def penalty(self, coefficients: Matrices) -> float:
        """Ω̃(β) = min over M in 𝓜 of ‖M⁻ᵀβ‖² + Ω(M)."""
        return self.solution(coefficients).penalty

    def gradient(self, coefficients: Matrices) -> Matrices:
        """∇Ω̃(β), one matrix a block."""
        return self.solution(coefficients).gradient


class BlockStructure(Structure):
    """A structure that treats every block by itself, Ω̃ = Σ_ℓ Ω̃_ℓ(B_ℓ)."""

    @abstractmethod
    def _solution(self, matrix: Float[Tensor, "o i"]) -> tuple[Sides, float, Float[Tensor, "o i"]]:
        """Transform, Ω̃(B) and ∇Ω̃(B) of one block."""

    @abstractmethod
    def _dual(self, matrix: Float[Tensor, "o i"]) -> float:
        """Ω̃* of one block."""

    def solution(self, coefficients: Matrices) -> Solution:
        parts = {name: self._solution(matrix) for name, matrix in coefficients.items()}
        return Solution(
            {name: part[0] for name, part in parts.items()},
            sum(part[1] for part in parts.values()),
            {name: part[2] for name, part in parts.items()},
        )

    def dual(self, matrices: Matrices) -> float:
        return sum(self._dual(matrix) for matrix in matrices.values())


@dataclass(frozen=True)
class Fixed(BlockStructure):
    """No adaptation, M = I: kernel regression with the tangent kernel, Ω̃(β) = ‖β‖²."""

    def _solution(self, matrix: Tensor) -> tuple[Sides, float, Tensor]:
        return Sides(), float((matrix**2).sum()), 2 * matrix

    def _dual(self, matrix: Tensor) -> float:
        return float((matrix**2).sum()) / 4


@dataclass(frozen=True)
class Full(Structure):
    """Any p × p matrix: Ω̃(β) = ω̃(‖β‖), so interpolation gives the fit of Fixed and only the kernel changes.

    With a ridge ρ the fit is that of Fixed with ridge ρ/z², z the one singular value that moved.
    """

    penalty_on_transform: Penalty = field(default_factory=Quadratic)

    def solution(self, coefficients: Matrices) -> Solution:
        norm = torch.sqrt(torch.stack([(matrix**2).sum() for matrix in coefficients.values()]).sum())
        induced = self.penalty_on_transform.induced()
        z = float(induced.minimizer(norm[None]))
        unit = {name: matrix / norm if norm > 0 else matrix for name, matrix in coefficients.items()}
        joint = Joint(unit, z)
        gradient = {name: 2 * matrix / z**2 for name, matrix in coefficients.items()}
        return Solution(dict.fromkeys(coefficients, joint), float(induced.value(norm[None])), gradient)

    def dual(self, matrices: Matrices) -> float:
        norm = torch.sqrt(torch.stack([(matrix**2).sum() for matrix in matrices.values()]).sum())
        return float(self.penalty_on_transform.induced().dual(norm[None]))


@dataclass(frozen=True)
class LayerScale(BlockStructure):
    """One factor a block, M = s_ℓ I: Ω̃(β) = Σ_ℓ ω̃(‖B_ℓ‖), group sparsity over layers."""

    penalty_on_transform: Penalty = field(default_factory=Quadratic)

    def _solution(self, matrix: Tensor) -> tuple[Sides, float, Tensor]:
        induced, norm = self.penalty_on_transform.induced(), matrix.norm()[None]
        z = float(induced.minimizer(norm))
        return Sides(scale=z), float(induced.value(norm)), 2 * matrix / z**2

    def _dual(self, matrix: Tensor) -> float:
        return float(self.penalty_on_transform.induced().dual(matrix.norm()[None]))


class _Spectral(BlockStructure):
    """Ω̃(B) = Σ_j ω̃(σ_j(B)), ω̃ induced by the composition of the penalties on the sides."""

    @property
    @abstractmethod
    def sides(self) -> Mapping[str, Penalty]:
        """The penalty on each side that is transformed, "left" and "right"."""

    @property
    def combined(self) -> Penalty:
        """The penalty on the product of the sides' singular values."""
        first, *rest = self.sides.values()
        return rest[0].compose(first) if rest else first

    def _solution(self, matrix: Tensor) -> tuple[Sides, float, Tensor]:
        u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
        induced = self.combined.induced()
        factors: dict[str, LowRank] = {}
        for side, excess in zip(self.sides, shares(tuple(self.sides.values()), values), strict=True):
            moved = excess > torch.finfo(excess.dtype).eps
            factors[side] = LowRank(u[:, moved] if side == "left" else vt[moved].mT, 1 + excess[moved])
        gradient = (u * induced.derivative(values)) @ vt
        return Sides(factors.get("left"), factors.get("right")), float(induced.value(values).sum()), gradient

    def _dual(self, matrix: Tensor) -> float:
        return float(self.combined.induced().dual(torch.linalg.svdvals(matrix)).sum())


@dataclass(frozen=True)
class Left(_Spectral):
    """M_L Φ, a transform of the backward signals: Ω̃(B) = Σ_j ω̃(σ_j(B))."""

    penalty_on_transform: Penalty = field(default_factory=Quadratic)

    @property
    def sides(self) -> Mapping[str, Penalty]:
        return {"left": self.penalty_on_transform}


@dataclass(frozen=True)
class Right(_Spectral):
    """Φ M_Rᵀ, a transform of the layer's inputs: Ω̃(B) = Σ_j ω̃(σ_j(B))."""

    penalty_on_transform: Penalty = field(default_factory=Quadratic)

    @property
    def sides(self) -> Mapping[str, Penalty]:
        return {"right": self.penalty_on_transform}


@dataclass(frozen=True)
class TwoSided(_Spectral):
    """M_L Φ M_Rᵀ, what a network's layer can do: Ω̃(B) = Σ_j (ω_L ⊕ ω_R)~(σ_j(B)); one penalty serves both sides.

    With B = U diag(σ) Vᵀ the best factors are M_L = I + U diag(a − 1) Uᵀ and M_R = I + V diag(b − 1) Vᵀ, (a, b) minimising
    ω_L(a) + ω_R(b) + σ²/(ab)². Source: LeJeune & Alemohammad, CPAL 2024, §3.

    >>> import torch
    >>> sides = TwoSided(Quadratic(1.0)).update({"w": torch.diag(torch.tensor([3.0, 0.0]))})["w"]
    >>> bool(torch.allclose(sides.left.matrix(), sides.right.matrix()))
    True
    """

    left: Penalty = field(default_factory=Quadratic)
    right: Penalty | None = None

    @property
    def sides(self) -> Mapping[str, Penalty]:
        return {"left": self.left, "right": self.right or self.left}
