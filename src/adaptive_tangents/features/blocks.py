"""The features of one parameter block, Φ(x) = Σ_t δ_t(x) h_t(x)ᵀ, and where its parameters sit in the matrix.

A block is a sum of summands (features.summands), at most one of each kind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.summands import (
    Dense,
    Factors,
    Flipped,
    Index,
    Lookup,
    Outer,
    SampleMap,
    Shared,
    Summand,
    Weighted,
    entrywise,
    factors_of,
    sum_tensors,
    tensors_of,
)
from adaptive_tangents.features.transforms import Side
from adaptive_tangents.linalg.factor_products import joined

_Factors = TypeVar("_Factors", Outer, Flipped)
_WORTH_SUMMING = 4_000_000  # bytes; for smaller savings, factors stay as they are


@dataclass(frozen=True)
class Slot:
    """Where a parameter sits in its block's matrix: in the columns from ``column`` to ``column + width``.

    ``transposed`` says that the parameter's leading dimensions are the columns: its layer stores weights inputs first.
    """

    parameter: str
    shape: tuple[int, ...]
    column: int
    width: int
    transposed: bool = False

    def place(self, values: Tensor, rows: int) -> Tensor:
        """Values (*lead, *shape) of the parameter, with any leading dimensions, as its columns (*lead, o, width)."""
        lead = values.shape[: values.ndim - len(self.shape)]
        if self.transposed:
            return values.reshape(*lead, self.width, rows).mT
        return values.reshape(*lead, rows, self.width)

    def take(self, matrix: Tensor) -> Tensor:
        """The parameter's values (*lead, *shape) from the block's matrix (*lead, o, i)."""
        columns = matrix[..., self.column : self.column + self.width]
        return (columns.mT if self.transposed else columns).reshape((*matrix.shape[:-2], *self.shape))


@dataclass(frozen=True)
class Block:
    """The features Φ(x) = Σ_t δ_t(x) h_t(x)ᵀ of one parameter block, a matrix (o, i) for every sample and output.

    Φ is the sum of the summands that are not None; their types are in ``features.summands``.

    Attributes:
        name: the name of the block.
        shape: output and input units (o, i) of the matrix; a bias is its last input column.
        slots: which parameters fill which columns of the matrix.
        outer: factors δ (n, t, c, o) and h (n, t, i).
        dense: materialized features (n, c, o, i).
        shared: directions that all samples share, with coefficients.
        lookup: factors with inputs kept as indices, for embeddings.
        flipped: factors with the signals on the input side.
        weighted: factors times one gain per matrix entry.
        modes: name and size of each mode that the input side unfolds into, the slowest first ("in" × "spatial" for
            convolutions); a bias column comes after them.
        summed: whether ``dense`` was made by summing factors over positions.
    """

    name: str
    shape: tuple[int, int]
    slots: tuple[Slot, ...]
    outer: Outer | None = None
    dense: Dense | None = None
    shared: Shared | None = None
    lookup: Lookup | None = None
    flipped: Flipped | None = None
    weighted: Weighted | None = None
    modes: tuple[tuple[str, int], ...] = ()
    summed: bool = False

    @property
    def kind(self) -> str:
        """The form of the features.

        "factored"; "summed" where factors were summed over positions to take less memory; "materialized" where there
        are no factors.
        """
        if self.dense is None:
            return "factored"
        return "summed" if self.summed else "materialized"

    @property
    def positions(self) -> int:
        """Number of positions t."""
        return sum(factors.backward.shape[1] for part in self.summands for factors in factors_of(part))

    @property
    def samples(self) -> int:
        return int(tensors_of(self.summands[0])[0].shape[0])

    @property
    def outputs(self) -> int:
        part = self.summands[0]
        if isinstance(part, Dense | Shared):
            return tensors_of(part)[0].shape[1]
        return factors_of(part)[0].backward.shape[2]

    @property
    def summands(self) -> tuple[Summand, ...]:
        parts = (self.outer, self.lookup, self.flipped, self.weighted, self.dense, self.shared)
        return tuple(part for part in parts if part is not None)

    @property
    def bytes(self) -> int:
        """Bytes that this block's features take."""
        return sum(tensor.numel() * tensor.element_size() for part in self.summands for tensor in tensors_of(part))

    def features(self, rows: slice = slice(None)) -> Float[Tensor, "n c r i"]:
        """Φ of a range of output units, materialized.

        Args:
            rows: the output units; all of them by default.
        """
        return sum_tensors([part.features(rows) for part in self.summands])

    def inner(self, directions: Float[Tensor, "k o i"]) -> Float[Tensor, "n c k"]:
        """⟨Φ(x)_c, D_k⟩ for each of the fixed matrices D.

        Args:
            directions: the matrices D (k, o, i).
        """
        return sum_tensors([part.inner(directions) for part in self.summands])

    def combine(self, weights: Float[Tensor, "n c"]) -> Float[Tensor, "o i"]:
        """Σ_{k,c} a_{k,c} Φ(x_k)_c.

        Args:
            weights: one weight a per sample and output (n, c).
        """
        return sum_tensors([part.combine(weights) for part in self.summands])

    def transformed(self, left: Side | None, right: Side | None, scale: float = 1.0) -> "Block":
        """The block of scale · M_L Φ M_Rᵀ, again in factors.

        Args:
            left: M_L on the output units; None is the identity.
            right: M_R on the input units; None is the identity.
            scale: a factor for the whole block.
        """
        block = self.of([part.transformed(left, right) for part in self.summands])
        return block if scale == 1.0 else block.scaled(scale)

    def entrywise(self, gains: Float[Tensor, "o i"]) -> "Block":
        """The block of Z ∘ Φ; factors are kept, and the gains beside them.

        Args:
            gains: one gain Z per matrix entry (o, i).
        """
        return self.of([entrywise(part, gains) for part in self.summands])

    def scaled(self, scale: float) -> "Block":
        """The block of scale · Φ.

        Args:
            scale: a factor for the whole block.
        """
        return self.of([part.scaled(scale) for part in self.summands])

    def plus(self, shared: Shared) -> "Block":
        """The block of Φ plus a shared summand.

        Args:
            shared: fixed directions with a coefficient for each sample and output.
        """
        return self.of([*self.summands, shared])

    def without_shared(self) -> "Block":
        """The block of Φ without its shared summand."""
        return self if self.shared is None else replace(self, shared=None)

    def map(self, *, index: Index | None = None, dtype: torch.dtype | None = None) -> "Block":
        """The block of some of the samples, or in another dtype.

        Args:
            index: a slice of samples or a vector of their indices; None is all of them.
            dtype: the dtype to convert to; None keeps it.
        """
        if index is None and all(
            tensor.dtype == dtype or not tensor.is_floating_point()
            for part in self.summands
            for tensor in tensors_of(part)
        ):
            return self
        function = SampleMap(index, dtype)
        return self.of([part.map(function) for part in self.summands])

    def of(self, parts: Sequence[Summand]) -> "Block":
        """A block with this one's name and slots, whose features are the sum of some summands.

        Args:
            parts: the summands, of any kinds; those of the same kind are joined.
        """
        if len(parts) == 1:
            return replace(self, **{**_NO_SUMMANDS, _KINDS[type(parts[0])]: parts[0]})
        weighted = [part for part in parts if isinstance(part, Weighted)]
        if any(not torch.equal(part.gains, weighted[0].gains) for part in weighted):
            # Factors under different gains can only be joined once they are materialized.
            made = [Dense(part.features(slice(None))) for part in weighted]
            return self.of([*(part for part in parts if not isinstance(part, Weighted)), *made])
        outer, lookup, flipped = _by_kind(parts)
        return replace(
            self,
            outer=outer,
            lookup=lookup,
            flipped=flipped,
            weighted=_joined_weighted(weighted),
            dense=_summed([part for part in parts if isinstance(part, Dense)]),
            shared=_joined_shared([part for part in parts if isinstance(part, Shared)]),
        )

    def compact(self, *, copies: int = 1, least: int | None = None) -> "Block":
        """The block with Σ_t δ_t h_tᵀ summed over positions, if that saves memory.

        Args:
            copies: how many blocks like this one would be held with their positions side by side.
            least: bytes that summing must save; None is 4 MB.
        """
        factors = [part for part in self.summands if isinstance(part, Outer)]
        if not factors:
            return self
        n, _, c, _ = factors[0].backward.shape
        held = sum(part.backward.nbytes + part.inputs.nbytes for part in factors)
        size = n * c * self.shape[0] * self.shape[1] * factors[0].backward.element_size()
        if size > copies * held - (_WORTH_SUMMING if least is None else least):
            return self
        rest = [part for part in self.summands if not isinstance(part, Outer)]
        made = self.of([*rest, *(Dense(part.features(slice(None))) for part in factors)])
        return replace(made, summed=self.dense is None or self.summed)

    def split(self, matrix: Float[Tensor, "o i"]) -> dict[str, Tensor]:
        """A block matrix as its parameters, by name.

        Args:
            matrix: a matrix (o, i).
        """
        return {slot.parameter: slot.take(matrix) for slot in self.slots}

    def join(self, parameters: Mapping[str, Tensor]) -> Float[Tensor, "o i"]:
        """Parameters as a block matrix (o, i); the inverse of ``split``.

        Args:
            parameters: the values of the block's parameters, by name.
        """
        columns = [slot.place(parameters[slot.parameter], self.shape[0]) for slot in self.slots]
        return columns[0] if len(columns) == 1 else torch.cat(columns, 1)


