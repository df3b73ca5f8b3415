"""The record of a stored kernel, ``zarr.json``: sizes, dtype, sources, whether it is complete, and a checksum of all that."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.kernel_layout import kernel_shape
from adaptive_tangents.runtime.tensor_files import fingerprint, write_bytes

FORMAT = 2
_FORMATS = (1, FORMAT)  # format 1 had no checksum of the record, and tiles did not say where they belong
RECORD = "zarr.json"
_META = "adaptive_tangents"
_MOST_TILES = 2000  # along both sides; more than any plan makes


def read_meta(path: Path, call: str = "open_kernel") -> dict[str, Any] | None:
    """What the store in a folder records; None if there is no store.

    Raises TangentError if the record is damaged, was changed by hand, or has a format that this version does not read.
    """
    if os.path.lexists(path / RECORD) and not os.path.isfile(path / RECORD):
        raise _damaged(call, path, "is not a file")
    try:
        content = json.loads((path / RECORD).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(call, path, f"cannot be read ({error})") from error
    attributes = content.get("attributes") if isinstance(content, dict) else None
    meta = attributes.get(_META) if isinstance(attributes, dict) else None
    if not isinstance(meta, dict):
        return None
    if meta.get("format") not in _FORMATS or isinstance(meta["format"], bool):
        raise TangentError(
            f"{call}: {path} is of format {meta.get('format')}, and this version reads formats 1 and {FORMAT}; "
            f"read it with adaptive-tangents {meta.get('version')}, which made it, or make it again"
        )
    if meta["format"] == FORMAT and meta.get("checksum") != checksum(meta):
        raise _damaged(call, path, "was changed since it was written")
    wrong = [key for key, holds in _HOLDS.items() if key not in meta or not holds(meta[key])]
    if wrong or not _fits(meta) or (meta["format"] == 1 and not _fits_arrays(path, meta)):
        raise _damaged(call, path, f"is not as it was written ({', '.join(wrong) or 'its sizes do not fit together'})")
    return meta


def checksum(meta: Mapping[str, Any]) -> str:
    """The hash of a record, but for whether the store is complete; the tiles' marks contain it."""
    return fingerprint({key: value for key, value in meta.items() if key not in ("complete", "checksum")})


def write_meta(path: Path, meta: Mapping[str, Any]) -> None:
    """Write the record, in one step."""
    content = {"attributes": {_META: dict(meta)}, "zarr_format": 3, "node_type": "group"}
    write_bytes(path / RECORD, json.dumps(content, indent=2).encode())


def _damaged(call: str, path: Path, what: str) -> TangentError:
    return TangentError(
        f"{call}: the record {path / RECORD} {what}; put back a copy of it, or make the kernel again in another folder "
        "(nothing in this one is changed)"
    )


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _list_of(kinds: type | tuple[type, ...]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(item, kinds) for item in value)


_HOLDS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("n", "m", "c", "tile", "pass_samples", "working_bytes"), _count),
    **dict.fromkeys(("symmetric", "complete"), lambda value: isinstance(value, bool)),
    "outputs": lambda value: value in ("full", "trace", "diagonal"),
    "dtype": lambda value: value in ("float32", "float64"),
    "blocks": lambda value: _list_of(str)(value) and len(set(value)) == len(value),
    "probe": _list_of((int, float)),
}


def _fits(meta: Mapping[str, Any]) -> bool:
    """Whether the sizes of a record can be those of one store."""
    n, m, tile = meta["n"], meta["m"], meta["tile"]
    return bool((not meta["symmetric"] or n == m) and -(-n // tile) - (-m // tile) <= _MOST_TILES)


def _fits_arrays(path: Path, meta: Mapping[str, Any]) -> bool:
    """Whether the arrays of a store of format 1, which has no checksum, have the sizes that its record tells."""
    chunk = kernel_shape(meta["outputs"], min(meta["tile"], meta["n"]), min(meta["tile"], meta["m"]), meta["c"])
    expected = [*kernel_shape(meta["outputs"], meta["n"], meta["m"], meta["c"])], [*chunk], meta["dtype"]
    for folder in (path / name for name in map(array_folder, meta["blocks"] or ("",))):
        try:
            array = json.loads((folder / RECORD).read_text("utf-8"))
            found = array["shape"], array["chunk_grid"]["configuration"]["chunk_shape"], array["data_type"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False
        if found != expected:
            return False
    return True


def array_folder(name: str) -> str:
    """The folder of a block's array within the store; "" names the one array of all blocks."""
    return f"blocks/{quote(name, safe='')}" if name else "kernel"
