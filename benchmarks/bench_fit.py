"""The exact two-sided model on the MNIST network 784-256-256-1 with 500 samples: accelerated, and the plain alternation."""

import time
import warnings

import torch

import adaptive_tangents as at
from adaptive_tangents.data import load_digits, normalize_digits
from adaptive_tangents.experiments.training import relu_network
from common import contend


def problem() -> tuple[at.TangentFeatures, torch.Tensor]:
    digits = load_digits("mnist5k", classes=(2, 3))
    x = normalize_digits(digits.train_images)[:500]
    y = torch.where(digits.train_labels[:500] == 2, -1.0, 1.0)[:, None]
    generator = torch.Generator().manual_seed(0)
    model = relu_network((784, 256, 256, 1), ("hidden1", "hidden2", "readout"), bias=True, generator=generator)
    with torch.no_grad():
        residual = y - model(x)
    return at.tangent_features(model, x), residual


def solve(strength: float, accelerate: bool) -> dict[str, object]:
    feats, r = problem()
    warnings.simplefilter("ignore", at.TangentWarning)
    started = time.perf_counter()
    found = at.fit(feats, r, structure=at.TwoSided(at.Quadratic(strength)), accelerate=accelerate, max_rounds=400)
    return {
        "λ": strength,
        "seconds": time.perf_counter() - started,
        "rounds": found.rounds,
        "objective": found.objective,
        "stationarity": f"{found.stationarity:.1e}",
        "feasibility": f"{found.feasibility:.1e}",
        "converged": str(found.converged),
    }


contenders = {
    f"{'accelerated' if accelerate else 'plain'} λ={strength:g}": (lambda s=strength, a=accelerate: solve(s, a))
    for strength in (10.0, 1.0, 0.3)
    for accelerate in (True, False)
}

if __name__ == "__main__":
    contend(
        __file__, contenders, "fit, TwoSided, n = 500, c = 1, MLP 784-256-256-1, to relative change 1e-8",
        ("seconds", "rounds", "objective", "stationarity", "feasibility", "converged", "peak GB"),
    )  # fmt: skip
