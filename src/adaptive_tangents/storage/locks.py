"""One writer at a time: a lock file that names its holder, and claims on single tiles.

The lock of a dead holder is taken over. On this machine, a holder is alive if its process exists. On another machine, the
lock is watched for a while: a living holder keeps writing to it.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adaptive_tangents.errors import TangentError
from adaptive_tangents.runtime.tensor_files import draft_beside

_BEAT = 5.0  # seconds between signs of life
_LONGEST = 10_000  # bytes; a lock has some 100
_WATCHED = 6 * _BEAT  # seconds; a holder on another machine without signs of life for so long is dead


@contextmanager
def writer_lock(call: str, path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` while in the context.

    Raises TangentError if a living process holds it, or if the file is no lock; the lock of a dead process is taken over.
    """
    _acquire(call, path)
    stop = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, stop), daemon=True)
    beating.start()
    try:
        yield
    finally:
        stop.set()
        beating.join()
        if _ours(_read(path)):
            path.unlink(missing_ok=True)


def is_lock(path: Path) -> bool:
    """Whether a file is a lock that a writer made."""
    return path.is_file() and bool(_read(path))


def claim_tile(folder: Path, place: tuple[int, int]) -> bool:
    """Whether this process is the first to claim a tile."""
    try:
        os.close(os.open(_claim(folder, place), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def is_claimed(folder: Path, place: tuple[int, int]) -> bool:
    """Whether a process has claimed a tile."""
    return _claim(folder, place).exists()


def _claim(folder: Path, place: tuple[int, int]) -> Path:
    return folder / f"{place[0]}-{place[1]}"


def _acquire(call: str, path: Path) -> None:
    # The file is complete before it gets its name, so that nobody reads half a lock.
    draft = draft_beside(path)
    draft.write_text(json.dumps(_myself(0)), "utf-8")
    try:
        while True:
            with suppress(FileExistsError):
                os.link(draft, path)
                return
            holder = _read(path)
            if holder is None:
                continue  # released just now
            if not holder:
                raise TangentError(
                    f"{call}: {path} is not a lock that a writer of stores made, so it is left as it is; give another "
                    "path, or move that file away"
                )
            if _alive(path, holder):
                raise TangentError(
                    f"{call}: {path.parent} is being written by process {holder.get('process')} on {holder.get('host')}; "
                    f"wait for it or end it (if it no longer exists, delete {path})"
                )
            _take_away(path, holder)
    finally:
        draft.unlink(missing_ok=True)


def _take_away(path: Path, holder: dict[str, Any]) -> None:
    """Remove the lock of a dead holder, unless another process has taken it over in the meantime."""
    aside = draft_beside(path)
    with suppress(FileNotFoundError):
        os.rename(path, aside)
        if _read(aside) != holder:
            with suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _myself(beats: int) -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "process": pid, "started": _started(pid), "beats": beats}


def _read(path: Path) -> dict[str, Any] | None:
    """The holder of a lock; None if there is no lock, and {} if the file is none."""
    if os.path.lexists(path) and not os.path.isfile(path):
        return {}
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_LONGEST))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}
    lock = isinstance(found, dict) and isinstance(found.get("host"), str) and type(found.get("process")) is int
    return found if lock else {}


def _ours(holder: dict[str, Any] | None) -> bool:
    return holder is not None and (holder.get("host"), holder.get("process")) == (socket.gethostname(), os.getpid())


def _alive(path: Path, holder: dict[str, Any]) -> bool:
    if holder.get("host") == socket.gethostname():
        # A process with the same number but another start time is another process.
        started = _started(holder["process"])
        return started is not None and started == holder.get("started")
    end = time.monotonic() + _WATCHED
    while time.monotonic() < end:
        time.sleep(_BEAT / 2)
        if _read(path) != holder:
            return True
    return False


def _started(pid: int) -> str | None:
    """The start time of a process, in the kernel's clock ticks; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        try:
            os.kill(pid, 0)
        except OSError:
            return None
        return ""
    return None if fields[0] == "Z" else fields[19]


def _beat(path: Path, stop: threading.Event) -> None:
    beats = 0
    while not stop.wait(_BEAT):
        beats += 1
        draft = draft_beside(path)
        with suppress(OSError):
            if not _ours(_read(path)):
                return  # another process took over, for example while this one was suspended
            draft.write_text(json.dumps(_myself(beats)), "utf-8")
            os.replace(draft, path)
