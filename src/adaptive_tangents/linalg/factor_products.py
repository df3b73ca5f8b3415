"""Products with factors in either memory order: the units of a position adjacent, or the pixels of a unit.

Convolutions leave pixels innermost. A product that reads memory in the other order takes up to sixty times as long.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from adaptive_tangents.runtime.memory import empty

_FEW = 32  # positions; with fewer, products of single samples are too small to be fast


def pixels_innermost(x: Tensor) -> bool:
    """Whether positions (the second dimension) are adjacent in memory and the units of a position (the last) are not."""
    return x.ndim > 2 and x.stride(1) == 1 and x.stride(-1) != 1


def times(x: Float[Tensor, "*batch d"], matrix: Float[Tensor, "d k"]) -> Float[Tensor, "*batch k"]:
    """The product x · matrix, in x's memory order."""
    if pixels_innermost(x):
        return (matrix.mT @ x.movedim(1, -1)).movedim(-1, 1)
    return x @ matrix


def over_positions(signals: Float[Tensor, "n t c o"], vectors: Float[Tensor, "n t k o"]) -> Float[Tensor, "n c k"]:
    """Σ_t δ_{t,c} · v_{t,k}, summed over positions and units."""
    if pixels_innermost(signals) and pixels_innermost(vectors):
        left, right = (x.permute(0, 2, 3, 1).flatten(2) for x in (signals, vectors))
        return left @ right.mT
    return (signals @ vectors.mT).sum(1)


def weighted_outer(
    weights: Float[Tensor, "n c"], signals: Float[Tensor, "n t c o"], inputs: Float[Tensor, "n t i"]
) -> Float[Tensor, "o i"]:
    """Σ_{n,t} (Σ_c a_{n,c} δ_{n,t,c}) h_{n,t}ᵀ."""
    n, t, c, o = signals.shape
    if not (pixels_innermost(signals) and pixels_innermost(inputs)):
        return torch.einsum("nc,ntco->nto", weights, signals).flatten(0, 1).mT @ inputs.flatten(0, 1)
    mixed = (weights[:, None] @ signals.permute(0, 2, 3, 1).reshape(n, c, o * t)).reshape(n, o, t)
    if t < _FEW or (torch.is_grad_enabled() and (mixed.requires_grad or inputs.requires_grad)):
        return mixed.mT.flatten(0, 1).mT @ inputs.flatten(0, 1)
    # One sample after the other: a product of all samples at once would copy all their positions.
    total = mixed.new_zeros(o, inputs.shape[2])
    for left, right in zip(mixed, inputs, strict=True):
        total.addmm_(left, right)
    return total


def joined(parts: Sequence[Shaped[Tensor, "_n ..."]], *, positions: bool = False) -> Shaped[Tensor, "n ..."]:
    """The tensors concatenated along samples, or along ``positions``, in their memory order."""
    inner = all(map(pixels_innermost, parts))
    moved = [part.movedim(1, -1) for part in parts] if inner else list(parts)
    axis = (-1 if inner else 1) if positions else 0
    if len({part.dtype for part in parts}) > 1 or (torch.is_grad_enabled() and any(p.requires_grad for p in parts)):
        made = torch.cat(moved, axis)
    else:
        shape = list(moved[0].shape)
        shape[axis] = sum(part.shape[axis] for part in moved)
        made = torch.cat(moved, axis, out=empty(shape, moved[0]))
    return made.movedim(-1, 1) if inner else made


def product(a: Float[Tensor, "n q t"], b: Float[Tensor, "n t i"]) -> Float[Tensor, "n q i"]:
    """A batch of matrix products, written to memory from `empty`."""
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return a @ b
    return torch.bmm(a, b, out=empty((*a.shape[:2], b.shape[2]), b))