_KINDS: Mapping[type[Summand], str] = {
    Outer: "outer", Dense: "dense", Shared: "shared", Lookup: "lookup", Flipped: "flipped", Weighted: "weighted",
}  # fmt: skip
_NO_SUMMANDS: Mapping[str, Any] = dict.fromkeys(_KINDS.values())


def check_finite_blocks(call: str, blocks: Mapping[str, Block]) -> None:
    """Raise TangentError naming the first block, and its first sample, whose features are not finite."""
    for name, block in blocks.items():
        for tensor in (held for part in block.summands for held in tensors_of(part)):
            if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum())):
                continue
            bad = ~torch.isfinite(tensor)
            if bool(bad.any()):
                # Gains and directions are of the block, not of a sample.
                own = len(tensor) == block.samples and tensor.ndim > 2
                where = f" at sample {int(bad.flatten(1).any(1).nonzero()[0, 0])}" if own else ""
                raise TangentError(
                    f"{call}: the features of block {name!r} are not finite{where}; remove the sample, or take the network "
                    "before its training diverged"
                )


def sum_blocks(blocks: list[Block]) -> Block:
    """The block of Σ_q Φ_q: the positions of all the blocks, concatenated."""
    total = blocks[0].of([part for block in blocks for part in block.summands])
    return replace(
        total, summed=all(block.dense is None or block.summed for block in blocks) and total.dense is not None
    )


