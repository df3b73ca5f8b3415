"""Products with a kernel tile by tile, accumulated in float64, as solvers and decompositions need them."""

from collections.abc import Collection

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptive_tangents.kernels.tiles import Cached, Sum, Tiled, share
from adaptive_tangents.runtime.memory import limit_for


class KernelProducts:
    """K + ρI by its products.

    Vectors are (n·c,) in the order of (n, c), or (n,) for a trace kernel; several vectors are columns.
    """

    def __init__(self, kernel: Tiled, *, ridge: float = 0.0) -> None:
        self.kernel, self.ridge = kernel, ridge
        self.n, self.c = kernel.n, kernel.width * kernel.batch

    def apply(self, x: Float[Tensor, "k *m"], *, mirrored: bool = False) -> Float[Tensor, "q *m"]:
        """(K + ρI) x, or with ``mirrored`` Kᵀ x of a kernel that is not symmetric."""
        kernel = self.kernel
        given = x.to(kernel.device, torch.float64).reshape(-1, kernel.batch, kernel.width, x[0].numel())
        rows_of = given.movedim(1, 0).flatten(1, 2)  # (g, n·w, vectors)
        found = kernel.zeros(kernel.batch, (kernel.m if mirrored else kernel.n) * kernel.width, rows_of.shape[2])
        for rows, columns, tile in kernel.tiles():
            a, b = kernel.entries(rows), kernel.entries(columns)
            if not mirrored:
                found[:, a] += tile @ rows_of[:, b]
            if mirrored or (kernel.symmetric and rows != columns):
                found[:, b] += tile.mT @ rows_of[:, a]
        kernel.reduced(found)
        whole = found.reshape(kernel.batch, -1, kernel.width, rows_of.shape[2]).movedim(0, 1)
        whole = whole.reshape(-1, *x.shape[1:])
        return whole + self.ridge * x if self.ridge else whole

    def rounded(self) -> Float[Tensor, "k k"]:
        """K in float32."""
        return self.kernel.matrices(torch.float32)[0]

    def entries(self) -> Float[Tensor, " k"]:
        """The diagonal of K."""
        return self.kernel.diagonal().flatten()

    def columns(self, chosen: Int[Tensor, " q"]) -> Float[Tensor, "k m"]:
        """The columns of K of these samples, for all outputs; only tiles that hold some of them are read."""
        kernel, w = self.kernel, self.kernel.width
        found = kernel.zeros(kernel.n, w, len(chosen), w)

        def put(rows: slice, columns: slice, tile: Tensor) -> None:
            held = ((chosen >= columns.start) & (chosen < columns.stop)).nonzero().flatten()
            cube = tile.reshape(rows.stop - rows.start, w, columns.stop - columns.start, w)
            found[rows, :, held] = cube[:, :, chosen[held] - columns.start].double()

        for rows, columns in share(kernel.grid, kernel.group):
            sides = [columns] + ([rows] if kernel.symmetric and rows != columns else [])
            if any(bool(((chosen >= side.start) & (chosen < side.stop)).any()) for side in sides):
                tile = kernel.read(rows, columns)[0]
                put(rows, columns, tile)
                if len(sides) == 2:
                    put(columns, rows, tile.mT)
        return kernel.reduced(found).reshape(kernel.size, -1)


def cache_shares(parts: Collection[Tiled], room: int, *, dense: bool) -> tuple[int, int]:
    """Bytes for the tiles of each kernel, and for those of their sum in double precision, where all of it does not fit.

    A tile of the sum saves a product the same tile of every kernel, so the sum comes first. A sum that is formed whole
    anyway (``dense``), or that is of one kernel, needs no cache of its own.
    """
    whole = Sum(list(parts))
    if dense or len(parts) == 1 or sum(map(_read_bytes, parts)) <= room:
        return room // len(parts), 0
    summed = min(room, _read_bytes(whole))
    return (room - summed) // len(parts), summed


def _read_bytes(kernel: Tiled) -> int:
    """Bytes of all tiles as they are read; a sum gives them in double precision."""
    entries = sum((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in kernel.grid)
    size = 8 if isinstance(kernel, Sum) else kernel.dtype.itemsize
    return int(entries) * kernel.width**2 * kernel.batch * size


def cached(kernel: Tiled, memory_limit: int | None) -> Tiled:
    """The kernel, with as many tiles kept in memory as the limit allows."""
    return Cached(kernel, limit_for(memory_limit, kernel.device))
