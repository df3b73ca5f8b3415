"""Kernels derived from others tile by tile, and inner products of kernels, as the measures need them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.kernels.tiles import Sum, Tiled, View, share

_ASYMMETRY = 1e-3  # of a kernel's norm: more than any rounding in use
_SAFE = 64  # numbers from 2⁻⁶⁴ to 2⁶⁴ can be multiplied four times over


class OuterKernel(View):
    """Y Yᵀ of columns Y (n·w, k), in the tiles of another kernel."""

    def __init__(self, of: Tiled, columns: Float[Tensor, "N k"]) -> None:
        super().__init__(of)
        self.columns = columns

    def read(self, rows: slice, columns: slice) -> Tensor:
        return (self.columns[self.entries(rows)] @ self.columns[self.entries(columns)].mT)[None]


class CenteredKernel(View):
    """HKH with H = I − 11ᵀ/n over samples, for each pair of outputs; making it takes one pass over the tiles.

    With ``unbiased`` it has the centering of unbiased HSIC (Székely & Rizzo, 2014): sums over other samples, and a zero
    diagonal. ``before`` is ‖K‖, without its diagonal if unbiased.
    """

    def __init__(self, of: Tiled, *, unbiased: bool = False) -> None:
        super().__init__(of)
        self.unbiased = unbiased
        w = self.width
        sums, heads = self.zeros(self.n, w, w), self.zeros(self.n, w, w)  # over second, over first samples
        norms = [0.0]
        for rows, columns, tile in of.tiles():
            cube = self._cube(self._hollow(rows, columns, tile))
            sums[rows] += cube.sum(2)
            heads[columns] += cube.sum(0).movedim(1, 0)
            norms.append(_norm(cube))
            if self.symmetric and rows != columns:
                sums[columns] += cube.sum(0).permute(1, 2, 0)
                heads[rows] += cube.sum(2).mT
                norms.append(norms[-1])
        for value in (sums, heads):
            self.reduced(value)
        whole, n = sums.sum(0), self.n
        size = power_of_two(float(self.reduced(sums.new_tensor(max(norms)), largest=True)))
        own = sums.new_tensor([norm / size for norm in norms])
        self.before = size * math.sqrt(float(self.reduced((own**2).sum())))
        self.right, self.left = (sums / (n - 2), heads / (n - 2)) if unbiased else (sums / n, heads / n)
        self.middle = whole / ((n - 1) * (n - 2)) if unbiased else whole / n**2

    def read(self, rows: slice, columns: slice) -> Tensor:
        cube = self._cube(self.of.read(rows, columns).double())
        cube = cube - self.right[rows][:, :, None] - self.left[columns].movedim(1, 0)[None] + self.middle[:, None]
        return self._hollow(rows, columns, cube.reshape(1, cube.shape[0] * self.width, -1))

    def _cube(self, tile: Float[Tensor, "1 _a _b"]) -> Float[Tensor, "_p _w _q _v"]:
        return tile.reshape(tile.shape[1] // self.width, self.width, -1, self.width)

    def _hollow(self, rows: slice, columns: slice, tile: Tensor) -> Tensor:
        """The tile, with the kernel's diagonal set to zero if unbiased."""
        first, last = max(rows.start, columns.start), min(rows.stop, columns.stop)
        if not self.unbiased or first >= last:
            return tile
        tile = tile.clone()
        own = torch.arange(first, last, device=tile.device)
        tile[:, own - rows.start, own - columns.start] = 0
        return tile


@dataclass(frozen=True)
class Gram:
    """The Frobenius inner products ⟨K_i, K_j⟩ = s_i s_j·``values``, with powers of two s, so that none overflows."""

    values: Float[Tensor, "k k"]
    scales: tuple[float, ...]


def gram(kernels: Sequence[Tiled]) -> Gram:
    """The Frobenius inner products of kernels, in one pass over the tiles."""
    whole = Sum(kernels)
    total, sizes = whole.zeros(len(kernels), len(kernels)), whole.zeros(len(kernels))

    def grown(seen: Tensor) -> Tensor:
        old, new = (total.new_tensor([power_of_two(float(size)) for size in each]) for each in (sizes, seen))
        return total * (old / new)[:, None] * (old / new)

    for rows, columns in share(whole.grid, whole.group):
        tiles = [kernel.read(rows, columns).to(total).flatten() for kernel in kernels]
        seen = torch.maximum(sizes, sizes.new_tensor([largest(tile) for tile in tiles]))
        total, sizes = grown(seen), seen
        flat = torch.stack([tile / power_of_two(float(size)) for tile, size in zip(tiles, sizes, strict=True)])
        total += (2 if whole.symmetric and rows != columns else 1) * (flat @ flat.mT)
    seen = whole.reduced(sizes.clone(), largest=True)
    return Gram(whole.reduced(grown(seen)), tuple(power_of_two(float(size)) for size in seen))


def power_of_two(size: float, safe: int = _SAFE) -> float:
    """The power of two next to a size that is far from one, else one: dividing by it changes no digit."""
    if size == 0 or 2.0**-safe <= size <= 2.0**safe:
        return 1.0
    return 2.0 ** max(-1000, min(1000, math.frexp(size)[1]))


def _norm(values: Tensor) -> float:
    """The Frobenius norm, of entries of any size."""
    size = power_of_two(largest(values))
    return size * float((values / size).norm())


def largest(values: Tensor) -> float:
    """The largest size of an entry, zero if there is none."""
    return max(abs(float(end)) for end in torch.aminmax(values)) if values.numel() else 0.0


def in_range(call: str, what: str, *factors: float) -> float:
    """The product of some factors; TangentError if float64 does not hold it."""
    mantissa, exponent = 1.0, 0
    for factor in factors:
        part, power = math.frexp(factor)
        mantissa, shift = math.frexp(mantissa * part)
        exponent += power + shift
    if mantissa and not -1021 <= exponent <= 1024:
        raise TangentError(
            f"{call}: {what} is about 1e{round(exponent * math.log10(2)):+d}, which float64 does not hold; scale the kernel "
            "or the targets"
        )
    return math.ldexp(mantissa, exponent)


def check_symmetric(call: str, kernel: Tiled, slack: float = 0.0) -> None:
    """Raise TangentError if a kernel of samples with themselves is not symmetric; ``slack`` is a norm of rounding."""
    if kernel.symmetric:
        return
    whole, skew = [0.0], [0.0]
    for rows, columns in kernel.grid:
        if rows.start <= columns.start:
            tile, other = kernel.read(rows, columns).double(), kernel.read(columns, rows).double()
            whole += [_norm(tile), _norm(other)]
            skew += [_norm(tile - other.mT)] * 2
    size, left = math.hypot(*whole), math.hypot(*skew)
    if left > _ASYMMETRY * size + slack:
        raise TangentError(
            f"{call}: a kernel of samples with themselves is symmetric, and K − Kᵀ here is {left / size:.0e} of K; give "
            "rows and columns of the same samples in the same order, or (K + K.T) / 2"
        )