def stack_blocks(blocks: list[Block]) -> Block:
    """The block of all the samples of several blocks, concatenated."""
    if len(blocks) == 1:
        return blocks[0]
    kinds = {tuple(type(held) for part in block.summands for held in (part, *factors_of(part))) for block in blocks}
    gains = [block.weighted.gains for block in blocks if block.weighted is not None]
    if len(kinds) > 1 or any(not torch.equal(gain, gains[0]) for gain in gains):
        made = blocks[0].of([Dense(torch.cat([block.features() for block in blocks]))])
        return replace(made, summed=all(block.kind != "materialized" for block in blocks))
    parts = [_stacked(same) for same in zip(*(block.summands for block in blocks), strict=True)]
    return replace(blocks[0].of(parts), summed=all(block.summed for block in blocks))


def _stacked(same: Sequence[Summand]) -> Summand:
    """Summands of one kind as one summand over all their samples."""
    first = same[0]
    if isinstance(first, Weighted):
        held = zip(*(factors_of(part) for part in same), strict=True)
        return Weighted(first.gains, tuple(part for parts in held for part in factors_of(_stacked(parts))))
    # A batch of one sample may use the parameter by other operations than a larger one, with other numbers of positions.
    positions = max((factors.backward.shape[1] for part in same for factors in factors_of(part)), default=0)
    tensors = {
        name: value if name == "directions" else joined([_lengthened(getattr(part, name), positions) for part in same])
        for name, value in vars(first).items()
    }
    return type(first)(**tensors)


