"""Kernels made into a store: seconds, the share of a matrix product's speed that all of it reaches, and what processes bring.

The large ones (MLP n = 10,000; CNN, full kernel, n = 1,000) take minutes to an hour: ask for them with --large. "share" is
all arithmetic, of capturing and of contracting, at the speed of one 2048 × 2048 product on as many threads; "contracted"
counts contracting alone.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import adaptive_tangents as at
from adaptive_tangents.features.kernel_layout import Outputs
from common import OUT, contend, peak_memory
from counting import counted_operations, peak_rate
from networks import Network, cnn, made, mlp

LIMIT = 6_000_000_000  # bytes of memory
STORES = OUT / "stores"
Row = dict[str, Any]


def stored(make: Callable[[int], Network], n: int, outputs: str, *, threads: int | None = None, **options: Any) -> Row:
    """One process."""
    if threads is not None:
        torch.set_num_threads(threads)
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
    """Several processes of one thread under torchrun; seconds from before the first begins to when all are done."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", __file__, "--rank", make, str(n), outputs]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def rank(make: str, n: int, outputs: Outputs) -> None:
    """What torchrun starts."""
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    model, x = made(lambda: {"mlp": mlp, "cnn": cnn}[make](n))
    path = STORES / f"{n}-together.zarr"
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
    torch.distributed.barrier()
    started = time.perf_counter()
    store = at.kernel_to_store(model, x, path, outputs=outputs, memory_limit=LIMIT // 2)
    row = {"seconds": time.perf_counter() - started, "tiles": len(store.places), "peak GB": peak_memory()}
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(path)
        print(json.dumps(row), flush=True)
    torch.distributed.destroy_process_group()


contenders: dict[str, Callable[[], Row]] = {
    "MLP trace, n = 300: to see it work": lambda: stored(mlp, 300, "trace"),
    "MLP trace, n = 2000: all threads": lambda: stored(mlp, 2000, "trace"),
    "MLP trace, n = 2000, one thread: one process": lambda: stored(mlp, 2000, "trace", threads=1),
    "MLP trace, n = 2000, one thread: two processes": lambda: together("mlp", 2000, "trace", 2),
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
    "MLP trace, n = 10000, one thread: one process": lambda: stored(mlp, 10_000, "trace", threads=1),
    "MLP trace, n = 10000, one thread: two processes": lambda: together("mlp", 10_000, "trace", 2),
    "CNN full, n = 500, one thread: one process": lambda: stored(cnn, 500, "full", threads=1),
    "CNN full, n = 500, one thread: two processes": lambda: together("cnn", 500, "full", 2),
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
        ("seconds", "planned s", "tiles", "captures", "s a tile", "share", "contracted", "planned GB", "peak GB",
         "× ours", "note"),
    )  # fmt: skip
