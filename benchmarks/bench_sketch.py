"""Sketches of a GPT-2-like network with 10⁷ parameters: seconds a sample, and how far kernel entries are from exact ones.

Seconds are those of the processor, of one thread with OMP_NUM_THREADS=1; SAMPLES=32 makes n smaller. Errors are root mean
squares over all entries of the full kernel (n·c)², in units of the mean diagonal entry, beside what the repetitions say of
them and the alignment with labels. "none" is the exact kernel; "fitted" takes shares of blocks from 8 samples; "TRAK" is a
Gaussian projection of the whole p-dimensional gradient, feasible for a small network only.

    python benchmarks/bench_sketch.py --matching GPT-2
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import adaptive_tangents as at
from common import OUT, contend, peak_memory
from networks import OUTPUTS, Gpt, Network, cnn, made, mlp

DIMS = (1024, 4096, 16384)
SAMPLES = int(os.environ.get("SAMPLES", "100"))
LIMIT = 1_500_000_000
Row = dict[str, object]


NETWORKS: dict[str, Callable[[], Network]] = {
    "GPT-2": lambda: (Gpt(width=384, depth=5, heads=6, tokens=32, words=2000), torch.randint(2000, (SAMPLES, 32))),
    "MLP": lambda: mlp(30),
    "CNN": lambda: cnn(30),
    "small GPT": lambda: (Gpt(width=64, depth=2, tokens=32), torch.randint(1000, (30, 32))),
}


def exact(name: str) -> Row:
    """The exact kernel, kept for the errors of the others."""
    model, x = made(NETWORKS[name])
    at.tangent_kernel(model, x[:2])
    started = time.process_time()
    kernel = at.tangent_kernel(model, x, memory_limit=LIMIT)
    seconds = time.process_time() - started
    parameters = sum(p.numel() for p in model.parameters())
    OUT.mkdir(parents=True, exist_ok=True)
    torch.save(kernel, _kept(name))
    return {"p": parameters, "s": seconds, "s a sample": seconds / len(x), **_alignment(kernel)}


def sketched(name: str, dim: int, *, fitted: bool) -> Row:
    model, x = made(NETWORKS[name])
    sketch = at.Sketch(dim)
    at.sketch_features(model, x[:2], sketch)
    started = time.process_time()
    if fitted:
        sketch = sketch.fitted(at.tangent_features(model, x[:8]))
    feats = at.sketch_features(model, x, sketch, memory_limit=LIMIT)
    captured = time.process_time()
    found = feats.kernel_estimate()
    seconds = time.process_time() - captured
    peak = peak_memory()
    row = _errors(name, found.kernel)
    scale = float(found.kernel.flatten(0, 1).flatten(1).diagonal().mean())
    row["said"] = float((found.standard_error.double() ** 2).mean().sqrt()) / scale
    measured = found.error_of(lambda K: at.alignment(K, _labels(len(x))))
    row["alignment"], row["± said"] = measured.value, measured.standard_error
    row["corrected"] = measured.corrected
    held = feats.bytes / len(x) / 1e6
    return {
        "s a sample": (captured - started) / len(x),
        "kernel s": seconds,
        "MB a sample": held,
        "peak GB": peak,
    } | row


def trak(name: str, dim: int) -> Row:
    """Gradients of all parameters written out, and a Gaussian matrix of as many rows."""
    model, x = made(NETWORKS[name])
    feats = at.tangent_features(model, x)
    started = time.process_time()
    generator, sketch = torch.Generator().manual_seed(0), torch.zeros(feats.n * feats.c, dim)
    phi = feats.dense().flatten(0, 1)
    for part in phi.split(20_000, 1):
        sketch += part @ torch.randn(part.shape[1], dim, generator=generator)
    kernel = (sketch @ sketch.mT / dim).reshape(feats.n, feats.c, feats.n, feats.c)
    return {"s a sample": (time.process_time() - started) / len(x), **_errors(name, kernel), **_alignment(kernel)}


def _kept(name: str) -> Path:
    return OUT / f"sketch-{name.replace(' ', '-')}.pt"


def _errors(name: str, kernel: Tensor) -> Row:
    wanted = torch.load(_kept(name), weights_only=True).double().flatten(2).flatten(0, 1)
    off = kernel.double().flatten(2).flatten(0, 1) - wanted
    scale = float(wanted.diagonal().mean())
    return {"error": float((off**2).mean().sqrt()) / scale, "most": float(off.abs().max()) / scale}


def _labels(n: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.arange(n) % OUTPUTS, OUTPUTS).double() - 1 / OUTPUTS


def _alignment(kernel: Tensor) -> Row:
    return {"alignment": at.alignment(kernel, _labels(len(kernel)))}


contenders: dict[str, Callable[[], Row]] = {}
for _name in NETWORKS:
    contenders[f"{_name}: none"] = lambda name=_name: exact(name)
    for _dim in DIMS:
        contenders[f"{_name}: dim {_dim}"] = lambda name=_name, dim=_dim: sketched(name, dim, fitted=False)
        contenders[f"{_name}: dim {_dim}, fitted"] = lambda name=_name, dim=_dim: sketched(name, dim, fitted=True)
        if _name == "small GPT":
            contenders[f"{_name}: TRAK {_dim}"] = lambda name=_name, dim=_dim: trak(name, dim)

if __name__ == "__main__":
    contend(
        __file__, contenders, "sketches: error of kernel entries in units of the mean diagonal entry",
        (
            "p", "s a sample", "kernel s", "MB a sample", "peak GB", "error", "said", "most", "alignment", "± said",
            "corrected",
        ),
    )  # fmt: skip
