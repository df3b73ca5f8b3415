"""Which files of a result folder are the library's own: only these are replaced."""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adaptive_tangents.errors import TangentError

PROGRAM = "adaptive-tangents"
RESULTS_FILE, ARRAYS_FILE, PAGE_FILE, FIGURES_FOLDER = "results.json", "arrays.npz", "report.html", "figures"
BLOCKS_FILE, LORA_FILE = "blocks.csv", "lora.json"
BLOCKS_HEAD = "block,rows,columns,trace_share_start,"
"""How a table of blocks begins."""
_LORA_KEYS = {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"}
_PAGE_MARK = f'class="eyebrow">{PROGRAM}'


def check_ours(call: str, folder: Path, figures: Iterable[str] = (), tables: Iterable[str] = ()) -> None:
    """Raise TangentError if a file that a run would replace in its folder is not the library's own."""
    names = [RESULTS_FILE, ARRAYS_FILE, PAGE_FILE, *tables]
    names += [f"{FIGURES_FOLDER}/{name}.{end}" for name in figures for end in ("svg", "png")]
    for name in names:
        check_replaceable(call, folder / name)


def check_replaceable(call: str, path: Path) -> None:
    """Raise TangentError if there is something at a path that is not the library's own file."""
    if os.path.lexists(path) and not _ours(path):
        raise TangentError(
            f"{call}: {path} was not written by {PROGRAM}, so it is not replaced; give another folder, or move it away"
        )


def mark(results: bytes) -> bytes:
    """The comment that the file of arrays carries: who wrote it, and the hash of the results that belong to it."""
    return f"{PROGRAM} {hashlib.sha256(results).hexdigest()}".encode()


def as_written(folder: Path) -> bool:
    """Whether results and arrays are what `write_results` wrote together; earlier versions left no mark to tell."""
    return _comment(folder / ARRAYS_FILE) == mark((folder / RESULTS_FILE).read_bytes())


def _ours(path: Path) -> bool:
    if path.is_symlink() or not os.path.isfile(path):
        return False
    try:
        if path.name == RESULTS_FILE:
            return as_written(path.parent) or _tells_version(json.loads(path.read_text("utf-8")))
        if path.name == ARRAYS_FILE:
            return _comment(path).startswith(PROGRAM.encode()) or _ours(path.with_name(RESULTS_FILE))
        if path.name == BLOCKS_FILE:
            return path.read_text("utf-8").startswith(BLOCKS_HEAD)
        if path.name == LORA_FILE:
            held = json.loads(path.read_text("utf-8"))
            return isinstance(held, dict) and _LORA_KEYS <= held.keys() <= _LORA_KEYS | {"modules_to_save"}
        if path.name == PAGE_FILE:
            return _PAGE_MARK in path.read_text("utf-8")
        # A figure's two files are written SVG first; its identifiers begin with its name.
        vector = path.with_suffix(".svg")
        return os.path.isfile(vector) and f'id="{path.stem}-figure_1"' in vector.read_text("utf-8")
    except (OSError, ValueError, RecursionError):
        return False


def _tells_version(results: Any) -> bool:
    """Whether results, or all that a summary holds, tell the version of the library that made them, as all studies do."""
    if not isinstance(results, dict):
        return False
    runs = results.get("runs")
    records = list(runs.values()) if results.get("experiment") == "all" and isinstance(runs, dict) else [results]
    versions = [record.get("versions") if isinstance(record, dict) else None for record in records]
    return bool(versions) and all(isinstance(each, dict) and "adaptive_tangents" in each for each in versions)


def _comment(path: Path) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment
    except (OSError, zipfile.BadZipFile):
        return b""
