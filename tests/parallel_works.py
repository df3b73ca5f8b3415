"""Works for tests of parallel runs, in a module that their processes import quickly."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import torch

from adaptive_tangents.errors import TangentError
from adaptive_tangents.runs.parallel import side_by_side
from adaptive_tangents.runtime.progress import Progress


def write(folder: Path, name: str, progress: Progress) -> None:
    progress("writing", 0.5)
    (folder / name).write_text(f"{os.getpid()} {torch.get_num_threads()}")


def together(folder: Path, name: str, patience: float, progress: Progress) -> None:
    (folder / name).touch()
    end = time.monotonic() + patience
    while len(list(folder.iterdir())) < 2:
        if time.monotonic() > end:
            raise TangentError("alone")
        time.sleep(0.01)


def fail(progress: Progress) -> None:
    raise TangentError("reproduce: no data")


def die(progress: Progress) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait(folder: Path, progress: Progress) -> None:
    progress("waiting", 0.0)
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def ignore(name: str, stage: str, fraction: float) -> None:
    pass


def wait_in_two(folder: Path) -> None:
    # A shell that starts tests in the background makes them ignore the interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    works = {name: partial(wait, folder) for name in "ab"}
    side_by_side(works, at_once=2, threads=1, progress=lambda name, *_: (folder / f"heard {name}").touch())
