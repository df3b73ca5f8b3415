"""Processes for tests of stored kernels, forked, because a new one takes seconds to import torch.

Run by torchrun, this file is a process of its group.
"""

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zarr  # noqa: F401  (once here, not in every child)

import adaptive_tangents as at
from adaptive_tangents.storage.store import KernelStore, read_meta
from stored import LIMIT, data, files, network

KILLS = 20


def make(path: Path, **options: Any) -> at.storage.KernelStore:
    given = {"outputs": "trace", "tile": 4, "memory_limit": LIMIT, "resume": True} | options
    return at.kernel_to_store(given.pop("model", network()), given.pop("x", data(40)), path, **given)


def fork(function: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # a forked process must not wait for threads that it lacks
            function()
            code = 0
        except at.TangentError as error:
            print(f"refused: {error}", flush=True)
            code = 3
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def code_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(folder: Path) -> None:
    """Kill at random moments: the store is always valid, and the end is that of an undisturbed run."""
    expected, x = folder / "expected.zarr", data(28)
    for path in (folder / "first.zarr", expected):  # the first imports modules and compiles shape checks
        started = time.monotonic()
        make(path, x=x)
    took = time.monotonic() - started
    draw, kills, stores = random.Random(0), 0, 0
    path = folder / "0.zarr"

    def resume() -> None:
        if read_meta(path) is not None:
            found = at.open_kernel(path)
            assert found.verify() == []
            assert not (found.complete and found.missing())
        make(path, x=x)

    while kills < KILLS:
        pid = fork(resume)
        time.sleep(draw.uniform(0, 0.8 * took))
        os.kill(pid, signal.SIGKILL)
        code = code_of(pid)
        assert code in (0, -signal.SIGKILL), code
        kills += code != 0
        if code == 0:
            assert files(path) == files(expected)
            stores += 1
            path = folder / f"{stores}.zarr"
    assert code_of(fork(resume)) == 0
    assert files(path) == files(expected)


def together(folder: Path) -> None:
    """Several processes make the same store as one; an error of one stops all; and all get work."""
    make(folder / "expected.zarr")

    def member(rank: int, size: int, path: Path, prepare: Callable[[int], dict[str, Any]]) -> None:
        meeting = f"file://{path}.meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=120))
        make(path, **prepare(rank))

    def run(size: int, path: Path, prepare: Callable[[int], dict[str, Any]]) -> list[int]:
        members = [fork(lambda rank=rank: member(rank, size, path, prepare)) for rank in range(size)]
        return [code_of(pid) for pid in members]

    for size in (2, 3):
        path = folder / f"{size}.zarr"
        assert run(size, path, lambda rank: {}) == [0] * size
        assert files(path) == files(folder / "expected.zarr")

    # One process has other data.
    assert run(2, folder / "other.zarr", lambda rank: {"x": data(40, seed=rank)}) == [3, 3]
    assert read_meta(folder / "other.zarr") is None

    # A slow process leaves its share to the other.
    def slow(rank: int) -> dict[str, Any]:
        write = KernelStore.write

        def counted(self: KernelStore, place: tuple[int, int], kernels: Any) -> None:
            (folder / f"by-{rank}-{place[0]}-{place[1]}").touch()
            time.sleep(0.6 if rank else 0)
            write(self, place, kernels)

        KernelStore.write = counted  # type: ignore[method-assign]
        return {}

    assert run(2, folder / "slow.zarr", slow) == [0, 0]
    by = [sum(1 for _ in folder.glob(f"by-{rank}-*")) for rank in (0, 1)]
    assert sum(by) == 55
    assert by[0] > 40
    assert files(folder / "slow.zarr") == files(folder / "expected.zarr")


def rank(folder: Path) -> None:
    """The program that torchrun starts. At the first start the second process kills itself at its fourth tile."""
    first, second = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0", os.environ["RANK"] == "1"
    write, written = KernelStore.write, []

    def limited(self: KernelStore, place: tuple[int, int], kernels: Any) -> None:
        if first and second and len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        # The other process must leave it four tiles.
        time.sleep(0.02 if first and not second else 0)
        write(self, place, kernels)
        written.append(place)

    KernelStore.write = limited  # type: ignore[method-assign]
    make(folder / "K.zarr")


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank(Path(sys.argv[1]))
