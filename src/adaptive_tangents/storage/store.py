"""The kernel store: a Zarr v3 folder with one chunk per tile, compressed and checksummed; if symmetric, one triangle only.

A chunk is written beside its place and then renamed, so a tile is whole or absent whenever the process ends. The folder
records what the kernel was made from, and it is marked complete only once every tile is there.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.kernel_layout import Outputs, column_axis, kernel_shape, swapped
from adaptive_tangents.features.summands import Index
from adaptive_tangents.kernels.schedule import Place
from adaptive_tangents.runtime.memory import limit_for, require_memory
from adaptive_tangents.runtime.progress import Asked, shown
from adaptive_tangents.runtime.tensor_files import write_bytes
from adaptive_tangents.runtime.told import html
from adaptive_tangents.storage.chunks import LEVEL, decoded, encoded, longest, seal
from adaptive_tangents.storage.folders import PART, clear_drafts, clear_remains
from adaptive_tangents.storage.record import FORMAT, RECORD, array_folder, checksum, read_meta, write_meta

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

    def _repr_html_(self) -> str:
        facts = {
            "path": self.path, "kernel": f"{' × '.join(map(str, self.shape))}, {self.outputs}", "dtype": self.meta["dtype"],
            "tiles": f"{len(self.places)} of {self.tile} samples a side",
            "state": "complete" if self.complete else f"{len(self.missing())} tiles missing",
        }  # fmt: skip
        return html(type(self).__name__, facts, ("block",), ((name,) for name in self.blocks))

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

    def verify(self, progress: Asked = None) -> list[Place]:
        """The damaged tiles: their checksum is wrong, they are another tile's, or entries are not finite.

        Args:
            progress: called with "verifying" and the fraction that is done; True shows a bar.
        """
        damaged, missing = [], set(self.missing())
        with shown(progress) as tell:
            for done, place in enumerate(self.places):
                if place not in missing and not all(self._sound(place, name) for name in self._names):
                    damaged.append(place)
                if tell is not None:
                    tell("verifying", (done + 1) / len(self.places))
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
        itemsize = torch.empty((), dtype=self.dtype, device="cpu").element_size()
        band = kernel_shape(self.outputs, min(self.tile, len(r)), len(q), self.c)
        needed = (torch.Size(shape).numel() + 2 * torch.Size(band).numel()) * itemsize
        remedy = "read fewer rows or columns, or go through tiles()"
        require_memory("read", needed, limit_for(self.limit), remedy=remedy)
        out = torch.empty(shape, dtype=self.dtype, device="cpu")
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
            content = encoded(entries.numpy(), self._chunk, seal(self.meta["checksum"], name, place))
            write_bytes(self._file(place, name), content)
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
        clear_drafts(self.path)

    def marked(self, *, complete: bool) -> "KernelStore":
        """The store, marked on disk as complete or not; all tiles are flushed to the disk before it counts as complete.

        Args:
            complete: whether every tile is there.
        """
        if complete:
            for folder in {path.parent for place in self.places for path in self._files(place)}:
                _settle(folder)
        meta = {**self.meta, "complete": complete}
        _write_record(self.path, meta)
        return KernelStore(self.path, meta, self.limit)

    @property
    def _names(self) -> tuple[str, ...]:
        return self.blocks or ("",)

    @property
    def _chunk(self) -> tuple[int, ...]:
        """The shape of a whole tile."""
        return kernel_shape(self.outputs, min(self.tile, self.n), min(self.tile, self.m), self.c)

    def _seal(self, place: Place, name: str) -> bytes | None:
        return None if self.meta["format"] < FORMAT else seal(self.meta["checksum"], name, place)

    def _file(self, place: Place, name: str) -> Path:
        where = {"full": (place[0], 0, place[1], 0), "trace": place, "diagonal": (*place, 0)}[self.outputs]
        return self.path.joinpath(array_folder(name), "c", *map(str, where))

    def _files(self, place: Place) -> list[Path]:
        return [self._file(place, name) for name in self._names]

    def _decoded(self, place: Place, name: str) -> Tensor:
        """The entries of a tile; raises OSError or ValueError if they are not as they were written."""
        path, dtype = self._file(place, name), self.meta["dtype"]
        if path.stat().st_size > longest(self._chunk, self.dtype.itemsize):
            raise ValueError("it is longer than a tile can be")
        whole = decoded(path.read_bytes(), self._chunk, dtype, self._seal(place, name))
        rows, columns = (slice(0, where.stop - where.start) for where in self.slices(place))
        return torch.from_numpy(whole[(rows, slice(None), columns) if self.outputs == "full" else (rows, columns)])

    def _sound(self, place: Place, name: str) -> bool:
        try:
            return bool(torch.isfinite(self._decoded(place, name)).all())
        except (ValueError, OSError):
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
        except (ValueError, OSError) as error:
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
        TangentError: when there is no store, its record is damaged or changed by hand, or it has another format.

    >>> import tempfile, torch, adaptive_tangents as at
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = at.kernel_to_store(torch.nn.Linear(3, 2), torch.randn(7, 3), f"{folder}/K.zarr", tile=3)
    ...     at.open_kernel(f"{folder}/K.zarr").shape
    (7, 2, 7, 2)
    """
    meta = read_meta(Path(path))
    if meta is None:
        raise TangentError(
            f"open_kernel: there is no kernel store at {path}; make one with kernel_to_store"
            + (f", or put back a copy of {RECORD}, which is missing" if (Path(path) / "kernel" / "c").is_dir() else "")
        )
    return KernelStore(Path(path), meta, memory_limit)


def create_store(call: str, path: Path, meta: Mapping[str, Any]) -> KernelStore:
    """An empty store in a folder that holds only this writer's lock, and perhaps the remains of one that was killed.

    The record that makes it a store is written last. Raises TangentError if the folder holds something else.
    """
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec

    clear_remains(call, path)
    recorded = json.loads(json.dumps({**meta, "format": FORMAT, "complete": False}))
    store = KernelStore(path, recorded | {"checksum": checksum(recorded)})
    files: dict[str, Any] = {}
    memory = zarr.storage.MemoryStore(files)
    if store.blocks:
        zarr.create_group(memory, path="blocks", attributes=PART)
    for name in store.blocks or ("",):
        zarr.create_array(
            memory,
            name=array_folder(name),
            shape=store.shape,
            chunks=store._chunk,
            dtype=store.meta["dtype"],
            compressors=[ZstdCodec(level=LEVEL), Crc32cCodec()],
            fill_value=float("nan"),
            attributes=PART,
        )
    try:
        for name, content in files.items():
            if name != RECORD:
                write_bytes(path / name, content.to_bytes(), replace=False)
        _write_record(path, store.meta)
    except OSError:
        clear_remains(call, path)
        raise
    return store


def _write_record(path: Path, meta: Mapping[str, Any]) -> None:
    write_meta(path, meta)
    _settle(path / RECORD)
    _settle(path)


def _settle(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _positions(call: str, index: Index | None, size: int) -> Tensor:
    """A slice or indices as a vector of positions; None is all of them."""
    every = torch.arange(size, device="cpu")
    try:
        return every if index is None else every[index]
    except IndexError as error:
        raise TangentError(f"{call}: indices of samples are 0 to {size - 1}, got others ({error})") from error
