"""The exact two-sided model on the MNIST network 784-256-256-c: second-order steps beside the alternation, c = 1 and 10."""

import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

import adaptive_tangents as at
from adaptive_tangents.datasets.images import load_digits, normalize_digits
from adaptive_tangents.experiments.training import relu_network
from common import contend


def problem(n: int = 500, c: int = 1) -> tuple[at.TangentFeatures, torch.Tensor]:
    """Digits 2 against 3 as ±1, or all ten as indicators less their mean."""
    digits = load_digits("mnist5k", classes=(2, 3) if c == 1 else tuple(range(10)))
    x = normalize_digits(digits.train_images)[:n]
    labels = digits.train_labels[:n]
    y = torch.where(labels == 2, -1.0, 1.0)[:, None] if c == 1 else torch.eye(10)[labels] - 0.1
    generator = torch.Generator().manual_seed(0)
    model = relu_network((784, 256, 256, c), ("hidden1", "hidden2", "readout"), bias=True, generator=generator)
    with torch.no_grad():
        residual = y - model(x)
    return at.tangent_features(model, x), residual


def solve(strength: float, n: int, c: int, memory: float | None = None, **options: Any) -> dict[str, object]:
    feats, r = problem(n, c)
    feats = feats if memory is None else dataclasses.replace(feats, limit=int(memory))
    warnings.simplefilter("ignore", at.TangentWarning)
    started = time.perf_counter()
    found = at.fit(feats, r, structure=at.TwoSided(at.Quadratic(strength)), max_rounds=400, **options)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "rounds": found.rounds,
        "products": sum(entry.products for entry in found.history),
        "factorizing": f"{found.timings.get('factorizations', 0.0) / seconds:.0%}",
        "objective": found.objective,
        "stationarity": f"{found.stationarity:.1e}",
        "feasibility": f"{found.feasibility:.1e}",
        "converged": str(found.converged),
    }


def contender(strength: float, n: int, c: int, **options: Any) -> Callable[[], dict[str, object]]:
    return lambda: solve(strength, n, c, **options)


contenders = {
    f"{solver} λ={strength:g}, n = 500, c = 1": contender(strength, 500, 1, solver=solver)
    for strength in (10.0, 1.0, 0.1)
    for solver in ("newton", "anderson", "alternation")
    if strength > 0.1 or solver == "newton"
}
contenders |= {
    "newton λ=1, n = 100, c = 10": contender(1.0, 100, 10),
    "newton λ=1, n = 100, c = 10, matrix-free": contender(1.0, 100, 10, form="matrix-free"),
    "newton λ=1, n = 500, c = 10, to 1e-6": contender(1.0, 500, 10, tol=1e-12),
    "newton λ=1, n = 2000, c = 10, matrix-free": contender(1.0, 2000, 10, form="matrix-free", memory=7e9),
}

if __name__ == "__main__":
    contend(
        __file__, contenders, "fit, TwoSided, MLP 784-256-256-c, to relative change 1e-8",
        ("seconds", "rounds", "products", "factorizing", "objective", "stationarity", "feasibility", "converged", "peak GB"),
    )  # fmt: skip