def _lengthened(tensor: Tensor, positions: int) -> Tensor:
    """The tensor padded with zeros to this many positions; with 0 positions it stays as it is."""
    missing = positions - tensor.shape[1] if positions else 0
    return torch.nn.functional.pad(tensor, (*(0, 0) * (tensor.ndim - 2), 0, missing)) if missing else tensor


def _by_kind(parts: Sequence[Summand]) -> tuple[Outer | None, Lookup | None, Flipped | None]:
    """The factors joined by kind: at most one summand of each."""
    return (
        _joined([part for part in parts if isinstance(part, Outer)]),
        _joined_lookups([part for part in parts if isinstance(part, Lookup)]),
        _joined([part for part in parts if isinstance(part, Flipped)]),
    )


def _joined_weighted(parts: list[Weighted]) -> Weighted | None:
    """Factors under the same gains, joined."""
    if len(parts) <= 1:
        return parts[0] if parts else None
    held: list[Factors] = [factors for part in parts for factors in part.parts]
    return Weighted(parts[0].gains, tuple(part for part in _by_kind(held) if part is not None))


def _joined(parts: list[_Factors]) -> _Factors | None:
    """The positions of all summands, concatenated."""
    if len(parts) <= 1:
        return parts[0] if parts else None
    return type(parts[0])(
        joined([p.backward for p in parts], positions=True), joined([p.inputs for p in parts], positions=True)
    )


def _joined_lookups(parts: list[Lookup]) -> Lookup | None:
    """The positions of all lookups, concatenated; lookups of the same entries (the nodes of a path) are summed instead."""
    if len(parts) <= 1:
        return parts[0] if parts else None
    first = parts[0]
    if all(_at_places_of(first, part) for part in parts):
        return replace(first, backward=sum_tensors([part.backward for part in parts]))
    # Directions are concatenated too; a position has coefficients only on the directions of its own summand.
    ends = list(accumulate(len(part.directions) for part in parts))
    coefficients = [
        torch.nn.functional.pad(part.coefficients, (end - len(part.directions), ends[-1] - end))
        for part, end in zip(parts, ends, strict=True)
    ]
    return Lookup(
        torch.cat([part.backward for part in parts], 1),
        torch.cat([part.index for part in parts], 1),
        torch.cat([part.weights for part in parts], 1),
        torch.cat(coefficients, 1),
        torch.cat([part.directions for part in parts]),
    )


def _at_places_of(first: Lookup, part: Lookup) -> bool:
    """Whether both look up the same entries with the same weights, and no transform has moved them."""
    same = torch.equal(part.index, first.index) and torch.equal(part.weights, first.weights)
    return same and len(part.directions) == 0


def _summed(parts: list[Dense]) -> Dense | None:
    if len(parts) <= 1:
        return parts[0] if parts else None
    return Dense(sum_tensors([part.values for part in parts]))


def _joined_shared(parts: list[Shared]) -> Shared | None:
    if len(parts) <= 1:
        return parts[0] if parts else None
    return Shared(torch.cat([p.coefficients for p in parts], -1), torch.cat([p.directions for p in parts]))
