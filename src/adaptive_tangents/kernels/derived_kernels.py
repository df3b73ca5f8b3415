"""Kernels derived from others tile by tile, and inner products of kernels, as the measures need them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.kernels.tiles import Sum, Tiled, View, share


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
        sums, heads, norm = self.zeros(self.n, w, w), self.zeros(self.n, w, w), self.zeros()  # over second, first, both
        for rows, columns, tile in of.tiles():
            cube = self._cube(self._hollow(rows, columns, tile))
            sums[rows] += cube.sum(2)
            heads[columns] += cube.sum(0).movedim(1, 0)
            norm += (cube**2).sum()
            if self.symmetric and rows != columns:
                sums[columns] += cube.sum(0).permute(1, 2, 0)
                heads[rows] += cube.sum(2).mT
                norm += (cube**2).sum()
        for value in (sums, heads, norm):
            self.reduced(value)
        whole, n = sums.sum(0), self.n
        self.before = float(norm.sqrt())
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


def gram(kernels: Sequence[Tiled]) -> Float[Tensor, "k k"]:
    """The Frobenius inner products ⟨K_i, K_j⟩, in one pass over the tiles."""
    whole = Sum(kernels)
    total = whole.zeros(len(kernels), len(kernels))
    for rows, columns in share(whole.grid, whole.group):
        flat = torch.stack([kernel.read(rows, columns).to(total).flatten() for kernel in kernels])
        total += (2 if whole.symmetric and rows != columns else 1) * (flat @ flat.mT)
    return whole.reduced(total)
