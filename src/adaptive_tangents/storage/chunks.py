"""Tiles as chunk files: what Zarr writes, with the tile's place inside its checksum.

A chunk is a zstd frame of the entries, a frame that zstd's decoders skip, and the CRC32C of both. Any Zarr reader reads the
entries. The skipped frame is a hash of the store, the block and the place, so a whole chunk in another's place is noticed.
"""

import hashlib
import struct
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 1  # of zstd
_SKIPPED = 0x184D2A50  # the magic number of a frame that decoders skip
_FRAME = 0xFD2FB528
_SEAL = struct.Struct("<II16s")
_CHECKSUM = struct.Struct("<I")


def seal(store: str, block: str, place: tuple[int, int]) -> bytes:
    """The mark of a tile: a hash of its store's record, its block and its place."""
    return hashlib.sha256(f"{store}\n{block}\n{place[0]},{place[1]}".encode()).digest()[:16]


def encoded(entries: NDArray[Any], shape: Sequence[int], mark: bytes) -> bytes:
    """The chunk of a tile; at the kernel's edge, the rest of ``shape`` is NaN."""
    from numcodecs import zstd  # type: ignore[import-untyped]

    whole = np.full(shape, np.nan, entries.dtype.newbyteorder("<"))
    whole[tuple(map(slice, entries.shape))] = entries
    content: bytes = zstd.compress(whole.tobytes(), LEVEL) + _SEAL.pack(_SKIPPED, len(mark), mark)
    return content + _CHECKSUM.pack(_crc(content))


def decoded(content: bytes, shape: Sequence[int], dtype: str, mark: bytes | None) -> NDArray[Any]:
    """The entries of a chunk; a store of format 1 has no ``mark``. Raises ValueError unless all of it is as written."""
    from numcodecs import zstd

    body, checksum = content[:-4], content[-4:]
    if len(checksum) < 4 or _CHECKSUM.unpack(checksum)[0] != _crc(body):
        raise ValueError("its checksum is wrong")
    if mark is not None:
        body, end = body[: -_SEAL.size], body[-_SEAL.size :]
        if end[:8] != _SEAL.pack(_SKIPPED, len(mark), mark)[:8]:
            raise ValueError("it does not say which tile it is")
        if end[8:] != mark:
            raise ValueError("it is another tile's chunk")
    entries = np.empty(shape, np.dtype(dtype).newbyteorder("<"))
    # A frame says how much it holds, and that is checked first, so that no chunk unpacks to more than a tile.
    if _held(body) != entries.nbytes:
        raise ValueError(f"it holds {_held(body)} bytes and a tile has {entries.nbytes}")
    try:
        zstd.decompress(body, entries)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return entries.astype(dtype, copy=False)


def longest(shape: Sequence[int], itemsize: int) -> int:
    """More bytes than a chunk can have."""
    return 1024 + 2 * prod(shape) * itemsize


def _held(frame: bytes) -> int | None:
    """The bytes that a zstd frame says it holds, as its format defines the header."""
    if len(frame) < 6 or int.from_bytes(frame[:4], "little") != _FRAME:
        return None
    flags = frame[4]
    single, size = bool(flags & 0x20), (1 if flags & 0x20 else 0, 2, 4, 8)[flags >> 6]
    start = 5 + (not single) + (0, 1, 2, 4)[flags & 3]
    return int.from_bytes(frame[start : start + size], "little") + (256 if size == 2 else 0) if size else None


def _crc(content: bytes) -> int:
    from google_crc32c import value

    return int(value(content))
