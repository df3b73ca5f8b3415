"""An in-memory stand-in for a store, which records what was read."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Twin:
    """A kernel, or one per block, cut into tiles; a symmetric one keeps no lower triangle of tiles."""

    kernels: Mapping[str, Tensor]
    outputs: str
    tile: int
    symmetric: bool = True
    complete: bool = True
    most: int | None = None  # samples per side that may be read at a time
    c: int = 1
    reads: list[tuple[int, int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        first = next(iter(self.kernels.values()))
        self.n, self.m = first.shape[0], first.shape[2 if self.outputs == "full" else 1]
        self.c = self.c if self.outputs == "trace" else first.shape[-1]
        self.blocks = tuple(name for name in self.kernels if name)
        self.meta: dict[str, object] = {}
        if self.symmetric:
            self.kernels = {name: self._forgetful(kernel) for name, kernel in self.kernels.items()}

    def _forgetful(self, kernel: Tensor) -> Tensor:
        kernel = kernel.clone()
        for start in range(0, self.n, self.tile):
            rows, columns = slice(start, start + self.tile), slice(0, start)
            kernel[(rows, slice(None), columns) if self.outputs == "full" else (rows, columns)] = torch.nan
        return kernel

    def read(self, rows: slice | None = None, columns: slice | None = None, block: str | None = None) -> Tensor:
        rows, columns = rows or slice(0, self.n), columns or slice(0, self.m)
        if self.most is not None:
            assert rows.stop - rows.start <= self.most
            assert columns.stop - columns.start <= self.most
        self.reads.append((rows.start, rows.stop, columns.start, columns.stop))
        kernel = self.kernels[block or ""]
        if self.outputs == "full":
            piece, other = kernel[rows, :, columns], kernel[columns, :, rows].permute(2, 3, 0, 1)
        else:
            piece, other = kernel[rows, columns], kernel[columns, rows].transpose(0, 1)
        return torch.where(piece.isnan(), other, piece) if self.symmetric else piece


def twin(kernel: Tensor | Mapping[str, Tensor], tile: int = 4, **options: object) -> Twin:
    """A twin of a kernel of x with itself, (n, c, n, c) or (n, n)."""
    kernels = {"": kernel} if isinstance(kernel, Tensor) else kernel
    full = next(iter(kernels.values())).ndim == 4
    return Twin(kernels, **{"outputs": "full" if full else "trace", "tile": tile, **options})  # type: ignore[arg-type]
