"""`kernel`: plan a tangent kernel of any size and write it to disk; under torchrun several processes share the work."""

import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adaptive_tangents.commands.checks import check_device, check_exists
from adaptive_tangents.commands.console import console, one_bar
from adaptive_tangents.commands.opening import data_of, opened
from adaptive_tangents.features.kernel_layout import check_outputs
from adaptive_tangents.loading import check_runs, fit_data, pick
from adaptive_tangents.runtime.memory import parse_bytes
from adaptive_tangents.sketching import Sketch
from adaptive_tangents.storage import kernel_to_store, plan_kernel


def kernel(
    model: str | None,
    data: Path,
    out: Path,
    *,
    weights: Path | None,
    base: Path | None,
    merged: bool,
    data2: Path | None,
    outputs: str,
    wrt: list[str] | None,
    by_block: bool,
    tile: int | None,
    memory_limit: str | None,
    float64: bool,
    sketch: int | None,
    seed: int,
    device: str,
    plan: bool,
    resume: bool,
) -> None:
    """Print the plan, and make the store unless only the plan was asked for."""
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device
    check_device("kernel", device)
    check_outputs("kernel", outputs)
    limit = None if memory_limit is None else parse_bytes("kernel", memory_limit)
    for file in (data,) if data2 is None else (data, data2):
        check_exists("kernel", file)
    series = opened("kernel", model=model, start=weights, base=base, merged=merged, device=device)
    network = series.model
    for state in series.states.values():
        network.load_state_dict(state)
    batches = []
    for file in (data,) if data2 is None else (data, data2):
        loaded = fit_data(data_of("kernel", file, series), network, "kernel")
        check_runs(network, loaded, file, "kernel")
        batches.append(loaded.x)
    x, x2 = batches[0], None if data2 is None else batches[1]
    arguments: dict[str, Any] = {
        "x2": x2, "output_fn": partial(pick, call="kernel"),
        "outputs": outputs, "wrt": series.selected(wrt), "by_block": by_block, "tile": tile,
        "memory_limit": limit, "dtype": torch.float64 if float64 else None,
        "sketch": None if sketch is None else Sketch(sketch, seed=seed),
    }  # fmt: skip
    if rank == 0:
        console.print(str(plan_kernel(network, x, **arguments, processes=processes)), highlight=False, soft_wrap=True)
    if plan:
        return
    with one_bar() if rank == 0 else nullcontext() as progress:
        store = kernel_to_store(network, x, out, **arguments, resume=resume, progress=progress)
    if rank == 0:
        console.print(f"Kernel: {store.path.resolve()}", soft_wrap=True, highlight=False)
