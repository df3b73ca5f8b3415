"""Small pictures within a page: heat maps of kernels and images of samples, as data URIs of PNG files."""

import base64
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive_tangents.reporting.drawing import DIVERGING, limit_of

_SHADES = 127  # an odd number, so that zero has a color of its own
_WIDEST = 160  # pixels


def heat_map(kernel: NDArray[Any]) -> str:
    """A square matrix in the colors of the figures, each with its own scale.

    Args:
        kernel: the matrix (n, n); of more than 160 rows, means of neighbors are shown.
    """
    shown = _smaller(np.nan_to_num(kernel))
    limit = limit_of(shown)
    places = np.clip((shown / limit + 1) / 2, 0, 1) * (_SHADES - 1)
    palette = (np.array([DIVERGING(k / (_SHADES - 1))[:3] for k in range(_SHADES)]) * 255).round().astype(np.uint8)
    return _uri(np.round(places).astype(np.uint8), kind=3, palette=palette)


def image(pixels: NDArray[Any]) -> str:
    """An image of bytes (height, width, 1 or 3)."""
    return _uri(np.ascontiguousarray(pixels, dtype=np.uint8), kind=0 if pixels.shape[-1] == 1 else 2)


def _smaller(kernel: NDArray[Any]) -> NDArray[Any]:
    step = -(-len(kernel) // _WIDEST)
    if step == 1:
        return kernel
    edges = np.arange(0, len(kernel), step)
    sums = np.add.reduceat(np.add.reduceat(kernel, edges, 0), edges, 1)
    counts = np.diff([*edges, len(kernel)])
    found: NDArray[Any] = sums / np.outer(counts, counts)
    return found


def _uri(values: NDArray[np.uint8], *, kind: int, palette: NDArray[np.uint8] | None = None) -> str:
    height, width = values.shape[:2]
    rows = values.reshape(height, -1)
    filtered = np.hstack([np.zeros((height, 1), np.uint8), rows])  # each row begins with its filter, none
    parts = [_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))]
    parts += [] if palette is None else [_chunk(b"PLTE", palette.tobytes())]
    parts += [_chunk(b"IDAT", zlib.compress(filtered.tobytes(), 9)), _chunk(b"IEND", b"")]
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
