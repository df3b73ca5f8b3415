"""The subspaces that features span: a fit needs only these of each block, however wide its layer is.

If the inputs h of all samples are combinations of Q's columns, so are the rows of every Σ α_k Φ(x_k), before and after a
transform. If a regularizer is invariant under rotations of that side, then Ω̃(B̃Qᵀ) = Ω̃(B̃), the optimum has this form, and
all decompositions are of the smaller B̃. The same holds for the output side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.summands import Factors, Flipped, Lookup, Outer
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.features.transforms import Joint, LowRank, Matrix, Side, Sides, Transform
from adaptive_tangents.structures.base import Matrices, Structure


@dataclass(frozen=True)
class Span:
    """Orthonormal columns Q (d, k) that span a side's rows."""

    columns: Float[Tensor, "d k"]

    @property
    def rank(self) -> int:
        return self.columns.shape[1]

    def down(self, rows: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch k"]:
        """Qᵀx."""
        return rows @ self.columns

    def up(self, rows: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch d"]:
        """Qx."""
        return rows @ self.columns.mT


@dataclass(frozen=True)
class Kept:
    """The entries of a side that are nonzero for some sample: Q is columns of the identity."""

    index: Int[Tensor, " k"]
    size: int

    @property
    def rank(self) -> int:
        return len(self.index)

    def down(self, rows: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch k"]:
        """Qᵀx."""
        return rows[..., self.index]

    def up(self, rows: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch d"]:
        """Qx."""
        return rows.new_zeros(*rows.shape[:-1], self.size).index_copy(-1, self.index, rows)


Basis = Span | Kept


@dataclass(frozen=True)
class Subspace:
    """A block's bases on its output side and its input side; None keeps the side whole."""

    left: Basis | None = None
    right: Basis | None = None


@dataclass(frozen=True)
class Compressed:
    """Features in bases of their spans, with maps of coefficients both ways and of transforms back."""

    features: TangentFeatures
    subspaces: Mapping[str, Subspace]

    def down(self, matrices: Matrices) -> dict[str, Tensor]:
        """B ↦ Q_LᵀBQ_R, for every block."""
        return {name: _down(matrix, self.subspaces[name]) for name, matrix in matrices.items()}

    def up(self, matrices: Matrices) -> dict[str, Tensor]:
        """B̃ ↦ Q_LB̃Q_Rᵀ, for every block."""
        return {name: _up(matrix, self.subspaces[name]) for name, matrix in matrices.items()}

    def up_transforms(self, transforms: Mapping[str, Transform]) -> dict[str, Transform]:
        """Transforms within the subspaces, extended by the identity."""
        joint = {
            id(t): Joint(self.up(t.direction), t.gain) for t in transforms.values() if isinstance(t, Joint)
        }  # a transform of all blocks stays one object
        found: dict[str, Transform] = {}
        for name, transform in transforms.items():
            space = self.subspaces[name]
            if isinstance(transform, Joint):
                found[name] = joint[id(transform)]
            elif isinstance(transform, Sides):
                found[name] = replace(
                    transform, left=_whole(transform.left, space.left), right=_whole(transform.right, space.right)
                )
            else:
                found[name] = transform
        return found


def compressed(feats: TangentFeatures, structure: Structure) -> Compressed:
    """The features in their spans, on sides where these are smaller and the structure is rotation-invariant."""
    rotates = structure.rotates(feats.blocks)
    subspaces = {name: _subspace(block, *rotates[name]) for name, block in feats.blocks.items()}
    blocks = {name: _restricted(block, subspaces[name]) for name, block in feats.blocks.items()}
    return Compressed(replace(feats, blocks=blocks), subspaces)


def _subspace(block: Block, left: bool, right: bool) -> Subspace:
    parts = block.summands
    factors = [part for part in parts if isinstance(part, Outer | Lookup | Flipped)]
    if len(factors) < len(parts):
        return Subspace()
    looked = [part for part in factors if isinstance(part, Lookup)]
    outputs: list[Tensor] = [part.inputs if isinstance(part, Flipped) else part.backward for part in factors]
    inputs = [
        part.backward if isinstance(part, Flipped) else part.inputs for part in factors if not isinstance(part, Lookup)
    ]
    basis: Basis | None = None
    if right and not looked:
        basis = _span(inputs)
    elif right and not inputs:
        basis = _used(looked, block.shape[1])
    return Subspace(_span(outputs) if left else None, basis)


def _span(rows: Sequence[Float[Tensor, "*_batch d"]]) -> Span | None:
    """A basis of the rows' span; None unless rows are fewer than columns."""
    count, size = sum(part[..., 0].numel() for part in rows), rows[0].shape[-1]
    if count >= size:
        return None
    return Span(torch.linalg.qr(torch.cat([part.reshape(-1, size) for part in rows]).mT)[0])


def _used(parts: Sequence[Lookup], size: int) -> Kept | None:
    """The rows of a table that are looked up; None if that is all of them."""
    if any(part.directions.shape[0] for part in parts):
        return None
    index: Tensor = torch.unique(torch.cat([part.index.flatten() for part in parts]))
    return Kept(index, size) if len(index) < size else None


def _restricted(block: Block, space: Subspace) -> Block:
    if space.left is None and space.right is None:
        return block
    parts = [_restricted_part(part, space) for part in block.summands if isinstance(part, Outer | Lookup | Flipped)]
    o, i = (
        size if basis is None else basis.rank
        for size, basis in zip(block.shape, (space.left, space.right), strict=True)
    )
    return replace(block.of(parts), shape=(o, i))


def _restricted_part(part: Factors, space: Subspace) -> Factors:
    if isinstance(part, Flipped):
        moved = _restricted_part(Outer(part.backward, part.inputs), Subspace(space.right, space.left))
        return Flipped(moved.backward, moved.inputs) if isinstance(moved, Outer) else moved
    backward = part.backward if space.left is None else space.left.down(part.backward)
    part = replace(part, backward=backward)
    if isinstance(part, Lookup):
        return part.restricted(space.right.index) if isinstance(space.right, Kept) else part
    return part if space.right is None else Outer(backward, space.right.down(part.inputs))


def _down(matrix: Tensor, space: Subspace) -> Tensor:
    matrix = matrix if space.right is None else space.right.down(matrix)
    return matrix if space.left is None else space.left.down(matrix.mT).mT


def _up(matrix: Tensor, space: Subspace) -> Tensor:
    matrix = matrix if space.right is None else space.right.up(matrix)
    return matrix if space.left is None else space.left.up(matrix.mT).mT


def _whole(side: Side | None, basis: Basis | None) -> Side | None:
    """I + Q(M − I)Qᵀ."""
    if side is None or basis is None:
        return side
    if isinstance(side, LowRank):
        return LowRank(basis.up(side.directions.mT).mT, side.gains)
    change = side.matrix()
    change = basis.up(basis.up(change - torch.eye(basis.rank, device="cpu").to(change)).mT).mT
    return Matrix(change + torch.eye(change.shape[0], device="cpu").to(change))
