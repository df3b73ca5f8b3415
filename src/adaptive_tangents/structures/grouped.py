"""Structures with one factor for each group of a block's entries: the block, its rows, its columns, or every entry."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.features.transforms import Entrywise, Scaled, Sides, Transform
from adaptive_tangents.penalties.closed_forms import Penalty, Quadratic
from adaptive_tangents.structures.base import BlockSolution, BlockStructure, Matrices, shrinkage
from adaptive_tangents.structures.inner import Inner, joint


class Grouped(BlockStructure):
    """Ω̃(B) = Σ ω̃(‖B_g‖) over groups g of a block's entries, with one factor z_g for each: Φ_g → z_g Φ_g.

    A group runs along ``dimensions`` of the matrix: both (the block), 1 (a row), 0 (a column), none (an entry).
    """

    penalty_on_transform: Penalty

    @property
    @abstractmethod
    def dimensions(self) -> tuple[int, ...]:
        """The dimensions of B along which a group runs."""

    @abstractmethod
    def transform(self, gains: Float[Tensor, "_g _h"]) -> Transform:
        """The transform with these factors, of size 1 along ``dimensions``."""

    def rotates(self, names: Iterable[str]) -> dict[str, tuple[bool, bool]]:
        return dict.fromkeys(names, (0 in self.dimensions, 1 in self.dimensions))

    def block_solution(self, matrix: Tensor) -> BlockSolution:
        return self._solved(matrix, Inner((self.penalty_on_transform,), self._norms(matrix)))

    def block_solutions(self, matrices: Matrices) -> dict[str, BlockSolution]:
        if type(self).block_solution is not Grouped.block_solution:
            return super().block_solutions(matrices)
        inner = joint((self.penalty_on_transform,), [self._norms(matrix) for matrix in matrices.values()])
        found = zip(matrices.items(), inner, strict=True)
        return {name: self._solved(matrix, part) for (name, matrix), part in found}

    def _solved(self, matrix: Tensor, inner: Inner) -> BlockSolution:
        """The solution of a block with its norms in the scalar problem."""
        norms = inner.values

        def curvature(x: Tensor) -> Tensor:
            # A group of zeros has no direction.
            unit = torch.where(norms > 0, matrix / norms, 0.0)
            along = (unit * x).sum(self.dimensions, keepdim=True) if self.dimensions else unit * x
            return inner.slope * x + (inner.bend - inner.slope) * along * unit

        return BlockSolution(self.transform(inner.gains), inner.total, inner.slope * matrix, curvature)

    def block_dual(self, matrix: Tensor) -> float:
        return float(self.penalty_on_transform.induced().dual(self._norms(matrix)).sum())

    def block_proximal(self, matrix: Tensor, step: float) -> Tensor:
        return matrix * shrinkage(self.penalty_on_transform, self._norms(matrix), step)

    def _norms(self, matrix: Tensor) -> Tensor:
        if not self.dimensions:
            return matrix.abs()
        norms: Tensor = torch.linalg.vector_norm(matrix, dim=self.dimensions, keepdim=True)
        return norms


@dataclass(frozen=True)
class LayerScale(Grouped):
    """One factor for each block, M = s_ℓ I: Ω̃(β) = Σ_ℓ ω̃(‖B_ℓ‖), group sparsity over layers.

    Args:
        penalty_on_transform: ω on s_ℓ.
        scale_invariant, scales: as in ``BlockStructure``.
    """

    penalty_on_transform: Penalty = field(default_factory=Quadratic)
    whole_blocks = True

    def norms_of(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {name: (name,) for name in names}

    @property
    def dimensions(self) -> tuple[int, ...]:
        return (0, 1)

    def transform(self, gains: Tensor) -> Transform:
        return Sides(scale=float(gains))


@dataclass(frozen=True)
class Rows(Grouped):
    """One factor per output unit, Φ → diag(s) Φ: Ω̃(B) = Σ_o ω̃(‖B_o,:‖), sparsity over a layer's units.

    Args:
        penalty_on_transform: ω on each s_o.
        scale_invariant, scales: as in ``BlockStructure``.

    >>> Rows(Quadratic(1.0)).update({"w": torch.tensor([[4.0, 0.0], [0.0, 0.0]])})["w"].left.gains > 1
    tensor([ True, False])
    """

    penalty_on_transform: Penalty = field(default_factory=Quadratic)

    @property
    def dimensions(self) -> tuple[int, ...]:
        return (1,)

    def transform(self, gains: Tensor) -> Transform:
        return Sides(left=Scaled(gains[:, 0]))


@dataclass(frozen=True)
class Columns(Grouped):
    """One factor per input unit, Φ → Φ diag(s): Ω̃(B) = Σ_i ω̃(‖B_:,i‖), sparsity over a layer's inputs.

    The bias column counts as an input.

    Args:
        penalty_on_transform: ω on each s_i.
        scale_invariant, scales: as in ``BlockStructure``.

    >>> Columns(Quadratic(1.0)).update({"w": torch.tensor([[4.0, 0.0], [0.0, 0.0]])})["w"].right.gains > 1
    tensor([ True, False])
    """

    penalty_on_transform: Penalty = field(default_factory=Quadratic)

    @property
    def dimensions(self) -> tuple[int, ...]:
        return (0,)

    def transform(self, gains: Tensor) -> Transform:
        return Sides(right=Scaled(gains[0]))


@dataclass(frozen=True)
class Diagonal(Grouped):
    """One factor per parameter, Φ → Z ∘ Φ: Ω̃(β) = Σ_k ω̃(|β_k|), sparsity.

    Such gains are not a product of sides, so adapted kernels are computed from the features themselves.

    Args:
        penalty_on_transform: ω on each entry of Z.
        scale_invariant, scales: as in ``BlockStructure``.

    >>> Diagonal(Quadratic(2.0)).update({"w": torch.tensor([[4.0, 0.0]])})["w"].gains  # λ(z − 1)z³ = β²
    tensor([[2., 1.]])
    """

    penalty_on_transform: Penalty = field(default_factory=Quadratic)

    @property
    def dimensions(self) -> tuple[int, ...]:
        return ()

    def transform(self, gains: Tensor) -> Transform:
        return Entrywise(gains)
