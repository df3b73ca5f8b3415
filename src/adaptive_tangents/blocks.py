"""One parameter block's features, Φ(x) = Σ_t δ_t(x) h_t(x)ᵀ, and their contraction to a kernel.

Three kinds of summand make up a block, and any block may hold one of each:

- ``Outer``: a sum of outer products over positions t, the factors of every layer that has them;
- ``Dense``: the features themselves, for a parameter that has no factors;
- ``Shared``: fixed directions D_k with coefficients s_k(x), what a joint transform of all blocks adds to each.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptive_tangents.transforms import Side

Outputs = Literal["full", "trace", "diagonal"]
Index = slice | Int[Tensor, " _k"]


@dataclass(frozen=True)
class Outer:
    """Φ(x_k)_c = Σ_t δ_{k,t,c} h_{k,t}ᵀ: backward signals δ (n, t, c, o) and layer inputs h (n, t, i)."""

    backward: Float[Tensor, "n t c o"]
    inputs: Float[Tensor, "n t i"]

    def features(self, rows: slice) -> Float[Tensor, "n c r i"]:
        """The features of a range of output units, materialised."""
        backward = self.backward[..., rows]
        n, t, c, r = backward.shape
        return (backward.reshape(n, t, c * r).mT @ self.inputs).reshape(n, c, r, self.inputs.shape[-1])

    def inner(self, directions: Float[Tensor, "k o i"]) -> Float[Tensor, "n c k"]:
        """⟨Φ(x)_c, D_k⟩ for each of the fixed matrices D."""
        n, t, _, o = self.backward.shape
        k = directions.shape[0]
        projected = (self.inputs @ directions.flatten(0, 1).mT).reshape(n, t, k, o)
        return (self.backward @ projected.mT).sum(1)

    def combine(self, weights: Float[Tensor, "n c"]) -> Float[Tensor, "o i"]:
        """Σ_{k,c} a_{k,c} Φ(x_k)_c."""
        weighted = torch.einsum("nc,ntco->nto", weights, self.backward)
        return weighted.flatten(0, 1).mT @ self.inputs.flatten(0, 1)

    def transformed(self, left: Side | None, right: Side | None) -> "Outer":
        return Outer(
            self.backward if left is None else left.apply(self.backward),
            self.inputs if right is None else right.apply(self.inputs),
        )

    def scaled(self, scale: float) -> "Outer":
        return Outer(scale * self.backward, self.inputs)

    def map(self, function: "_Map") -> "Outer":
        return Outer(function(self.backward), function(self.inputs))


@dataclass(frozen=True)
class Dense:
    """Materialised features Φ (n, c, o, i)."""

    values: Float[Tensor, "n c o i"]

    def features(self, rows: slice) -> Float[Tensor, "n c r i"]:
        """The features of a range of output units."""
        return self.values[:, :, rows]

    def inner(self, directions: Float[Tensor, "k o i"]) -> Float[Tensor, "n c k"]:
        """⟨Φ(x)_c, D_k⟩ for each of the fixed matrices D."""
        return self.values.flatten(2) @ directions.flatten(1).mT

    def combine(self, weights: Float[Tensor, "n c"]) -> Float[Tensor, "o i"]:
        """Σ_{k,c} a_{k,c} Φ(x_k)_c."""
        return torch.einsum("nc,ncoi->oi", weights, self.values)

    def transformed(self, left: Side | None, right: Side | None) -> "Dense":
        values = self.values if right is None else right.apply(self.values)
        return Dense(values if left is None else left.apply(values.mT).mT)

    def scaled(self, scale: float) -> "Dense":
        return Dense(scale * self.values)

    def map(self, function: "_Map") -> "Dense":
        return Dense(function(self.values))


@dataclass(frozen=True)
class Shared:
    """Φ(x_k)_c = Σ_j s_{k,c,j} D_j: coefficients s (n, c, k) on directions D (k, o, i) common to all samples."""

    coefficients: Float[Tensor, "n c k"]
    directions: Float[Tensor, "k o i"]

    def features(self, rows: slice) -> Float[Tensor, "n c r i"]:
        """The features of a range of output units, materialised."""
        return torch.einsum("nck,kri->ncri", self.coefficients, self.directions[:, rows])

    def inner(self, directions: Float[Tensor, "m o i"]) -> Float[Tensor, "n c m"]:
        """⟨Φ(x)_c, D_k⟩ for each of the fixed matrices D."""
        return self.coefficients @ (self.directions.flatten(1) @ directions.flatten(1).mT)

    def combine(self, weights: Float[Tensor, "n c"]) -> Float[Tensor, "o i"]:
        """Σ_{k,c} a_{k,c} Φ(x_k)_c."""
        return torch.einsum("k,koi->oi", torch.einsum("nc,nck->k", weights, self.coefficients), self.directions)

    def transformed(self, left: Side | None, right: Side | None) -> "Shared":
        return Shared(self.coefficients, Dense(self.directions[None]).transformed(left, right).values[0])

    def scaled(self, scale: float) -> "Shared":
        return Shared(scale * self.coefficients, self.directions)

    def map(self, function: "_Map") -> "Shared":
        return Shared(function(self.coefficients), self.directions.to(function.dtype or self.directions.dtype))


@dataclass(frozen=True)
class _Map:
    """What happens to every tensor that runs over samples: selection, then conversion."""

    index: Index | None = None
    dtype: torch.dtype | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        tensor = tensor if self.index is None else tensor[self.index]
        return tensor if self.dtype is None else tensor.to(self.dtype)


@dataclass(frozen=True)
class Slot:
    """Where a parameter sits in its block's matrix: columns ``column`` to ``column + width``.

    ``transposed``: the parameter's leading dimensions are the columns, as layers that store their weights inputs first.
    """

    parameter: str
    shape: tuple[int, ...]
    column: int
    width: int
    transposed: bool = False

    def place(self, values: Tensor, rows: int) -> Tensor:
        """The parameter's values (*lead, *shape), whatever dimensions come first, as its columns (*lead, o, width)."""
        lead = values.shape[: values.ndim - len(self.shape)]
        if self.transposed:
            return values.reshape(*lead, self.width, rows).mT
        return values.reshape(*lead, rows, self.width)

    def take(self, matrix: Tensor) -> Tensor:
        """The parameter's values (*lead, *shape) out of the block's matrix (*lead, o, i)."""
        columns = matrix[..., self.column : self.column + self.width]
        return (columns.mT if self.transposed else columns).reshape((*matrix.shape[:-2], *self.shape))


