"""What is checked and measured on a GPU, in one short run: the networks of the tests, then kernels beside vmap(jacrev).

    python benchmarks/on_gpu.py                        # about five minutes; needs the packages of ".[dev]"
    python benchmarks/on_gpu.py --device cpu --matching "Linear|GPT" --without-times   # to see it work

Conformity: on every network of the tests' registry that runs on the device as it is, float64 kernels of every kind, tiles
of them, a sketch and a fit equal those made on the CPU to 1e-9 (less precise dtypes: the case's own
tolerance). Times: seconds of full kernels, least of three, and the most memory of the device. Writes
runs/benchmarks/on_gpu.json; ends with 1 if a network differs.
"""

import argparse
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import pytest

import adaptive_tangents as at
import networks
from adaptive_tangents.capture.batches import samples
from common import OUT, drawn, table_of, write
from registry import CASES

TOLERANCE = 1e-9
OUTPUTS = ("full", "trace", "diagonal")
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--matching", default="", help="networks that this regular expression is found in")
    parser.add_argument("--without-times", action="store_true", help="conformity only")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    rows = {case.name: conformity(case, device) for case in CASES if re.search(arguments.matching, case.name)}
    wrong = {name: row for name, row in rows.items() if "failed" in row}
    print(
        f"{name}: {sum('difference' in row for row in rows.values())} of {len(rows)} networks agree, {len(wrong)} do not"
    )
    print(*(f"  {name}: {row['failed']}" for name, row in wrong.items()), sep="\n")
    print(*(f"  skipped, {name}: {row['skipped']}" for name, row in rows.items() if "skipped" in row), sep="\n")
    times = {} if arguments.without_times else timed(device)
    cells = table_of(("seconds", "vmap(jacrev) s", "× ours", "peak GB", "difference"), times)
    if times:
        from rich.console import Console

        Console(width=120).print(drawn(f"full kernels on {name}, float32", cells))
    write(OUT / "on_gpu.json", f"full kernels on {name}, float32", cells, conformity=rows, rows=times)
    return 1 if wrong else 0


def conformity(case: Any, device: torch.device) -> Row:
    """The largest difference of anything made on the device from the same made on the CPU, as a part of its largest entry."""
    try:
        model, x = case.build()
    except pytest.skip.Exception as reason:
        return {"skipped": str(reason)}
    expected = made(case, model, x)
    moved = tree_map_only(Tensor, lambda tensor: tensor.to(device), x)
    try:
        model.to(device)
        with torch.no_grad():
            plain(case, model, moved)
    except Exception as error:  # a model with tensors of its own on the CPU
        return {"skipped": f"does not run on {device.type} as it is: {type(error).__name__}: {error}"}
    try:
        found = made(case, model, moved)
    except Exception:
        return {"failed": traceback.format_exc().strip().splitlines()[-1]}
    worst, allowed = 0.0, max(TOLERANCE, case.tolerance or 0)
    for name, value in found.items():
        there = expected[name].double()
        gap = float((value.double().cpu() - there).abs().max() / there.abs().max().clamp_min(1e-300))
        worst = max(worst, gap)
        if not gap <= allowed:
            return {"failed": f"{name} differs by {gap:.0e}"}
    return {"difference": worst}


def plain(case: Any, model: nn.Module, x: Any) -> Tensor:
    """The outputs, without the library."""
    arguments = (x,) if isinstance(x, Tensor) else x if isinstance(x, tuple) else None
    out = model(**x) if isinstance(x, dict) else model(*arguments) if arguments else model(x)
    return out if case.output_fn is None else case.output_fn(out)


def made(case: Any, model: nn.Module, x: Any) -> dict[str, Tensor]:
    """Everything that is compared, made on the device of model and batch."""
    keys = {"wrt": case.wrt, "output_fn": case.output_fn}
    found = {kind: at.tangent_kernel(model, x, outputs=kind, **keys) for kind in OUTPUTS}
    found["tiles"] = at.tangent_kernel(model, x, tile=max(1, samples(x) // 2), **keys)
    feats = at.tangent_features(model, x, **keys)
    found["sketch"] = at.Sketch(max(64, 4 * len(feats.blocks)), repetitions=2).apply(feats).kernel()
    if all(block.shape[0] * block.shape[1] < 10**4 for block in feats.blocks.values()):
        r = torch.ones(feats.n, feats.c, dtype=torch.float64, device=feats.device)
        found["fit"] = at.fit(feats, r, structure=at.Fixed(), ridge=0.1).predict(feats)
    return found


def timed(device: torch.device) -> dict[str, Row]:
    """Full kernels of the benchmarks' networks, ours and vmap(jacrev)."""
    found = {}
    for name, make in networks.NETWORKS.items():
        model, x = networks.made(make)
        model, x = model.to(device), x.to(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        ours, seconds = least(lambda model=model, x=x: at.tangent_kernel(model, x), device)
        row: Row = {"seconds": seconds}
        if device.type == "cuda":
            row["peak GB"] = torch.cuda.max_memory_allocated(device) / 1e9
        try:
            theirs, row["vmap(jacrev) s"] = least(lambda model=model, x=x: torch_func(model, x), device)
            row["× ours"] = row["vmap(jacrev) s"] / seconds
            row["difference"] = float((theirs - ours).abs().max() / ours.abs().max())
        except torch.OutOfMemoryError:
            row["difference"] = "vmap(jacrev) is out of memory"
        found[name] = row
    return found


def torch_func(model: nn.Module, x: Tensor) -> Tensor:
    params = {name: p.detach() for name, p in model.named_parameters()}

    def single(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (sample[None],))[0]

    jacobian = torch.func.vmap(torch.func.jacrev(single), (None, 0))(params, x)
    flat = [j.flatten(2) for j in jacobian.values()]
    return torch.stack([torch.einsum("Naf,Mbf->NMab", j, j) for j in flat]).sum(0).transpose(1, 2)


def least(make: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """What a call makes, and the least seconds of three calls after a first, with the device's work done."""
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        value = make()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return value, min(seconds[1:])


if __name__ == "__main__":
    sys.exit(main())
