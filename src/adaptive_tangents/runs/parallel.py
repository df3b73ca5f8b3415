"""Run several experiments at once, each in its own process with a share of the cores."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, cast

import torch

from adaptive_tangents.errors import TangentError
from adaptive_tangents.runtime.progress import Progress

Work = Callable[[Progress], None]


def side_by_side(
    works: Mapping[str, Work], *, at_once: int, threads: int, progress: Callable[[str, str, float], None]
) -> None:
    """Run all works in order, at most ``at_once`` at a time, each in a new process with ``threads`` threads.

    Works must be picklable. ``progress`` is called with a work's name, its stage and the fraction done. All processes end
    when this one ends, in whatever way, or when the first of them fails.
    Raises TangentError if a work raises it or its process dies.
    """
    spawning = multiprocessing.get_context("spawn")
    waiting = list(works.items())
    running: dict[Connection, tuple[str, SpawnProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name, work = waiting.pop(0)
                heard, told = spawning.Pipe(duplex=False)
                process = spawning.Process(target=_do, args=(work, threads, told), name=name, daemon=True)
                process.start()
                told.close()
                running[heard] = name, process
            for ready in wait(list(running)):
                heard = cast(Connection, ready)
                name, process = running[heard]
                try:
                    message = heard.recv()
                except EOFError:
                    del running[heard]
                    _end(name, process)
                    continue
                if isinstance(message, TangentError):
                    raise message
                progress(name, *message)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


def _end(name: str, process: SpawnProcess) -> None:
    process.join()
    if process.exitcode:
        raise TangentError(
            f"reproduce: the process of {name} ended with status {process.exitcode}; continue with --resume, and with "
            "--jobs 1 if memory ran out"
        )


def _do(work: Work, threads: int, told: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    from threadpoolctl import threadpool_limits

    with threadpool_limits(threads):
        try:
            work(lambda stage, fraction: told.send((stage, fraction)))
        except TangentError as error:
            told.send(error)
        except KeyboardInterrupt:
            os._exit(130)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
