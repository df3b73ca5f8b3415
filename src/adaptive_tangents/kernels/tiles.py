"""Kernels read by tiles, be it a tensor or a store on disk: the form in which measures and solvers use them.

A kernel is g matrices of n·w rows: (1, n·c, n·c) for "full", (1, n, n) for "trace", (c, n, n) for "diagonal". Only a few
tiles are held at a time, except for a tensor, which its caller holds anyway. Sums over tiles are in float64 and in the
order of the tiles. If tiles are dealt out to the processes of a group, sums run over its ranks, too.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.checks import as_tensor, check_finite
from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.runtime.chunks import ranges
from adaptive_tangents.runtime.memory import limit_for, require_memory

_HELD_TILE = 1024  # rows of a matrix in memory that are worked on at a time


@runtime_checkable
class StoredKernel(Protocol):
    """A kernel on disk: its sizes, and any part of it, read in the layout of ``tangent_kernel``.

    It has ``n`` and ``m`` samples, ``c`` outputs, and ``outputs`` "full", "trace" or "diagonal". ``symmetric`` means that
    it is of x with itself. ``blocks`` names its kernels, () for a single one. ``tile`` is the samples along a side of a
    tile, and ``complete`` says whether all tiles are there. Samples are read by slices of step one.
    """

    @property
    def n(self) -> int: ...
    @property
    def m(self) -> int: ...
    @property
    def c(self) -> int: ...
    @property
    def outputs(self) -> str: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def blocks(self) -> tuple[str, ...]: ...
    @property
    def tile(self) -> int: ...
    @property
    def complete(self) -> bool: ...

    def read(self, rows: slice | None = None, columns: slice | None = None, block: str | None = None) -> Tensor:
        """The kernel of these samples."""


@dataclass(frozen=True)
class KernelBlock:
    """One block's kernel K_ℓ from a store made with ``by_block``, for every measure and solver that takes a kernel.

    Args:
        store: the store.
        name: the name of the block.

    Raises:
        TangentError: when the store has no such block.

    >>> import torch, adaptive_tangents as at
    >>> at.kernels.KernelBlock("layer", "3")
    Traceback (most recent call last):
    adaptive_tangents.errors.TangentError: KernelBlock: expects a store made with by_block=True, got str
    """

    store: Any
    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.store, StoredKernel):
            raise TangentError(f"KernelBlock: expects a store made with by_block=True, got {type(self.store).__name__}")
        if self.name not in self.store.blocks:
            listed = ", ".join(self.store.blocks) or "none: the store was made without by_block"
            raise TangentError(f"KernelBlock: there is no block {self.name!r}; the blocks are {listed}")

    def opened(self, request: "Request") -> "Tiled":
        """The block's kernel by tiles; measures and solvers call this.

        Args:
            request: who asks for the kernel, and which kinds of kernel will do.
        """
        return Stored(request, self.store, self.name)


@dataclass(frozen=True)
class SharedKernel:
    """A kernel whose tiles are dealt out to the processes of a torch.distributed group, which add up their results.

    Every measure and solver takes it in place of the kernel. All processes make the same call, and all get the result.
    Tiles are in host memory, so the group needs a backend for it, such as gloo.

    Args:
        kernel: a store, a tensor, or a mapping of block names to tensors, the same on every process.
        group: the process group; None is all processes.

    Raises:
        TangentError: when torch.distributed is not initialized, or the group's backend moves only GPU memory.

    >>> import torch, adaptive_tangents as at
    >>> at.kernels.SharedKernel(torch.eye(3))
    Traceback (most recent call last):
    adaptive_tangents.errors.TangentError: SharedKernel: torch.distributed is not initialized; run under torchrun ...
    """

    kernel: Any
    group: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise TangentError(
                "SharedKernel: torch.distributed is not initialized; run under torchrun and call "
                "torch.distributed.init_process_group('gloo') first"
            )
        backend = torch.distributed.get_backend(self.group)
        if backend == "nccl":
            raise TangentError(
                "SharedKernel: tiles are in host memory, which the nccl backend does not move; make a group for it with "
                "torch.distributed.new_group(backend='gloo')"
            )

    def opened(self, request: "Request") -> "Tiled":
        """The kernel with its tiles dealt out; measures and solvers call this.

        Args:
            request: who asks for the kernel, and which kinds of kernel will do.
        """
        return DealtKernel(tiled(request, self.kernel), self.group or torch.distributed.group.WORLD)


@dataclass(frozen=True)
class Request:
    """Who asks for a kernel, and which kinds will do.

    ``call`` names the caller in errors. ``rectangular`` allows a kernel of x with other samples, ``diagonal`` one with
    outputs="diagonal".
    """

    call: str
    rectangular: bool = False
    diagonal: bool = False


Grid = tuple[tuple[slice, slice], ...]


class Tiled(ABC):
    """g matrices of n·width rows and m·width columns, read tile by tile; if symmetric, only the upper triangle is listed.

    ``full`` means that the kernel's shape is (n, c, m, c), also for c = 1.
    """

    n: int
    m: int
    width: int
    full: bool
    batch: int = 1
    symmetric: bool = False
    group: Any = None
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float64  # that the entries were made in

    @property
    @abstractmethod
    def grid(self) -> Grid:
        """The samples of every tile; tiles below the diagonal of a symmetric kernel are not listed."""

    @abstractmethod
    def read(self, rows: slice, columns: slice) -> Float[Tensor, "g a b"]:
        """The kernel of these samples, in the kernel's own dtype."""

    def tiles(self) -> Iterator[tuple[slice, slice, Float[Tensor, "g _a _b"]]]:
        """The tiles of this process in float64, with the samples of each."""
        for rows, columns in share(self.grid, self.group):
            yield rows, columns, self.read(rows, columns).double()

    def entries(self, samples: slice) -> slice:
        """The rows of a matrix that belong to these samples."""
        return slice(samples.start * self.width, samples.stop * self.width)

    @property
    def size(self) -> int:
        """Number of rows of a matrix."""
        return self.n * self.width

    def reduced(self, value: Tensor, *, largest: bool = False) -> Tensor:
        """The sum, or the largest, over the processes of a group."""
        if self.group is not None:
            kind = torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
            torch.distributed.all_reduce(value, kind, group=self.group)
        return value

    def zeros(self, *shape: int) -> Tensor:
        """Zeros in float64 on the kernel's device, to add sums to."""
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def opened(self, request: Request) -> "Tiled":
        """Itself."""
        return self

    def diagonal(self) -> Tensor:
        """The diagonal of a kernel of x with itself: (n, c), or (n,) for a trace kernel."""
        found = self.zeros(self.batch, self.size)
        for rows, columns in share(self.grid, self.group):
            if max(rows.start, columns.start) < min(rows.stop, columns.stop):
                both = slice(max(rows.start, columns.start), min(rows.stop, columns.stop))
                found[:, self.entries(both)] = self.read(both, both).diagonal(dim1=1, dim2=2).double()
        found = self.reduced(found)
        return found.mT if self.batch > 1 else found.reshape(self.n, self.width) if self.full else found[0]

    def matrices(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "g N M"]:
        """The whole kernel in memory, as g matrices."""
        found = torch.zeros(self.batch, self.size, self.m * self.width, dtype=dtype, device=self.device)
        for rows, columns in share(self.grid, self.group):
            tile = self.read(rows, columns).to(dtype)
            found[:, self.entries(rows), self.entries(columns)] = tile
            if self.symmetric and rows != columns:
                found[:, self.entries(columns), self.entries(rows)] = tile.mT
        return self.reduced(found)

    def dense(self, *, memory_limit: int | None = None) -> Tensor:
        """The whole kernel in memory, float64, in the layout of ``tangent_kernel``; TangentError if above the limit."""
        require_memory(
            "dense", 8 * self.batch * self.size * self.m * self.width, limit_for(memory_limit, self.device),
            remedy="read some samples at a time, or ask for tiles()",
        )  # fmt: skip
        found = self.matrices()
        if self.batch > 1:
            return found.movedim(0, 2)
        return found[0].reshape(self.n, self.width, self.m, self.width) if self.full else found[0]


