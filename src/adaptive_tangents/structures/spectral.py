"""Structures of a block's singular values: transforms of its output side, its input side, or both."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.features.transforms import LowRank, Sides
from adaptive_tangents.penalties.closed_forms import Penalty, Quadratic
from adaptive_tangents.structures.base import BlockSolution, BlockStructure, Matrices
from adaptive_tangents.structures.inner import Inner, joint

_CLOSE = 1e-5  # relative; for closer values the divided difference is less exact than the trapezoid rule


class Spectral(BlockStructure):
    """Ω̃(B) = Σ_j ω̃(σ_j(B)), with ω̃ induced by the composition of the sides' penalties."""

    @property
    @abstractmethod
    def sides(self) -> Mapping[str, Penalty]:
        """The penalty of each transformed side, "left" or "right"."""

    @property
    def combined(self) -> Penalty:
        """The penalty on the product of the sides' singular values."""
        first, *rest = self.sides.values()
        return rest[0].compose(first) if rest else first

    def rotates(self, names: Iterable[str]) -> dict[str, tuple[bool, bool]]:
        return dict.fromkeys(names, (True, True))

    def block_solution(self, matrix: Tensor) -> BlockSolution:
        u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
        return self._solved(u, vt, Inner(tuple(self.sides.values()), values))

    def block_solutions(self, matrices: Matrices) -> dict[str, BlockSolution]:
        if type(self).block_solution is not Spectral.block_solution:
            return super().block_solutions(matrices)
        parts = [torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices.values()]
        inner = joint(tuple(self.sides.values()), [values for _, values, _ in parts])
        found = zip(matrices, parts, inner, strict=True)
        return {name: self._solved(u, vt, part) for name, (u, _, vt), part in found}

    def _solved(self, u: Tensor, vt: Tensor, inner: Inner) -> BlockSolution:
        """The solution of a block with these singular vectors, and its values in the scalar problem."""
        values = inner.values
        factors: dict[str, LowRank] = {}
        for side, excess in zip(self.sides, inner.excess, strict=True):
            moved = excess > torch.finfo(excess.dtype).eps
            factors[side] = LowRank(u[:, moved] if side == "left" else vt[moved].mT, 1 + excess[moved])
        return BlockSolution(
            Sides(factors.get("left"), factors.get("right")),
            inner.total,
            (u * (inner.slope * values)) @ vt,
            SpectralCurvature(u, vt, inner),
        )

    def block_dual(self, matrix: Tensor) -> float:
        return float(self.combined.induced().dual(torch.linalg.svdvals(matrix)).sum())

    def block_proximal(self, matrix: Tensor, step: float) -> Tensor:
        # By von Neumann's trace inequality the best B has the singular vectors of X, even if ω̃ is not convex.
        u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
        nearest: Tensor = (u * self.combined.induced().proximal(values, step)) @ vt
        return nearest


@dataclass(frozen=True)
class SpectralCurvature:
    r"""The Hessian of F(B) = Σ_j ω̃(σ_j) at B = U diag(σ) Vᵀ applied to X (o, i), from the thin decomposition alone.

    In the singular basis, Y = UᵀXV, the symmetric part of each pair Y_ij, Y_ji is multiplied by the divided difference
    (ω̃′_i − ω̃′_j)/(σ_i − σ_j), which is ω̃″ where σ_i = σ_j; the antisymmetric part by (ω̃′_i + ω̃′_j)/(σ_i + σ_j), which is 2
    where both are zero; and the part of X outside the row or column space by ω̃′_i/σ_i = 2/z_i².
    """

    u: Float[Tensor, "o k"]
    vt: Float[Tensor, "k i"]
    inner: Inner

    @cached_property
    def multipliers(self) -> tuple[Float[Tensor, "k k"], Float[Tensor, "k k"]]:
        """The multipliers of the symmetric and the antisymmetric part of each pair."""
        sigma, bend = self.inner.values, self.inner.bend
        slope = sigma * self.inner.slope
        gap, total = sigma[:, None] - sigma, sigma[:, None] + sigma
        close = gap.abs() <= _CLOSE * total
        quotient = (slope[:, None] - slope) / torch.where(close, 1.0, gap)
        symmetric = torch.where(close, (bend[:, None] + bend) / 2, quotient)
        sums = (slope[:, None] + slope) / torch.where(total > 0, total, 1.0)
        return symmetric, torch.where(total > 0, sums, 2.0)

    @cached_property
    def _inside(self) -> tuple[Tensor, Tensor]:
        """The multipliers of Y and of Yᵀ."""
        symmetric, antisymmetric = self.multipliers
        return (symmetric + antisymmetric) / 2, (symmetric - antisymmetric) / 2

    @cached_property
    def _beside(self) -> Tensor:
        """V diag(2/z²) Vᵀ, or U diag(2/z²) Uᵀ where the matrix is wider than it is tall."""
        basis = self.u if self.u.shape[0] < self.vt.shape[1] else self.vt.mT
        return (basis * self.inner.slope) @ basis.mT

    def __call__(self, x: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        u, vt, outside = self.u, self.vt, self.inner.slope
        same, crossed = self._inside
        # Nothing lies outside the side of full rank. The product over the other side counts the inside too: subtract it.
        if u.shape[0] < vt.shape[1]:
            y = u.mT @ (x @ vt.mT)
            return (u @ (same * y + crossed * y.mT - outside[:, None] * y)) @ vt + self._beside @ x
        y = (u.mT @ x) @ vt.mT
        return u @ ((same * y + crossed * y.mT - y * outside) @ vt) + x @ self._beside


@dataclass(frozen=True)
class Left(Spectral):
    """M_L Φ, a transform of the backward signals: Ω̃(B) = Σ_j ω̃(σ_j(B)).

    Args:
        penalty_on_transform: ω on the singular values of M_L.
        scale_invariant, scales: as in ``BlockStructure``.
    """

    penalty_on_transform: Penalty = field(default_factory=Quadratic)

    @property
    def sides(self) -> Mapping[str, Penalty]:
        return {"left": self.penalty_on_transform}


@dataclass(frozen=True)
class Right(Spectral):
    """Φ M_Rᵀ, a transform of the layer's inputs: Ω̃(B) = Σ_j ω̃(σ_j(B)).

    Args:
        penalty_on_transform: ω on the singular values of M_R.
        scale_invariant, scales: as in ``BlockStructure``.
    """

    penalty_on_transform: Penalty = field(default_factory=Quadratic)

    @property
    def sides(self) -> Mapping[str, Penalty]:
        return {"right": self.penalty_on_transform}


@dataclass(frozen=True)
class TwoSided(Spectral):
    """M_L Φ M_Rᵀ, the transforms that a network's layer can learn: Ω̃(B) = Σ_j (ω_L ⊕ ω_R)~(σ_j(B)).

    With B = U diag(σ) Vᵀ the best factors are M_L = I + U diag(a − 1) Uᵀ and M_R = I + V diag(b − 1) Vᵀ, where (a, b)
    minimizes ω_L(a) + ω_R(b) + σ²/(ab)².

    Args:
        left: ω_L on the singular values of M_L.
        right: ω_R on the singular values of M_R; None takes ``left`` for both sides.
        scale_invariant, scales: as in ``BlockStructure``.

    Source: LeJeune & Alemohammad, CPAL 2024, §3.

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


TWO_SIDED = TwoSided()
"""The default ``structure``: the transforms that a network's layer can learn."""
