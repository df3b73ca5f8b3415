"""What a writer may touch in the folder of a store: only entries that its own kind has made, one by one."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from adaptive_tangents.errors import TangentError
from adaptive_tangents.kernels.schedule import Key
from adaptive_tangents.runtime.tensor_files import is_draft, write_bytes
from adaptive_tangents.storage.locks import is_lock
from adaptive_tangents.storage.record import RECORD

LOCK, CLAIMS, FEATURES = ".lock", ".claims", ".features"  # exist only while a store is written
PART: dict[str, Any] = {"adaptive_tangents": "a part of a kernel store"}  # the attributes of a store's arrays
_ARRAYS = ("kernel", "blocks")
_MESSAGES = "adaptive_tangents: messages with the features of a range of samples"
_LONGEST = 10_000_000  # bytes of an announcement; most have some hundred


def check_empty(call: str, path: Path) -> None:
    """Raise TangentError if a folder without a record holds more than what writers leave that were killed at once."""
    list(_remains(call, path))


def clear_remains(call: str, path: Path) -> None:
    """Remove what a writer left that was killed before its store had a record. Raises TangentError as `check_empty` does."""
    for entry in list(_remains(call, path)):
        entry.unlink(missing_ok=True)
        if entry.name == RECORD:
            with suppress(OSError):
                entry.parent.rmdir()


def clear_drafts(path: Path) -> None:
    """Remove the unfinished files of writers that were killed, in the folder of a store."""
    for folder in (path, *(path / name for name in _ARRAYS)):
        for entry in folder.glob("*") if folder == path else folder.rglob("*"):
            if is_draft(entry):
                entry.unlink(missing_ok=True)


def clear_claims(path: Path) -> None:
    """Remove what processes tell each other, claims on tiles and features they announce, and folders that are then empty."""
    for claim in (path / CLAIMS).glob("*"):
        if re.fullmatch(r"\d+-\d+", claim.name) and claim.is_file() and not claim.stat().st_size:
            claim.unlink(missing_ok=True)
    for entry in (path / FEATURES).glob("*"):
        if is_draft(entry) or announced(entry) is not None:
            entry.unlink(missing_ok=True)
    for name in (CLAIMS, FEATURES):
        with suppress(OSError):
            (path / name).rmdir()


def announce(folder: Path, key: Key, messages: list[list[int]]) -> None:
    """Announce the features of a range of samples: tag, bytes, and place in memory of each message."""
    write_bytes(folder / f"{key[0]}-{key[1]}", json.dumps({_MESSAGES: messages}).encode())


def announced(entry: Path) -> tuple[Key, list[list[int]]] | None:
    """The range of samples and the messages that a file announces; None if it is no announcement."""
    name = re.fullmatch(r"([01])-(\d{1,9})", entry.name)
    with suppress(OSError, ValueError, RecursionError):
        if name and entry.is_file() and entry.stat().st_size < _LONGEST:
            found = json.loads(entry.read_bytes())
            if isinstance(found, dict) and list(found) == [_MESSAGES]:
                return (int(name[1]), int(name[2])), found[_MESSAGES]
    return None


def _remains(call: str, path: Path) -> Iterator[Path]:
    """The files of a writer that was killed at once, innermost first; anything else raises TangentError."""
    for entry in path.iterdir():
        if entry.name in _ARRAYS and entry.is_dir() and not entry.is_symlink():
            yield from _remains_of_arrays(call, path, entry)
        elif is_draft(entry):
            yield entry
        elif not (entry.name == LOCK and is_lock(entry)):
            raise TangentError(
                f"{call}: {path} is a folder that holds something else; give a path that does not exist yet (found: "
                f"{entry.name})"
            )


def _remains_of_arrays(call: str, path: Path, folder: Path) -> Iterator[Path]:
    found = sorted(folder.rglob("*"), key=lambda entry: -len(entry.parts))
    for entry in found:
        if entry.is_symlink() or (entry.is_file() and not is_draft(entry) and not _is_part(entry)):
            stored = _is_part(folder / RECORD) or "c" in entry.relative_to(folder).parts
            what = "a kernel store without its record" if stored else "something else"
            raise TangentError(
                f"{call}: {path} is a folder that holds {what}; "
                + (f"put back a copy of {path / RECORD}, or " if stored else "")
                + f"give a path that does not exist yet (found: {entry.relative_to(path)})"
            )
    yield from (entry for entry in found if entry.is_file())


def _is_part(path: Path) -> bool:
    """Whether a file is the record of one of a store's own arrays."""
    if path.name != RECORD or not path.is_file():
        return False
    with suppress(OSError, ValueError, RecursionError, AttributeError):
        return bool(json.loads(path.read_text("utf-8")).get("attributes") == PART)
    return False
