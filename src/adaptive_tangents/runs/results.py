"""Result folders: written completely or not at all, read back with clear errors."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from adaptive_tangents.errors import TangentError
from adaptive_tangents.runs.own_files import (
    ARRAYS_FILE,
    FIGURES_FOLDER,
    PAGE_FILE,
    RESULTS_FILE,
    as_written,
    check_replaceable,
    mark,
)
from adaptive_tangents.runtime.array_files import UnpacksToTooMuch, read_arrays
from adaptive_tangents.runtime.tensor_files import write_bytes, write_file

Results = Mapping[str, Any]
Arrays = Mapping[str, NDArray[Any]]

__all__ = [
    "ARRAYS_FILE",
    "FIGURES_FOLDER",
    "PAGE_FILE",
    "RESULTS_FILE",
    "as_written",
    "load_results",
    "plain",
    "write_results",
]


def write_results(results: Results, arrays: Arrays, directory: str | os.PathLike[str]) -> Path:
    """Write `results.json` and `arrays.npz` into `directory`, each replaced in one step; return the folder.

    Non-finite numbers become null. Raises TangentError for a value that JSON cannot hold, an array of objects, or a file
    of these names that something else has written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = write_results({"experiment": "demo", "loss": float("nan")}, {"x": np.zeros(3)}, folder)
    ...     load_results(folder)
    ({'experiment': 'demo', 'loss': None}, {'x': array([0., 0., 0.])})
    """
    directory = Path(directory)
    held = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in held.items():
        if array.dtype.hasobject:
            raise TangentError(f"report: array {name!r} holds Python objects; give an array of numbers or text")
    text = json.dumps(plain(results, "results"), indent=1, ensure_ascii=False, allow_nan=False)
    content = text.encode("utf-8", "backslashreplace")  # half a character becomes JSON's own escape of it
    for name in (RESULTS_FILE, ARRAYS_FILE):
        check_replaceable("report", directory / name)

    def pack(file: IO[bytes]) -> None:
        # numpy 1.26 has no allow_pickle here and would store one as an array.
        np.savez_compressed(file, **held)  # type: ignore[arg-type]
        # A zip file ends with the length of its comment, and the comment.
        file.seek(-2, os.SEEK_END)
        file.write(len(mark(content)).to_bytes(2, "little") + mark(content))

    # Arrays first: a folder with a new results.json then has its arrays too.
    write_file(directory / ARRAYS_FILE, pack)
    write_bytes(directory / RESULTS_FILE, content)
    return directory


def load_results(
    directory: str | os.PathLike[str], call: str = "report"
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read a result folder back as (results, arrays). Raises TangentError if a part is missing or unreadable."""
    directory = Path(directory)
    if not os.path.isdir(directory):
        raise TangentError(f"{call}: no folder {directory}; give the folder with an experiment's results")
    source, store = directory / RESULTS_FILE, directory / ARRAYS_FILE
    if not os.path.isfile(source):
        raise TangentError(f"{call}: no {RESULTS_FILE} in {directory}; run an experiment with --out {directory} first")
    try:
        results = json.loads(source.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TangentError(f"{call}: {source} is not valid JSON ({error}); run the experiment again") from error
    except OSError as error:
        raise TangentError(f"{call}: {source} cannot be read ({error}); run the experiment again") from error
    if not isinstance(results, dict) or not isinstance(results.get("experiment"), str):
        raise TangentError(f"{call}: {source} names no experiment; run the experiment again")
    if not os.path.isfile(store):
        raise TangentError(f"{call}: no {ARRAYS_FILE} beside {source}; copy it there or run the experiment again")
    try:
        return results, read_arrays(store)
    except UnpacksToTooMuch as error:
        raise TangentError(f"{call}: {store} {error}; run the experiment again") from error
    except (ValueError, OSError) as error:
        raise TangentError(f"{call}: cannot read {store} ({error}); run the experiment again") from error


def plain(value: Any, where: str = "results") -> Any:
    """The value in the types that JSON gives back; numbers that are not finite become None. ``where`` names it in errors."""
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{k}]") for k, item in enumerate(value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TangentError(
        f"report: {where} is a {type(value).__name__}, which JSON cannot hold; give a number, text, a list or a mapping"
    )
