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
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zarr  # noqa: F401  (once here, not in every child)
from torch.nn import Linear, Sequential, Tanh

import adaptive_tangents as at
from adaptive_tangents.storage import passing
from adaptive_tangents.storage.feature_stream import Stream
from adaptive_tangents.storage.passing import Passing
from adaptive_tangents.storage.store import KernelStore, read_meta
from stored import LIMIT, data, files, network

KILLS = 10


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


def member(rank: int, size: int, path: Path, prepare: Callable[[int], dict[str, Any]]) -> None:
    meeting = f"file://{path}.meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    make(path, **prepare(rank))


def members(size: int, path: Path, prepare: Callable[[int], dict[str, Any]]) -> list[int]:
    """Processes of a group that make a store; each makes it with the options that ``prepare`` returns there."""
    return [fork(lambda rank=rank: member(rank, size, path, prepare)) for rank in range(size)]


def run(size: int, path: Path, prepare: Callable[[int], dict[str, Any]]) -> list[int]:
    return [code_of(pid) for pid in members(size, path, prepare)]


def counting(
    folder: Path, then: Callable[[int], object] = lambda rank: None, seconds: float = 60.0
) -> Callable[[int], dict[str, Any]]:
    """Note in a folder who captured and received which ranges, and call ``then`` at a process's first tile.

    Processes take it that capturing a range takes ``seconds``, so that no load decides who captures what.
    """

    def prepare(rank: int) -> dict[str, Any]:
        part, take, write, begun = Stream.part, Passing.take, KernelStore.write, []

        def captured(self: Stream, side: int, rows: slice, pass_samples: int) -> at.TangentFeatures:
            note("captured", side, rows.start)
            return part(self, side, rows, pass_samples)

        def received(self: Passing, key: tuple[int, int]) -> at.TangentFeatures | None:
            if (found := take(self, key)) is not None:
                note("received", *key)
            return found

        def written(self: KernelStore, place: tuple[int, int], kernels: Any) -> None:
            if not begun:
                begun.append(place)
                then(rank)
            write(self, place, kernels)

        def note(what: str, side: int, where: int) -> None:
            with (folder / f"{what}-{rank}").open("a") as file:
                file.write(f"{side}-{where}\n")

        Stream.part, Passing.take, KernelStore.write = captured, received, written  # type: ignore[method-assign]
        passing._PATIENCE = seconds / 2
        Passing.seconds = property(lambda self: seconds, lambda self, taken: None)  # type: ignore[assignment]
        return {}

    folder.mkdir(exist_ok=True)
    return prepare


def noted(folder: Path, what: str) -> list[list[str]]:
    return [path.read_text().split() for path in sorted(folder.glob(f"{what}-*"))]


def together(folder: Path) -> None:
    """Several processes make the same store as one; an error of one stops all; and all get work."""
    make(folder / "expected.zarr")
    for size in (2, 3):
        path = folder / f"{size}.zarr"
        assert run(size, path, counting(folder / f"noted-{size}")) == [0] * size
        assert files(path) == files(folder / "expected.zarr")
        # Each range is captured by one process, and each has its part of them.
        made = noted(folder / f"noted-{size}", "captured")
        assert sorted(chain.from_iterable(made)) == sorted(f"0-{start}" for start in range(0, 40, 4))
        assert max(map(len, made)) - min(map(len, made)) <= 1

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


def done_without(folder: Path) -> None:
    """A process that is killed or stopped leaves its work to the other, which captures what does not come."""
    make(folder / "expected.zarr")

    def end(how: signal.Signals) -> Callable[[int], object]:
        return lambda rank: os.kill(os.getpid(), how) if rank else time.sleep(0.3)

    # Killed at its first tile: the other makes all tiles but that one.
    path = folder / "killed.zarr"
    started = time.monotonic()
    assert run(2, path, counting(folder / "killed", end(signal.SIGKILL))) == [1, -signal.SIGKILL]
    assert time.monotonic() - started < 60
    left = at.open_kernel(path)
    assert (left.complete, len(left.missing()), left.verify()) == (False, 1, [])
    make(path)
    assert files(path) == files(folder / "expected.zarr")

    # Killed before it announces anything: the other captures all ranges, one after the other.
    path = folder / "silent.zarr"
    noting = counting(folder / "silent", seconds=0.1)

    def silent(rank: int) -> dict[str, Any]:
        Passing.offer = lambda self, key, feats: end(signal.SIGKILL)(rank)  # type: ignore[method-assign]
        return noting(rank)

    assert run(2, path, silent) == [1, -signal.SIGKILL]
    assert at.open_kernel(path).missing() == []
    assert [len(found) for found in noted(folder / "silent", "captured")] == [10, 5]

    # Stopped after it has announced its features: the other waits for them a while, then captures them.
    path = folder / "stopped.zarr"
    pids = members(2, path, counting(folder / "stopped", end(signal.SIGSTOP), seconds=1.0))
    started = time.monotonic()
    try:
        while len(list((path / "kernel" / "c").glob("*/*"))) < 54:
            assert time.monotonic() - started < 60
            time.sleep(0.02)
    finally:
        os.kill(pids[1], signal.SIGCONT)
    assert [code_of(pid) for pid in pids] == [0, 0]
    assert files(path) == files(folder / "expected.zarr")
    assert [len(found) for found in noted(folder / "stopped", "captured")] == [10, 5]


def passed_again(folder: Path) -> None:
    """Two processes with room for their own five ranges and two or three more pass features on, again where it is needed."""
    model = Sequential(Linear(6, 300), Tanh(), Linear(300, 2)).double()
    room: dict[str, Any] = {"model": model, "x": data(40), "memory_limit": 410_000}
    assert at.plan_kernel(**room, outputs="trace", tile=4).layout.cached == 7
    make(folder / "expected.zarr", **room)
    assert run(2, folder / "K.zarr", lambda rank: counting(folder / "noted")(rank) | room) == [0, 0]
    assert files(folder / "K.zarr") == files(folder / "expected.zarr")
    made, received = (noted(folder / "noted", what) for what in ("captured", "received"))
    # Which process takes which tile is a race, and a feature that was sent as often as planned is captured. Without passing,
    # each process would capture all ten ranges and, with room for seven, some of them again.
    assert all(5 <= len(found) < 10 for found in made), made
    assert max(map(len, received)) > 5, received


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
