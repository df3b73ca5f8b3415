"""The kernel store: a Zarr v3 folder with one chunk per tile, compressed and checksummed; if symmetric, one triangle only.

A chunk is written beside its place and then renamed, so a tile is whole or absent whenever the process ends. The folder
records what the kernel was made from, and it is marked complete only once every tile is there.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import torch
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.kernel_layout import Outputs, column_axis, kernel_shape, swapped
from adaptive_tangents.features.summands import Index
from adaptive_tangents.kernels.schedule import Place
from adaptive_tangents.runtime.memory import limit_for, require_memory

FORMAT = 1
LOCK, CLAIMS = ".lock", ".claims"  # exist only while a store is written
_META = "adaptive_tangents"
_KERNEL, _BLOCKS = "kernel", "blocks"
_DRAFT = "*.partial"  # zarr's name for a chunk until it is whole

Tile = tuple[slice, slice, Tensor]


@dataclass(frozen=True)
class KernelStore:
    """A kernel (n, c, m, c), (n, m) or (n, m, c) on disk, in tiles; ``open_kernel`` opens one.

    Of a symmetric kernel, only tiles on and above the diagonal are stored.

    Attributes:
        path: the folder.
        meta: what the folder records: sizes, dtype, and what the kernel was made from.
        limit: bytes that reading may use; None is half of what is free.
    """

    path: Path
    meta: Mapping[str, Any] = field(repr=False)
    limit: int | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        shape = " × ".join(map(str, self.shape))
        kernels = f"{len(self.blocks)} kernels of {shape}" if self.blocks else shape
        state = "complete" if self.complete else f"{len(self.missing())} of {len(self.places)} tiles missing"
        return f"{type(self).__name__}({self.path}: {kernels}, {self.outputs}, {self.meta['dtype']}, {state})"

    @property
    def n(self) -> int:
        """Number of samples of the rows."""
        return int(self.meta["n"])

    @property
    def m(self) -> int:
        """Number of samples of the columns."""
        return int(self.meta["m"])

    @property
    def c(self) -> int:
        """Number of outputs of the network."""
        return int(self.meta["c"])

    @property
    def outputs(self) -> Outputs:
        """The kind of kernel: "full" (n, c, m, c), "trace" (n, m) or "diagonal" (n, m, c)."""
        found: Outputs = self.meta["outputs"]
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its entries."""
        found: torch.dtype = getattr(torch, self.meta["dtype"])
        return found

    @property
    def symmetric(self) -> bool:
        """Whether the columns are the same samples as the rows."""
        return bool(self.meta["symmetric"])

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks whose kernels it holds; empty if it holds only their sum."""
        return tuple(self.meta["blocks"])

    @property
    def tile(self) -> int:
        """Samples along a side of a tile."""
        return int(self.meta["tile"])

    @property
    def complete(self) -> bool:
        """Whether every tile is there."""
        return bool(self.meta["complete"])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel, or of each block's kernel."""
        return kernel_shape(self.outputs, self.n, self.m, self.c)

    @property
    def places(self) -> tuple[Place, ...]:
        """All tiles that belong to the store, row by row: the row and the column of each among the tiles."""
        rows, columns = -(-self.n // self.tile), -(-self.m // self.tile)
        return tuple((i, j) for i, j in product(range(rows), range(columns)) if not self.symmetric or i <= j)

    def slices(self, place: Place) -> tuple[slice, slice]:
        """The samples of a tile: its rows and its columns.

        Args:
            place: the tile's row and column among the tiles.
        """
        rows, columns = (
            slice(k * self.tile, min((k + 1) * self.tile, total))
            for k, total in zip(place, (self.n, self.m), strict=True)
        )
        return rows, columns

    def missing(self) -> list[Place]:
        """The tiles that are not stored, as their row and column among the tiles."""
        return [place for place in self.places if not all(path.is_file() for path in self._files(place))]

    def verify(self, progress: Callable[[str, float], None] | None = None) -> list[Place]:
        """The damaged tiles: their checksum is wrong, or entries are not finite.

        Args:
            progress: called with "verifying" and the fraction that is done.
        """
        damaged, missing = [], set(self.missing())
        for done, place in enumerate(self.places):
            if place not in missing and not all(self._sound(place, name) for name in self._names):
                damaged.append(place)
            if progress is not None:
                progress("verifying", (done + 1) / len(self.places))
        return damaged

    def tiles(self, block: str | None = None) -> Iterator[Tile]:
        """Rows, columns and entries of every stored tile, row by row; of a symmetric kernel, only the upper triangle.

        Args:
            block: the name of the block, if the store is by block; None otherwise.

        Raises:
            TangentError: when the store is not complete, or a tile is missing or damaged.
        """
        name = self._readable("tiles", block)
        for place in self.places:
            yield *self.slices(place), self._tile("tiles", place, name)

    def read(self, rows: Index | None = None, columns: Index | None = None, block: str | None = None) -> Tensor:
        """A part of the kernel, in the layout of ``tangent_kernel``.

        Args:
            rows: a slice of the rows' samples or a vector of their indices; None is all of them.
            columns: the same for the columns' samples.
            block: the name of the block, if the store is by block; None otherwise.

        Raises:
            TangentError: when the part exceeds the memory limit, the store is not complete, or a tile is missing or
                damaged.

        >>> import tempfile, torch, adaptive_tangents as at
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(7, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = at.kernel_to_store(model, x, f"{folder}/K.zarr", outputs="trace", tile=3)
        ...     K = store.read(columns=slice(2, 5))
        >>> torch.allclose(K, at.tangent_kernel(model, x, outputs="trace")[:, 2:5], atol=1e-6)
        True
        """
        name = self._readable("read", block)
        r, q = (_positions("read", k, size) for k, size in ((rows, self.n), (columns, self.m)))
        shape, axis = kernel_shape(self.outputs, len(r), len(q), self.c), column_axis(self.outputs)
        itemsize = torch.empty((), dtype=self.dtype).element_size()
        band = kernel_shape(self.outputs, min(self.tile, len(r)), len(q), self.c)
        needed = (torch.Size(shape).numel() + 2 * torch.Size(band).numel()) * itemsize
        remedy = "read fewer rows or columns, or go through tiles()"
        require_memory("read", needed, limit_for(self.limit), remedy=remedy)
        out = torch.empty(shape, dtype=self.dtype)
        groups = [(int(j), (q // self.tile == j).nonzero()[:, 0]) for j in torch.unique(q // self.tile)]
        order = torch.argsort(torch.cat([where for _, where in groups])) if groups else q
        for i in torch.unique(r // self.tile):
            here = (r // self.tile == i).nonzero()[:, 0]
            parts = [
                self._either("read", (int(i), j), name)
                .index_select(0, r[here] - int(i) * self.tile)
                .index_select(axis, q[where] - j * self.tile)
                for j, where in groups
            ]
            if parts:
                out[here] = torch.cat(parts, axis).index_select(axis, order)
        return out

    # For writers, which hold the store's lock.

    def write(self, place: Place, kernels: Iterable[tuple[str, Tensor]]) -> None:
        """Store a tile and read it back to check it.

        Args:
            place: the tile's row and column among the tiles.
            kernels: each block's name and kernel of this tile; "" is the name if there is one kernel.

        Raises:
            OSError: when the tile cannot be written or reads back differently.
        """
        for name, kernel in kernels:
            entries = kernel.to(device="cpu", dtype=self.dtype).contiguous()
            self._array(name, "r+")[self._selection(place)] = entries.numpy()
            _settle(self._file(place, name))
            if not torch.equal(self._decoded(place, name), entries):
                raise OSError(f"what was written to {self._file(place, name)} reads back differently")

    def discard(self, places: list[Place]) -> None:
        """Remove tiles, which are then missing.

        Args:
            places: the row and column of each among the tiles.
        """
        for place in places:
            for path in self._files(place):
                path.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove the unfinished files of writers that were killed."""
        for draft in self.path.rglob(_DRAFT):
            draft.unlink(missing_ok=True)

    def marked(self, *, complete: bool) -> "KernelStore":
        """The store, marked on disk as complete or not; all tiles are flushed to the disk before it counts as complete.

        Args:
            complete: whether every tile is there.
        """
        if complete:
            for folder in {path.parent for place in self.places for path in self._files(place)}:
                _settle(folder)
        meta = {**self.meta, "complete": complete}
        _write_meta(self.path, meta)
        return KernelStore(self.path, meta, self.limit)

    @property
    def _names(self) -> tuple[str, ...]:
        return self.blocks or ("",)

    @cached_property
    def _arrays(self) -> dict[tuple[str, str], Any]:
        return {}

    def _array(self, name: str, mode: Literal["r", "r+"] = "r") -> Any:
        import zarr

        if (name, mode) not in self._arrays:
            config = {"write_empty_chunks": True}  # a tile of fill values is a tile
            self._arrays[name, mode] = zarr.open_array(self.path / _folder(name), mode=mode, config=config)
        return self._arrays[name, mode]

    def _file(self, place: Place, name: str) -> Path:
        where = {"full": (place[0], 0, place[1], 0), "trace": place, "diagonal": (*place, 0)}[self.outputs]
        return self.path.joinpath(_folder(name), "c", *map(str, where))

    def _files(self, place: Place) -> list[Path]:
        return [self._file(place, name) for name in self._names]

    def _selection(self, place: Place) -> tuple[slice, ...]:
        rows, columns = self.slices(place)
        return (rows, slice(None), columns) if self.outputs == "full" else (rows, columns)

    def _decoded(self, place: Place, name: str) -> Tensor:
        found: Tensor = torch.from_numpy(self._array(name)[self._selection(place)])
        return found

    def _sound(self, place: Place, name: str) -> bool:
        try:
            return bool(torch.isfinite(self._decoded(place, name)).all())
        except (ValueError, RuntimeError, OSError):
            return False

    def _readable(self, call: str, block: str | None) -> str:
        if not self.complete:
            short, total = len(self.missing()), len(self.places)
            raise TangentError(
                f"{call}: {self.path} lacks {short} of its {total} tiles; finish it first: kernel_to_store with resume=True, "
                "or adaptive-tangents kernel with --resume, and otherwise the original arguments"
            )
        if (block is None) != (not self.blocks) or (block is not None and block not in self.blocks):
            asked = "no block was named" if block is None else f"block {block!r} was asked for"
            holds = f"kernels of the blocks {', '.join(self.blocks)}" if self.blocks else "one kernel, of all blocks"
            raise TangentError(
                f"{call}: {self.path} holds {holds}, and {asked}; name a block that it holds, or none if there is one kernel"
            )
        return block or ""

    def _tile(self, call: str, place: Place, name: str) -> Tensor:
        rows, columns = self.slices(place)
        where = f"the tile of rows {rows.start} to {rows.stop - 1} and columns {columns.start} to {columns.stop - 1}"
        remedy = "make it again: kernel_to_store with resume=True, or adaptive-tangents kernel with --resume"
        if not self._file(place, name).is_file():
            raise TangentError(f"{call}: {where} is missing from {self.path}; {remedy}")
        try:
            entries = self._decoded(place, name)
        except (ValueError, RuntimeError, OSError) as error:
            raise TangentError(f"{call}: {where} of {self.path} is damaged ({error}); {remedy}") from error
        return entries

    def _either(self, call: str, place: Place, name: str) -> Tensor:
        """A tile on either side of the diagonal; below the diagonal, the mirrored one."""
        if self.symmetric and place[0] > place[1]:
            return swapped(self._tile(call, (place[1], place[0]), name), self.outputs)
        return self._tile(call, place, name)


def open_kernel(path: str | Path, *, memory_limit: int | None = None) -> KernelStore:
    """A stored kernel; its tiles stay on disk until they are read.

    An incomplete store can be opened: it lists what is ``missing()``, but cannot be read.

    Args:
        path: the folder of the store.
        memory_limit: bytes that reading may use; None is half of what is free.

    Raises:
        TangentError: when there is no store, or it has another format.

    >>> import tempfile, torch, adaptive_tangents as at
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = at.kernel_to_store(torch.nn.Linear(3, 2), torch.randn(7, 3), f"{folder}/K.zarr", tile=3)
    ...     at.open_kernel(f"{folder}/K.zarr").shape
    (7, 2, 7, 2)
    """
    meta = read_meta(Path(path))
    if meta is None:
        raise TangentError(f"open_kernel: there is no kernel store at {path}; make one with kernel_to_store")
    if meta.get("format") != FORMAT:
        raise TangentError(
            f"open_kernel: {path} is of format {meta.get('format')}, and this version reads format {FORMAT}; "
            f"read it with adaptive-tangents {meta.get('version')}, which made it, or make it again"
        )
    return KernelStore(Path(path), meta, memory_limit)


def read_meta(path: Path) -> dict[str, Any] | None:
    """What the store in a folder records; None if there is no store."""
    try:
        attributes = json.loads((path / "zarr.json").read_text("utf-8")).get("attributes", {})
    except (OSError, ValueError, AttributeError):
        return None
    found = attributes.get(_META) if isinstance(attributes, dict) else None
    return found if isinstance(found, dict) else None


def create_store(path: Path, meta: Mapping[str, Any]) -> KernelStore:
    """An empty store in a folder that holds only this writer's lock, and perhaps the remains of one that was killed.

    The record that makes it a store is written last.
    """
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec

    _emptied(path)
    store = KernelStore(path, {**meta, "format": FORMAT, "complete": False})
    tile, c = store.tile, store.c
    try:
        for name in store.blocks or ("",):
            zarr.create_array(
                path / _folder(name),
                shape=store.shape,
                chunks=kernel_shape(store.outputs, min(tile, store.n), min(tile, store.m), c),
                dtype=store.meta["dtype"],
                compressors=[ZstdCodec(level=1), Crc32cCodec()],
                fill_value=float("nan"),
            )
        _write_meta(path, store.meta)
    except OSError:
        _emptied(path)
        raise
    return store


def _emptied(path: Path) -> None:
    """Remove everything but the lock from the folder of an unfinished store."""
    for left in path.iterdir():
        if not left.name.startswith(LOCK):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _write_meta(path: Path, meta: Mapping[str, Any]) -> None:
    import zarr

    zarr.open_group(path, mode="a").attrs.put({_META: dict(meta)})
    _settle(path / "zarr.json")
    _settle(path)


def _folder(name: str) -> str:
    return f"{_BLOCKS}/{quote(name, safe='')}" if name else _KERNEL


def _settle(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _positions(call: str, index: Index | None, size: int) -> Tensor:
    """A slice or indices as a vector of positions; None is all of them."""
    every = torch.arange(size)
    try:
        return every if index is None else every[index]
    except IndexError as error:
        raise TangentError(f"{call}: indices of samples are 0 to {size - 1}, got others ({error})") from error
