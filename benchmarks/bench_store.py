"""Kernels made into a store: seconds, the share of a matrix product's speed that all of it reaches, and what processes bring.

The large ones (MLP n = 10,000; CNN, full kernel, n = 1,000) take minutes to an hour: ask for them with --large. "share" is
all arithmetic, of capturing and of contracting, at the speed of one 2048 × 2048 product on as many threads; "contracted"
counts contracting alone. Of several processes, "busiest s" is the processor time of the one that works longest: what it takes
where each has a core to itself.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import adaptive_tangents as at
from adaptive_tangents.features.kernel_layout import Outputs
from adaptive_tangents.storage.feature_stream import Stream
from common import OUT, contend, peak_memory
from counting import counted_operations, peak_rate
from networks import Network, cnn, made, mlp

LIMIT = 6_000_000_000  # bytes of memory
STORES = OUT / "stores"
PROCESSES = {"one process": 1, "two processes": 2, "four processes": 4}
Row = dict[str, Any]


def stored(make: Callable[[int], Network], n: int, outputs: str, **options: Any) -> Row:
    """One process."""
    model, x = made(lambda: make(n))
    options = {"outputs": outputs, "memory_limit": LIMIT} | options
    plan = at.plan_kernel(model, x, **options)
    path = STORES / f"{n}-{outputs}-{time.time_ns()}.zarr"
    try:
        started = time.perf_counter()
        at.kernel_to_store(model, x, path, **options)
        seconds = time.perf_counter() - started
    finally:
        shutil.rmtree(path, ignore_errors=True)
    capturing = counted_operations(model, x[:4]) * n / 4
    peak = peak_rate()
    return {
        "seconds": seconds, "planned s": plan.seconds, "tiles": plan.tiles, "captures": plan.captures,
        "s a tile": seconds / plan.tiles, "share": (plan.operations + capturing) / seconds / peak,
        "contracted": plan.operations / seconds / peak, "planned GB": plan.bytes / 1e9, "peak GB": peak_memory(),
    }  # fmt: skip


def together(make: str, n: int, outputs: str, processes: int) -> Row:
    """Processes of one thread under torchrun; seconds from before the first begins to when all are done."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", __file__, "--rank", make, str(n), outputs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def rank(make: str, n: int, outputs: Outputs) -> None:
    """What torchrun starts. The plan comes first, so that no process imports modules while it is timed."""
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    torch.set_num_threads(1)
    model, x = made(lambda: {"mlp": mlp, "cnn": cnn}[make](n))
    options: dict[str, Any] = {"outputs": outputs, "memory_limit": LIMIT // size}
    plan = at.plan_kernel(model, x, processes=size, **options)
    path = STORES / f"{n}-together.zarr"
    if rank == 0:
        shutil.rmtree(path, ignore_errors=True)
    part, captured = Stream.part, []

    def counted(self: Stream, side: int, rows: slice, pass_samples: int) -> at.TangentFeatures:
        captured.append(rows)
        return part(self, side, rows, pass_samples)

    Stream.part = counted  # type: ignore[method-assign]
    distributed.barrier()
    started, worked = time.perf_counter(), time.process_time()
    store = at.kernel_to_store(model, x, path, **options)
    seconds, work = time.perf_counter() - started, time.process_time() - worked
    rows: list[Any] = [None] * size
    distributed.all_gather_object(rows, (work, len(captured)))
    if rank == 0:
        shutil.rmtree(path)
        row = {
            "seconds": seconds, "busiest s": max(work for work, _ in rows), "all s": sum(work for work, _ in rows),
            "tiles": len(store.places), "captures": sum(count for _, count in rows), "planned captures": plan.captures,
            "peak GB": peak_memory(),
        }  # fmt: skip
        print(json.dumps(row), flush=True)
    distributed.destroy_process_group()


contenders: dict[str, Callable[[], Row]] = {
    "MLP trace, n = 300: to see it work": lambda: stored(mlp, 300, "trace"),
    "MLP trace, n = 2000: all threads": lambda: stored(mlp, 2000, "trace"),
    **{
        f"MLP trace, n = 2000, one thread: {count}": lambda count=count: together(
            "mlp", 2000, "trace", PROCESSES[count]
        )
        for count in PROCESSES
    },
    **{
        f"MLP trace, tile = 250: n = {n}": lambda n=n: stored(mlp, n, "trace", tile=250)
        for n in (1000, 2000, 4000, 8000)
    },
    **{
        f"MLP trace, n = 4000: at most {gigabytes:g} GB": lambda limit=gigabytes: stored(
            mlp, 4000, "trace", memory_limit=int(limit * 1e9)
        )
        for gigabytes in (4, 2, 1, 0.7)
    },
    "CNN full, n = 100: to see it work": lambda: stored(cnn, 100, "full"),
}
large: dict[str, Callable[[], Row]] = {
    "MLP trace, n = 10000: all threads": lambda: stored(mlp, 10_000, "trace"),
    **{
        f"{title}, one thread: {count}": lambda given=given, count=count: together(*given, PROCESSES[count])
        for title, given in {
            "MLP trace, n = 10000": ("mlp", 10_000, "trace"),
            "CNN full, n = 500": ("cnn", 500, "full"),
        }.items()
        for count in PROCESSES
    },
    "CNN full, n = 1000: all threads": lambda: stored(cnn, 1000, "full"),
}

if __name__ == "__main__":
    if "--rank" in sys.argv:
        make, n, outputs = sys.argv[sys.argv.index("--rank") + 1 :]
        rank(make, int(n), outputs)  # type: ignore[arg-type]
        sys.exit()
    wanted = "--large" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--large"]
    contend(
        str(Path(__file__)), contenders | (large if wanted or "--only" in sys.argv else {}),
        "tangent kernels into a Zarr store, float32, at most 6 GB unless said otherwise",
        ("seconds", "planned s", "busiest s", "all s", "tiles", "captures", "s a tile", "share", "contracted", "planned GB",
         "peak GB", "× ours", "note"),
    )  # fmt: skip