def share(grid: Grid, group: Any) -> Grid:
    """The tiles of this process: with r ranks, every r-th."""
    if group is None:
        return grid
    return grid[torch.distributed.get_rank(group) :: torch.distributed.get_world_size(group)]


class TensorKernel(Tiled):
    """A kernel that is a tensor: (n, m), (n, c, m, c) or (n, m, c)."""

    def __init__(self, request: Request, values: Tensor) -> None:
        shape = tuple(values.shape)
        sides = {2: shape[:2], 3: shape[:2] if request.diagonal else None, 4: shape[::2]}.get(len(shape))
        fits = sides is not None and (request.rectangular or sides[0] == sides[1])
        if not fits or (len(shape) == 4 and shape[1] != shape[3]):
            wanted = "(n, m) or (n, c, m, c)" if request.rectangular else "(n, n) or (n, c, n, c)"
            raise TangentError(f"{request.call}: a kernel has shape {wanted}, got {shape}")
        if 0 in shape[1:] or (shape[0] == 0 and not request.rectangular):
            raise TangentError(f"{request.call}: a kernel of shape {shape} has no entries; give samples and outputs")
        if values.is_complex():
            raise TangentError(
                f"{request.call}: a kernel has real entries, got {values.dtype}; give its real part, K.real"
            )
        check_finite(request.call, "the value", [values])
        self.n, self.m = shape[0], shape[2 if len(shape) == 4 else 1]
        self.full = len(shape) == 4
        self.width = shape[1] if self.full else 1
        self.batch = shape[2] if len(shape) == 3 else 1
        self.device = values.device
        self.dtype = values.dtype if values.is_floating_point() else torch.float64
        cubes = values.movedim(2, 0) if len(shape) == 3 else values
        self.values = cubes.reshape(self.batch, self.n * self.width, self.m * self.width)

    @property
    def grid(self) -> Grid:
        step = max(1, _HELD_TILE // self.width)
        return tuple((rows, columns) for rows in ranges(self.n, step) for columns in ranges(self.m, step))

    def read(self, rows: slice, columns: slice) -> Tensor:
        return self.values[:, self.entries(rows), self.entries(columns)]


class Stored(Tiled):
    """A kernel on disk, or one block of it."""

    def __init__(self, request: Request, store: StoredKernel, block: str | None = None) -> None:
        check_store(request, store)
        self.call, self.store, self.block = request.call, store, block
        self.n, self.m, self.symmetric = store.n, store.m, store.symmetric
        self.full = store.outputs == "full"
        self.width = store.c if self.full else 1
        self.batch = store.c if store.outputs == "diagonal" else 1
        self.dtype = getattr(store, "dtype", torch.float64)

    @property
    def grid(self) -> Grid:
        rows, columns = list(ranges(self.n, self.store.tile)), list(ranges(self.m, self.store.tile))
        return tuple((a, b) for a in rows for b in columns if not (self.symmetric and b.start < a.start))

    def read(self, rows: slice, columns: slice) -> Tensor:
        piece = self.store.read(rows, columns, self.block)
        if not bool(torch.isfinite(piece.sum())) and not bool(torch.isfinite(piece).all()):
            first = rows.start + int((~torch.isfinite(piece)).flatten(1).any(1).nonzero()[0, 0])
            raise TangentError(f"{self.call}: the value of sample {first} is not finite; make the store again")
        if self.batch > 1:
            return piece.movedim(2, 0)
        a, b = rows.stop - rows.start, columns.stop - columns.start
        return piece.reshape(1, a * self.width, b * self.width)


class View(Tiled):
    """A kernel made of another, tile by tile."""

    def __init__(self, of: Tiled) -> None:
        self.of = of
        self.n, self.m, self.width, self.full, self.batch = of.n, of.m, of.width, of.full, of.batch
        self.symmetric, self.group, self.device, self.dtype = of.symmetric, of.group, of.device, of.dtype

    @property
    def grid(self) -> Grid:
        return self.of.grid

    def read(self, rows: slice, columns: slice) -> Tensor:
        return self.of.read(rows, columns)


class DealtKernel(View):
    """A kernel with its tiles dealt out to the processes of a group."""

    def __init__(self, of: Tiled, group: Any) -> None:
        super().__init__(of)
        self.group = group


class Cached(View):
    """A kernel that keeps tiles in memory once they are read, as many as fit."""

    def __init__(self, of: Tiled, budget: int) -> None:
        super().__init__(of)
        self.room = budget
        self.kept: dict[tuple[int, int, int, int], Tensor] = {}

    def read(self, rows: slice, columns: slice) -> Tensor:
        key = (rows.start, rows.stop, columns.start, columns.stop)
        if key in self.kept:
            return self.kept[key]
        tile = self.of.read(rows, columns)
        if tile.nbytes <= self.room:
            self.room -= tile.nbytes
            self.kept[key] = tile
        return tile


class Sum(View):
    """Σ_ℓ w_ℓ K_ℓ, in the smallest tiles that any of the kernels has."""

    def __init__(self, parts: Sequence[Tiled], weights: Sequence[float] | None = None) -> None:
        super().__init__(min(parts, key=lambda part: part.grid[0][0].stop))
        self.symmetric = all(part.symmetric for part in parts)
        self.group = next((part.group for part in parts if part.group is not None), None)
        self.dtype = max((part.dtype for part in parts), key=lambda dtype: torch.finfo(dtype).eps)
        self.parts, self.weights = parts, weights if weights is not None else [1.0] * len(parts)

    @property
    def grid(self) -> Grid:
        # If only some kernels are symmetric, the sum is not: its tiles below the diagonal are needed, too.
        mirrored = self.of.symmetric and not self.symmetric
        return self.of.grid + tuple((b, a) for a, b in self.of.grid if mirrored and a != b)

    def read(self, rows: slice, columns: slice) -> Tensor:
        pairs = zip(self.weights, self.parts, strict=True)
        weight, part = next(pairs)
        total = part.read(rows, columns).double() * weight
        for weight, part in pairs:
            total.add_(part.read(rows, columns), alpha=weight)
        return total


Kernel = Tensor | np.ndarray | StoredKernel | KernelBlock | SharedKernel | Tiled
Kernels = Kernel | Mapping[str, Tensor]


def check_store(request: Request, store: StoredKernel) -> None:
    """Raise TangentError if a store is incomplete, or is not of the requested kind."""
    call = request.call
    if not store.complete:
        raise TangentError(f"{call}: the store is not complete; finish it with kernel_to_store(..., resume=True)")
    if not store.symmetric and not request.rectangular:
        raise TangentError(
            f"{call}: the store is of {store.n} samples with {store.m} others; this needs a kernel of samples with "
            "themselves, made without x2"
        )
    if store.outputs == "diagonal" and not request.diagonal:
        raise TangentError(
            f"{call}: the store holds the kernel of each output by itself (outputs='diagonal'); this needs one made with "
            "outputs='full' or 'trace'"
        )


def tiled(request: Request, K: object) -> Tiled:
    """Any kernel by tiles; several blocks count as their sum."""
    opened = getattr(K, "opened", None)
    if opened is not None:
        found: Tiled = opened(request)
        return found
    parts = blocks_of(request, K)
    if parts:
        return Sum(list(parts.values()))
    if isinstance(K, StoredKernel):
        return Stored(request, K)
    if isinstance(K, TangentFeatures):
        raise TangentError(
            f"{request.call}: takes a kernel, got features; give feats.kernel(), or tangent_kernel(model, x)"
        )
    return TensorKernel(request, as_tensor(request.call, "the kernel", K, torch.device("cpu")).detach())


def blocks_of(request: Request, K: object) -> dict[str, Tiled]:
    """The kernels by block, of a store or of a mapping of names to tensors; none if there is only the whole."""
    if isinstance(K, SharedKernel):
        group = K.group or torch.distributed.group.WORLD
        return {name: DealtKernel(part, group) for name, part in blocks_of(request, K.kernel).items()}
    if isinstance(K, Mapping):
        return {
            name: TensorKernel(
                request, as_tensor(request.call, f"the kernel of {name}", part, torch.device("cpu")).detach()
            )
            for name, part in K.items()
        }
    if isinstance(K, StoredKernel):
        return {name: Stored(request, K, name) for name in K.blocks}
    return {}