@dataclass(frozen=True)
class Block:
    """The features of one parameter block, a sum of outer products over positions for every sample and output.

    ``shape`` is (o, i), ``slots`` say which parameters make up the matrix, ``positions`` is t, ``kind`` is "factored" or
    "materialised".
    """

    name: str
    shape: tuple[int, int]
    slots: tuple[Slot, ...]
    outer: Outer | None = None
    dense: Dense | None = None
    shared: Shared | None = None

    @property
    def kind(self) -> str:
        return "factored" if self.dense is None else "materialised"

    @property
    def positions(self) -> int:
        return self.outer.backward.shape[1] if self.outer is not None else 0

    @property
    def samples(self) -> int:
        return self._like.shape[0]

    @property
    def outputs(self) -> int:
        return self._like.shape[2 if self.outer is not None else 1]

    @property
    def _like(self) -> Tensor:
        part = self.summands[0]
        return (
            part.backward if isinstance(part, Outer) else part.values if isinstance(part, Dense) else part.coefficients
        )

    @property
    def summands(self) -> tuple[Outer | Dense | Shared, ...]:
        return tuple(part for part in (self.outer, self.dense, self.shared) if part is not None)

    @property
    def bytes(self) -> int:
        """Memory held by this block's features."""
        return sum(tensor.numel() * tensor.element_size() for part in self.summands for tensor in vars(part).values())

    def features(self, rows: slice = slice(None)) -> Float[Tensor, "n c r i"]:
        """Φ of a range of output units, materialised."""
        return sum_tensors([part.features(rows) for part in self.summands])

    def inner(self, directions: Float[Tensor, "k o i"]) -> Float[Tensor, "n c k"]:
        """⟨Φ(x)_c, D_k⟩ for each of the fixed matrices D."""
        return sum_tensors([part.inner(directions) for part in self.summands])

    def combine(self, weights: Float[Tensor, "n c"]) -> Float[Tensor, "o i"]:
        """Σ_{k,c} a_{k,c} Φ(x_k)_c."""
        return sum_tensors([part.combine(weights) for part in self.summands])

    def transformed(self, left: Side | None, right: Side | None, scale: float = 1.0) -> "Block":
        """The block of scale · M_L Φ M_Rᵀ, again in factors."""
        block = self._each(lambda part: part.transformed(left, right))
        return block if scale == 1.0 else block.scaled(scale)

    def scaled(self, scale: float) -> "Block":
        """The block of scale · Φ."""
        return self._each(lambda part: part.scaled(scale))

    def plus(self, shared: Shared) -> "Block":
        """The block of Φ plus a shared summand."""
        if self.shared is not None:
            shared = Shared(
                torch.cat([self.shared.coefficients, shared.coefficients], -1),
                torch.cat([self.shared.directions, shared.directions]),
            )
        return replace(self, shared=shared)

    def map(self, *, index: Index | None = None, dtype: torch.dtype | None = None) -> "Block":
        """The block of some of the samples, or in another dtype."""
        function = _Map(index, dtype)
        return self._each(lambda part: part.map(function))

    def _each(self, change: Callable[[Any], Any]) -> "Block":
        outer, dense, shared = (
            None if part is None else change(part) for part in (self.outer, self.dense, self.shared)
        )
        return replace(self, outer=outer, dense=dense, shared=shared)

    def split(self, matrix: Float[Tensor, "o i"]) -> dict[str, Tensor]:
        """A block matrix as its parameters."""
        return {slot.parameter: slot.take(matrix) for slot in self.slots}

    def join(self, parameters: Mapping[str, Tensor]) -> Float[Tensor, "o i"]:
        """Parameters as the block matrix."""
        columns = [slot.place(parameters[slot.parameter], self.shape[0]) for slot in self.slots]
        return columns[0] if len(columns) == 1 else torch.cat(columns, 1)


def sum_blocks(blocks: list[Block]) -> Block:
    """The block of Σ_q Φ_q: positions of all the blocks, one after the other."""
    outers = [block.outer for block in blocks if block.outer is not None]
    denses = [block.dense.values for block in blocks if block.dense is not None]
    outer = (
        Outer(torch.cat([p.backward for p in outers], 1), torch.cat([p.inputs for p in outers], 1)) if outers else None
    )
    total = replace(blocks[0], outer=outer, dense=Dense(sum_tensors(denses)) if denses else None, shared=None)
    for block in blocks:
        total = total if block.shared is None else total.plus(block.shared)
    return total


def sum_tensors(tensors: list[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def ranges(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``total``."""
    for start in range(0, total, max(1, size)):
        yield slice(start, min(total, start + max(1, size)))
