"""Features as a fit multiplies with them: some blocks as columns of one matrix, the others as their factors.

All coefficients are one vector, block after block; ``Layout`` says where each block's matrix is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.solvers import costs
from adaptive_tangents.structures.base import Matrices

Vector = Float[Tensor, " k"]  # of the outputs
Coefficients = Float[Tensor, " p"]

_COPIES = 2  # of the matrix, while it is made


@dataclass(frozen=True)
class Layout:
    """The shapes of blocks, in their order within a vector of all entries."""

    shapes: Mapping[str, tuple[int, int]]

    @cached_property
    def sizes(self) -> list[int]:
        return [o * i for o, i in self.shapes.values()]

    def join(self, matrices: Matrices) -> Coefficients:
        """One matrix for each block, as one vector."""
        return torch.cat([matrices[name].reshape(-1) for name in self.shapes])

    def split(self, vector: Coefficients) -> dict[str, Tensor]:
        """The blocks of a vector, as views."""
        parts = torch.split(vector, self.sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


@dataclass(frozen=True)
class Factored:
    """A block Σ_t δ_t h_tᵀ, with the positions of a sample's signals side by side: few operations a product."""

    signals: Float[Tensor, "n c d"]
    inputs: Float[Tensor, "m i"]

    def inner(self, matrix: Float[Tensor, "o i"]) -> Float[Tensor, " k"]:
        """⟨Φ(x)_c, B⟩."""
        projected = self.inputs @ matrix.mT
        return (self.signals @ projected.reshape(len(self.signals), -1, 1)).reshape(-1)

    def combine(self, weights: Float[Tensor, "n c"]) -> Float[Tensor, "o i"]:
        """Σ a Φ(x)_c."""
        mixed = weights[:, None] @ self.signals
        return mixed.reshape(len(self.inputs), -1).mT @ self.inputs


@dataclass(frozen=True)
class HeldFeatures:
    """φβ and φᵀa with vectors of all blocks. ``rows`` (nc, q) are the features of the first blocks of the layout."""

    n: int
    c: int
    layout: Layout
    rows: Float[Tensor, "k q"] | None = field(repr=False)
    rest: Mapping[str, Block | Factored] = field(repr=False)
    cost: float = 0.0  # of ``inner`` and ``combine``, as in ``costs``

    def inner(self, vector: Coefficients) -> Vector:
        """φβ (nc,)."""
        matrices = self.layout.split(vector)
        found = [
            part.inner(matrices[name]) if isinstance(part, Factored) else part.inner(matrices[name][None]).reshape(-1)
            for name, part in self.rest.items()
        ]
        if self.rows is not None:
            found.append(self.rows @ vector[: self.rows.shape[1]])
        total = found[0]
        for part in found[1:]:
            total = total + part
        return total

    def combine(self, a: Vector) -> Coefficients:
        """φᵀa."""
        weights = a.reshape(self.n, self.c)
        parts = [] if self.rows is None else [a @ self.rows]
        return torch.cat([*parts, *(block.combine(weights).reshape(-1) for block in self.rest.values())])


def held(feats: TangentFeatures, room: float) -> HeldFeatures:
    """Hold features for products; ``room`` is how many bytes a matrix may take."""
    size = feats.n * feats.c
    gains = {name: costs.factored_product(b) - costs.dense_product(b) for name, b in feats.blocks.items()}
    width = 0
    dense: list[str] = []
    for name in sorted(gains, key=lambda name: -gains[name] / max(1, _entries(feats.blocks[name]))):
        more = width + _entries(feats.blocks[name])
        if gains[name] > 0 and _COPIES * 8 * size * more <= room:
            width, dense = more, [*dense, name]
    order = [*(name for name in feats.blocks if name in dense), *(name for name in feats.blocks if name not in dense)]
    rows = None
    if dense:
        rows, start = torch.empty(size, width, dtype=torch.float64, device=feats.device), 0
        for name in order[: len(dense)]:
            block = feats.blocks[name]
            rows[:, start : start + _entries(block)] = block.features().reshape(size, -1)
            start += _entries(block)
    layout = Layout({name: feats.blocks[name].shape for name in order})
    others = [feats.blocks[name] for name in order[len(dense) :]]
    cost = sum(map(costs.factored_product, others)) + sum(costs.dense_product(feats.blocks[name]) for name in dense)
    rest = {block.name: _arranged(block) for block in others}
    return HeldFeatures(feats.n, feats.c, layout, rows, rest, cost)


def _arranged(block: Block) -> Block | Factored:
    """The block for products: factors with one position are arranged well as they are."""
    factors = block.outer
    if factors is None or len(block.summands) > 1 or factors.backward.shape[1] != 1:
        return block
    return Factored(factors.backward[:, 0], factors.inputs[:, 0])


def _entries(block: Block) -> int:
    return block.shape[0] * block.shape[1]
