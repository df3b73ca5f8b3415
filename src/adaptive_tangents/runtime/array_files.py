"""Arrays of npz files, and the bound on what a packed file may unpack to. Pickles are never loaded."""

import os
import zipfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from adaptive_tangents.runtime.memory import format_bytes

UNPACKED, TIMES = 1_000_000_000, 100
"""A packed file may unpack to 1 GB, or to 100 times its size where that is more: a small file cannot fill the memory."""

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class UnpacksToTooMuch(ValueError):
    """A packed file that unpacks to more than the bound; the message says how much."""


class NotAnArray(ValueError):
    """A file or a member of it that is whole but no array of numbers or text."""


def largest_unpacked(packed: int) -> int:
    """Bytes that a file of ``packed`` bytes may unpack to."""
    return max(UNPACKED, TIMES * packed)


def check_unpacked(path: Path) -> None:
    """Raise UnpacksToTooMuch if what a zip file says that it holds exceeds the bound."""
    packed = os.path.getsize(path)
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > largest_unpacked(packed):
        raise UnpacksToTooMuch(
            f"unpacks to {format_bytes(unpacked)}, and at most {format_bytes(largest_unpacked(packed))} are read from a "
            "packed file of its size"
        )


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an npz file, by name.

    Raises OSError or ValueError if it cannot be read, UnpacksToTooMuch, and NotAnArray if it or a member is something else.
    """
    with path.open("rb") as file:
        if file.read(6) == npy.MAGIC_PREFIX:
            raise NotAnArray("it is a single array")
    try:
        check_unpacked(path)
        with zipfile.ZipFile(path) as archive:
            return {
                member.filename.removesuffix(".npy"): _array(member, archive)
                for member in archive.infolist()
                if not member.is_dir()
            }
    except (OSError, NotAnArray, UnpacksToTooMuch):
        raise
    except Exception as error:  # zipfile, zlib and numpy's parser of headers raise many kinds
        raise ValueError(str(error) or type(error).__name__) from error


def _array(member: zipfile.ZipInfo, archive: zipfile.ZipFile) -> NDArray[Any]:
    name = member.filename
    with archive.open(member) as file:
        shape, fortran, dtype = _header(name, file)
        size = prod(shape) * dtype.itemsize
        content = file.read(size + 1)
    if len(content) != size:
        raise ValueError(
            f"{name!r} says that it holds {size} bytes and holds {'more' if len(content) > size else 'fewer'}"
        )
    if not size:
        return np.empty(shape, dtype)
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C").copy(order="K")


def _header(name: str, file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = npy.read_magic(file)
    except ValueError as error:
        raise NotAnArray(f"its member {name!r} is not an array") from error
    if version not in _HEADERS:
        raise NotAnArray(f"its member {name!r} has fields with names, or a later format")
    shape, fortran, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        raise NotAnArray(f"its member {name!r} holds pickled objects")
    if any(not isinstance(length, int) or length < 0 for length in shape):
        raise ValueError(f"{name!r} has the shape {shape}")
    return shape, fortran, dtype
