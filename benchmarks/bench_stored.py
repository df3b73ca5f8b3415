"""The exact fit to a kernel on disk beside the fit to features: the same certificates, and the seconds and memory they take.

``LayerScale`` on an MLP and real digits, odd from even, n = 4,000, c = 1: to features in memory, to the store's kernels by a
factor, and by products tile by tile within a memory limit that holds no kernel in float64.
"""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import adaptive_tangents as at
from adaptive_tangents.datasets.images import load_digits, normalize_digits
from adaptive_tangents.experiments.training import relu_network
from common import OUT, contend

N, TILE, RIDGE, TOL = 4000, 500, 0.1, 1e-12
STRUCTURE = at.LayerScale(at.Quadratic(1.0))
LIMIT = 600_000_000  # bytes; a kernel in float64 takes 128 MB, its fit by a factor six of them


def problem() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A network in float64 and digits told apart by one output, in residuals."""
    digits = load_digits("mnist5k")
    images = torch.cat([digits.train_images, digits.test_images])[:N]
    labels = torch.cat([digits.train_labels, digits.test_labels])[:N]
    network = relu_network((784, 64, 64, 1), ("h1", "h2", "out"), bias=True, generator=torch.Generator().manual_seed(0))
    network, x = network.double(), normalize_digits(images).double()
    with torch.no_grad():
        return network, x, (labels % 2 * 2.0 - 1)[:, None].double() - network(x)


def store() -> at.KernelStore:
    """The kernels of the blocks on disk, made once."""
    network, x, _ = problem()
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"bench_stored-{N}.zarr"
    return at.kernel_to_store(network, x, path, outputs="full", by_block=True, tile=TILE, resume=path.exists())


def row(fit: at.Fit | at.KernelFit, seconds: float) -> dict[str, Any]:
    assert fit.lower_bound is not None
    assert fit.gap is not None
    steps = sum(entry.products for entry in fit.history)
    return {
        "seconds": seconds, "objective": f"{fit.objective:.12g}", "lower bound": f"{fit.lower_bound:.12g}",
        "gap": f"{fit.gap:.1e}", "stationarity": f"{fit.stationarity:.1e}", "feasibility": f"{fit.feasibility:.8f}",
        "rounds": fit.rounds, "products": steps, "form": fit.form, "entries": fit.dual.flatten()[::40].tolist(),
        "converged": fit.converged,
    }  # fmt: skip


def to_features() -> dict[str, Any]:
    network, x, r = problem()
    feats = at.tangent_features(network, x)
    started = time.perf_counter()
    fit = at.fit(feats, r, structure=STRUCTURE, ridge=RIDGE, tol=TOL)
    return row(fit, time.perf_counter() - started)


def to_store(form: str, limit: int | None) -> dict[str, Any]:
    kernels, (_, _, r) = at.open_kernel(Path(store().path)), problem()
    started = time.perf_counter()
    fit = at.fit(kernels, r, structure=STRUCTURE, ridge=RIDGE, form=form, tol=TOL, memory_limit=limit)
    return row(fit, time.perf_counter() - started)


CONTENDERS: dict[str, Callable[[], dict[str, Any]]] = {
    f"n = {N}: features in memory": to_features,
    f"n = {N}: store, by a factor": lambda: to_store("dense", None),
    f"n = {N}: store, by products, {LIMIT / 1e9:g} GB": lambda: to_store("matrix-free", LIMIT),
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    contend(
        __file__, CONTENDERS, f"LayerScale fit, MLP 784-64-64-1, n = {N}, c = 1, ridge {RIDGE}",
        ["seconds", "peak GB", "objective", "lower bound", "gap", "stationarity", "feasibility", "rounds", "products",
         "form", "difference"],
    )  # fmt: skip
