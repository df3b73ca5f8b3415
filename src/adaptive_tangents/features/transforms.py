"""Feature transforms M: structures return them, and features are adapted by them (theory: φ → Mφ).

A block is transformed on its sides, Φ → M_L Φ M_Rᵀ, or entry by entry, Φ → Z ∘ Φ. The joint transform of the Full
structure scales one direction that runs through all blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.linalg.factor_products import times


@dataclass(frozen=True, eq=False)
class LowRank:
    """A symmetric side factor kept as identity plus low rank, M = I + U diag(g - 1) Uᵀ.

    Attributes:
        directions: U, orthonormal columns (d, k).
        gains: g, the singular values of M along them (k,).
    """

    directions: Float[Tensor, "d k"]
    gains: Float[Tensor, " k"]

    def apply(self, rows: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """M times each row vector of the last dimension.

        Args:
            rows: row vectors (..., d).
        """
        directions = self.directions.to(rows.dtype)
        return rows + times(times(rows, directions) * (self.gains - 1).to(rows.dtype), directions.mT)

    def matrix(self) -> Float[Tensor, "d d"]:
        """M itself."""
        return self.apply(torch.eye(self.directions.shape[0], device="cpu").to(self.directions))

    def squared(self) -> "LowRank":
        """MᵀM."""
        return LowRank(self.directions, self.gains**2)

    def inverse(self) -> "LowRank":
        """M⁻¹."""
        return LowRank(self.directions, 1 / self.gains)


@dataclass(frozen=True, eq=False)
class Scaled:
    """A diagonal side factor, M = diag(g): one gain per unit.

    Attributes:
        gains: the gains g (d,).

    >>> Scaled(torch.tensor([1.0, 3.0])).apply(torch.tensor([[5.0, 5.0]]))
    tensor([[ 5., 15.]])
    """

    gains: Float[Tensor, " d"]

    def apply(self, rows: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """M times each row vector of the last dimension.

        Args:
            rows: row vectors (..., d).
        """
        return rows * self.gains.to(rows.dtype)

    def matrix(self) -> Float[Tensor, "d d"]:
        """M itself."""
        return torch.diag(self.gains)

    def squared(self) -> "Scaled":
        """MᵀM."""
        return Scaled(self.gains**2)

    def inverse(self) -> "Scaled":
        """M⁻¹."""
        return Scaled(1 / self.gains)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A side factor M given as any square matrix.

    Attributes:
        values: the matrix M (d, d).
    """

    values: Float[Tensor, "d d"]

    def apply(self, rows: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """M times each row vector of the last dimension.

        Args:
            rows: row vectors (..., d).
        """
        return times(rows, self.values.to(rows.dtype).mT)

    def matrix(self) -> Float[Tensor, "d d"]:
        """M itself."""
        return self.values


@dataclass(frozen=True, eq=False)
class Update:
    """A side factor kept as identity plus any low rank, M = I + U Vᵀ: it reads along V and writes along U.

    Attributes:
        written: U, the directions written along (d, k).
        read: V, the directions read along (d, k).
    """

    written: Float[Tensor, "d k"]
    read: Float[Tensor, "d k"]

    def apply(self, rows: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """M times each row vector of the last dimension.

        Args:
            rows: row vectors (..., d).
        """
        return rows + times(times(rows, self.read.to(rows.dtype)), self.written.to(rows.dtype).mT)

    def matrix(self) -> Float[Tensor, "d d"]:
        """M itself."""
        return self.apply(torch.eye(self.read.shape[0], device="cpu").to(self.read)).mT


@dataclass(frozen=True)
class Modal:
    """A side factor that acts on the modes of its side, M = M₁ ⊗ M₂ ⊗ ...; a bias column after them stays as it is.

    Attributes:
        sizes: the size of each mode as in ``Block.modes``, the slowest first ("in" × "spatial" for a convolution).
        factors: a side factor for each mode; None is the identity.
    """

    sizes: tuple[int, ...]
    factors: "tuple[LowRank | Scaled | Matrix | None, ...]"

    def apply(self, rows: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """M times each row vector of the last dimension.

        Args:
            rows: row vectors (..., d); d is at least the product of the sizes.
        """
        total = prod(self.sizes)
        modes = rows[..., :total].reshape(*rows.shape[:-1], *self.sizes)
        for k, factor in enumerate(self.factors):
            if factor is not None:
                axis = k - len(self.sizes)
                modes = factor.apply(modes.movedim(axis, -1)).movedim(-1, axis)
        return torch.cat([modes.reshape(*rows.shape[:-1], total), rows[..., total:]], -1)

    def matrix(self) -> Float[Tensor, "d d"]:
        """M on the modes alone, without a bias column."""
        parts = [None if factor is None else factor.matrix().contiguous() for factor in self.factors]
        like = next((part for part in parts if part is not None), torch.empty(0, device="cpu"))
        whole = like.new_ones(1, 1)
        for size, part in zip(self.sizes, parts, strict=True):
            whole = torch.kron(whole, torch.eye(size, device="cpu").to(like) if part is None else part)
        return whole


Side = LowRank | Scaled | Matrix | Update | Modal


@dataclass(frozen=True)
class Sides:
    """The transform Φ → scale · M_L Φ M_Rᵀ of one block.

    Attributes:
        left: M_L on the output units; None is the identity.
        right: M_R on the input units; None is the identity.
        scale: a factor for the whole block.
    """

    left: Side | None = None
    right: Side | None = None
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Entrywise:
    """The transform Φ → Z ∘ Φ of one block: a diagonal M.

    Attributes:
        gains: one gain Z per matrix entry (o, i).
    """

    gains: Float[Tensor, "o i"] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Joint:
    """The transform M = I + (z - 1) b bᵀ over all parameters at once.

    Attributes:
        direction: the unit vector b, as a matrix (o, i) for each block, by name.
        gain: the gain z along b.
    """

    direction: Mapping[str, Float[Tensor, "_o _i"]] = field(repr=False)
    gain: float


Transform = Sides | Entrywise | Joint


def is_identity(transforms: Mapping[str, Transform]) -> bool:
    """Whether transforms, as structures return them, are all the identity."""
    return all(
        transform.gain == 1
        if isinstance(transform, Joint)
        else bool((transform.gains == 1).all())
        if isinstance(transform, Entrywise)
        else transform.scale == 1 and all(does_nothing(side) for side in (transform.left, transform.right))
        for transform in transforms.values()
    )


def does_nothing(side: Side | None) -> bool:
    """Whether a side is the identity."""
    if side is None:
        return True
    if isinstance(side, Modal):
        return all(does_nothing(factor) for factor in side.factors)
    return isinstance(side, LowRank | Scaled) and bool((side.gains == 1).all())


def squared(transforms: Mapping[str, Transform]) -> dict[str, Transform]:
    """MᵀM of symmetric transforms as structures return them, in the form that is fastest to apply to matrices."""
    joint = {id(t): Joint(t.direction, t.gain**2) for t in transforms.values() if isinstance(t, Joint)}
    found: dict[str, Transform] = {}
    for name, transform in transforms.items():
        if isinstance(transform, Joint):
            found[name] = joint[id(transform)]
        elif isinstance(transform, Entrywise):
            found[name] = Entrywise(transform.gains**2)
        else:
            found[name] = Sides(_squared(transform.left), _squared(transform.right), transform.scale**2)
    return found


def _squared(side: Side | None) -> Side | None:
    if isinstance(side, Modal):
        return Modal(side.sizes, tuple(None if f is None else _squared_factor(f) for f in side.factors))
    return None if side is None else _squared_factor(side)


def _squared_factor(side: LowRank | Scaled | Matrix | Update) -> LowRank | Scaled | Matrix:
    if isinstance(side, Update):
        matrix = side.matrix()
        return Matrix(matrix.mT @ matrix)
    if isinstance(side, LowRank) and 2 * side.directions.shape[1] > side.directions.shape[0]:
        return Matrix(side.squared().matrix())
    return Matrix(side.values @ side.values) if isinstance(side, Matrix) else side.squared()


def transform_matrices(
    matrices: Mapping[str, Float[Tensor, "_o _i"]], transforms: Mapping[str, Transform]
) -> dict[str, Float[Tensor, "_o _i"]]:
    """M applied to one matrix per block: B → scale · M_L B M_Rᵀ, Z ∘ B, or the joint transform of all of them.

    Args:
        matrices: a matrix B (o, i) for each block, by name.
        transforms: a transform for each block to change, by name; other matrices stay as they are.
    """
    moved = dict(matrices)
    for name, transform in transforms.items():
        if isinstance(transform, Sides):
            matrix = moved[name] if transform.right is None else transform.right.apply(moved[name])
            matrix = matrix if transform.left is None else transform.left.apply(matrix.mT).mT
            moved[name] = transform.scale * matrix
        elif isinstance(transform, Entrywise):
            moved[name] = transform.gains.to(moved[name].dtype) * moved[name]
    for joint in {id(t): t for t in transforms.values() if isinstance(t, Joint)}.values():
        along = sum(float((matrix * moved[name]).sum()) for name, matrix in joint.direction.items())
        for name, matrix in joint.direction.items():
            moved[name] = moved[name] + (joint.gain - 1) * along * matrix
    return moved
