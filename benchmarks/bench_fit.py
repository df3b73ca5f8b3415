"""The exact two-sided model on the MNIST network 784-256-256-c: second-order steps beside the alternation, c = 1 and 10.

Small problems are measured in units of their features' seconds: a convolutional network of 4,858 parameters with c = 10 and
n = 100, and the network above with n = 400, each by the present course of work and by the earlier one.
"""

import dataclasses
import importlib
import math
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


def convolutional() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A network of 4,858 parameters, 100 digits at a third of their size, and their labels."""
    digits = load_digits("mnist5k")
    images = torch.nn.functional.avg_pool2d(digits.train_images[:100, None, 2:26, 2:26] / 255.0, 3)
    torch.manual_seed(0)
    halves = [torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
    layers = [torch.nn.Conv2d(1, 8, 3, padding=1), *halves, torch.nn.Conv2d(8, 16, 3, padding=1), *halves]
    head = [torch.nn.Flatten(), torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 10)]
    return torch.nn.Sequential(*layers, *head), images, digits.train_labels[:100]


def perceptron() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The network 784-256-256-1, 400 digits 2 and 3, and which of them are a 2."""
    digits = load_digits("mnist5k", classes=(2, 3))
    sizes, names = (784, 256, 256, 1), ("hidden1", "hidden2", "readout")
    model = relu_network(sizes, names, bias=True, generator=torch.Generator().manual_seed(0))
    return model, normalize_digits(digits.train_images)[:400], (digits.train_labels[:400] == 2).long()


def earlier() -> None:
    """Take the course of work of before: features as factors, systems kept for 20 products, tight stages, whole spectra."""
    costs = importlib.import_module("adaptive_tangents.solvers.costs")
    costs.dense_product = lambda block: math.inf
    costs.patience = lambda feats, *_: (max(20, feats.n * feats.c // 100), -1)
    importlib.import_module("adaptive_tangents.solvers.continuation")._LOOSE = 0.02
    importlib.import_module("adaptive_tangents.solvers.constraints")._MEDIUM = 1000


def small(
    make: Callable[[], Any], loss: str, ridge: float, structure: Any, *, before: bool = False
) -> dict[str, object]:
    """Processor seconds of a fit, the least of three, over those of its features."""
    model, x, labels = make()
    with torch.no_grad():
        outputs = model(x)
    if before:
        earlier()
    warnings.simplefilter("ignore", at.TangentWarning)
    features, fits = [], []
    for _ in range(3):
        started = time.process_time()
        feats = at.tangent_features(model, x)
        features.append(time.process_time() - started)
        options: dict[str, Any] = {"structure": structure, "ridge": ridge}
        c = outputs.shape[1]
        target = torch.eye(c)[labels] if c > 1 else 2.0 * labels[:, None] - 1
        started = time.process_time()
        if loss == "squared":
            found = at.fit(feats, target - outputs, **options)
        else:
            found = at.fit(feats, labels, loss="cross-entropy", offset=outputs, **options)
        fits.append(time.process_time() - started)
    return {
        "seconds": min(fits),
        "× features": min(fits) / min(features),
        "rounds": found.rounds,
        "products": sum(entry.products for entry in found.history),
        "objective": found.objective,
        "stationarity": f"{found.stationarity:.1e}",
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
SMALL = {
    "CNN 4,858, squared, ridge 0.01": (convolutional, "squared", 0.01, at.TwoSided()),
    "CNN 4,858, cross-entropy, ridge 0.01": (convolutional, "cross-entropy", 0.01, at.TwoSided()),
    "CNN 4,858, Left, squared, ridge 0.01": (convolutional, "squared", 0.01, at.Left()),
    "CNN 4,858, Left, cross-entropy, ridge 0.01": (convolutional, "cross-entropy", 0.01, at.Left()),
    "MLP n = 400, squared": (perceptron, "squared", 0.0, at.TwoSided()),
    "MLP n = 400, cross-entropy, ridge 0.01": (perceptron, "cross-entropy", 0.01, at.TwoSided()),
}


def course(name: str, before: bool) -> Callable[[], dict[str, object]]:
    make, loss, ridge, structure = SMALL[name]
    return lambda: small(make, loss, ridge, structure, before=before)


contenders |= {
    f"{name}: {'earlier course' if before else 'now'}": course(name, before)
    for name in SMALL
    for before in (False, True)
}

if __name__ == "__main__":
    contend(
        __file__, contenders, "fit, TwoSided, MLP 784-256-256-c, to relative change 1e-8",
        (
            "seconds", "× features", "× ours", "rounds", "products", "factorizing", "objective", "stationarity",
            "feasibility", "converged", "peak GB",
        ),
    )  # fmt: skip
