"""Do all solvers of the exact model reach the same optimum, at what cost, and are its coefficients of low rank?

The targets are ±1 for digits 2 and 3, minus the outputs of a random ReLU network. They are interpolated in that network's
tangent features. Three solvers fit the two-sided model: Newton's method, the alternation of two closed forms, and the
alternation with Anderson acceleration. Measured are the objective against time and kernel solves, and the singular values
of each layer's coefficients B under Fixed, Left and TwoSided.
Source: LeJeune & Alemohammad, CPAL 2024, §3 (the alternation; solutions are approximately low rank).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.datasets.images import load_digits, normalize_digits
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.exact_solvers import NAME
from adaptive_tangents.experiments.exact_solvers.claims import claims
from adaptive_tangents.experiments.study import Asked
from adaptive_tangents.experiments.training import relu_network
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.measures.alignment import effective_rank
from adaptive_tangents.penalties.closed_forms import Quadratic
from adaptive_tangents.runs.record import Clock, RunResult, flatten, heading, settings
from adaptive_tangents.runs.units import Units
from adaptive_tangents.runtime.progress import Progress, silent
from adaptive_tangents.solvers.fit import unwarned
from adaptive_tangents.solvers.results import Fit
from adaptive_tangents.solvers.search import Solver
from adaptive_tangents.structures.base import Fixed, Structure
from adaptive_tangents.structures.spectral import Left, TwoSided

LAYERS = ("hidden1", "hidden2", "readout")

SOLVERS: tuple[Solver, ...] = ("newton", "anderson", "alternation")

# Expected work of each stage, in seconds on two cores with the default config; only ratios matter.
_WORK = {"features": 1.0, "newton": 5.0, "anderson": 6.0, "alternation": 20.0, "Left": 4.0}


@dataclass(frozen=True)
class ExactSolversConfig:
    """Settings: which digits, how many, the network, λ, and when the solvers stop (stationarity below √tol)."""

    data: str = "mnist5k"
    data_dir: str | None = None
    seed: int = 0
    digits: tuple[int, int] = (2, 3)
    samples: int = 500
    width: int = 256
    strength: float = 1.0
    tol: float = 1e-10
    max_rounds: int = 400

    def __post_init__(self) -> None:
        if self.samples < 2 or self.width < 2:
            raise TangentError(f"{NAME}: samples and width must be at least 2, got {self}")


def configured(asked: Asked) -> ExactSolversConfig:
    """The settings for what the command line asked."""
    if asked.size == "quick":
        return ExactSolversConfig(**asked.source, samples=60, width=128)
    return ExactSolversConfig(**asked.source, samples=asked.samples or ExactSolversConfig.samples)


def run(
    config: ExactSolversConfig,
    *,
    device: str = "cpu",
    progress: Progress = silent,
    units: Units | None = None,
) -> RunResult:
    """Fit the two-sided model with each solver, and Left and Fixed for comparison, and judge the claims.

    Raises TangentError if the data are not available or hold too few digits, and for settings that ``fit`` refuses.

    >>> results = run(ExactSolversConfig(samples=20, width=8)).results
    >>> results["claims"]["agree"]["holds"], list(results["rank"])
    (True, ['Fixed', 'Left', 'TwoSided'])
    """
    clock = Clock(progress, sum(_WORK.values()))
    with clock.stage("features", _WORK["features"]):
        feats, r, data = _problem(config, device)
    solved: dict[str, Fit] = {}
    for solver in SOLVERS:
        with clock.stage(solver, _WORK[solver]) as advance:
            solved[solver] = _fitted(config, feats, r, TwoSided(Quadratic(config.strength)), solver, advance)
    with clock.stage("Left", _WORK["Left"]) as advance:
        models = {
            "Fixed": _fitted(config, feats, r, Fixed(), "newton", lambda fraction: None),
            "Left": _fitted(config, feats, r, Left(Quadratic(config.strength)), "newton", advance),
            "TwoSided": solved["newton"],
        }
    arrays: dict[str, np.ndarray] = {}
    for name, found in solved.items():
        arrays |= {f"{name}.{key}": values for key, values in _course(found).items()}
    for name, found in models.items():
        for layer, matrix in found.coefficients.items():
            arrays[f"{name}.{layer}"] = torch.linalg.svdvals(matrix).cpu().numpy()
    measured = {
        "solver": {name: _solution(found) for name, found in solved.items()},
        "model": {name: _solution(found) for name, found in models.items()},
        "rank": {name: {layer: _ranks(arrays[f"{name}.{layer}"]) for layer in LAYERS} for name in models},
    }
    layers = {name: list(block.shape) for name, block in feats.blocks.items()}
    results = {
        **heading(NAME, settings(config), clock, device),
        "seed": config.seed,
        "data": data,
        "layers": layers,
        **measured,
        "claims": claims({**measured, "layers": layers}, tol=config.tol),
        "metrics": flatten(measured),
    }
    return RunResult(results, arrays)


def _problem(config: ExactSolversConfig, device: str) -> tuple[TangentFeatures, Float[Tensor, "n 1"], dict[str, Any]]:
    digits = load_digits(config.data, data_dir=config.data_dir, classes=config.digits)
    n = len(digits.train_labels)
    if n < config.samples:
        raise TangentError(
            f"{NAME}: {digits.name} holds {n} training digits {config.digits}, fewer than samples = {config.samples}; "
            "lower samples or use more data"
        )
    x = normalize_digits(digits.train_images[: config.samples]).to(device)
    labels = digits.train_labels[: config.samples].to(device)
    generator = torch.Generator().manual_seed(config.seed)
    network = relu_network((x.shape[1], config.width, config.width, 1), LAYERS, bias=True, generator=generator)
    network.to(device)
    with torch.no_grad():
        r = torch.where(labels == config.digits[0], -1.0, 1.0)[:, None] - network(x)
    data = {"name": digits.name, "source": digits.source, "digits": list(config.digits), "samples": config.samples}
    return tangent_features(network, x), r, data


def _fitted(
    config: ExactSolversConfig,
    feats: TangentFeatures,
    r: Float[Tensor, "n 1"],
    structure: Structure,
    solver: Solver,
    advance: Callable[[float], None],
) -> Fit:
    # A solver that gives up is a result too: the results store its reason.
    found = unwarned(
        feats, r, structure=structure, tol=config.tol, max_rounds=config.max_rounds, solver=solver,
        progress=lambda steps, objective: advance(steps / config.max_rounds),
    )  # fmt: skip
    assert isinstance(found, Fit)
    return found


def _course(found: Fit) -> dict[str, np.ndarray]:
    """Seconds, kernel solves so far, objective with τΩ, and τ at every step."""
    history = found.history
    return {
        "seconds": np.array([entry.seconds for entry in history]),
        "solves": np.array(list(itertools.accumulate(entry.solved for entry in history)), dtype=float),
        "objective": np.array([entry.objective for entry in history]),
        "temper": np.array([entry.temper for entry in history]),
    }


def _solution(found: Fit) -> dict[str, Any]:
    objectives = [entry.objective for entry in found.history]
    rises = [(after - before) / before for before, after in itertools.pairwise(objectives)]
    return {
        "objective": found.objective,
        "converged": found.converged,
        "reason": found.reason,
        "rounds": found.rounds,
        "steps": len(found.history),
        "products": sum(entry.products for entry in found.history),
        "seconds": found.history[-1].seconds,
        "stationarity": found.stationarity,
        "feasibility": found.feasibility,
        "lower_bound": found.lower_bound,
        "gap": found.gap,
        "largest_rise": max(rises, default=0.0),
    }


def _ranks(values: np.ndarray) -> dict[str, float]:
    found = effective_rank(torch.from_numpy(values))
    return {"stable": found.stable, "entropy": found.entropy, "participation": found.participation}
