"""Does training turn the tangent kernel toward the task, and more so if the target is hard for the initial features?

A teacher of random ReLU features gives a smooth target on MNIST digits 2 and 3, and its sign gives a discontinuous one. A
ReLU student is trained on each. Measured are the initial, path-average and final tangent kernels and their alignment, per
layer, with the network's change; the decomposition of the kernels; where on the data the kernel grew; how well structured
transforms explain the feature change; and what the exact adaptive model predicts from the same data.
Source: LeJeune & Alemohammad, CPAL 2024, §4 (protocol) and figures 3-4.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.capture.path_average import AverageFeatures, average_features
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.claims import over_seeds
from adaptive_tangents.experiments.kernel_alignment import NAME
from adaptive_tangents.experiments.kernel_alignment.claims import claims
from adaptive_tangents.experiments.kernel_alignment.measures import (
    Checkpoint,
    errors,
    kernels,
    linearization,
    outputs,
    places,
    vector,
)
from adaptive_tangents.experiments.kernel_alignment.setup import (
    BLOCKS,
    Problem,
    TeacherTask,
    asked_fields,
    config_dict,
    trained,
)
from adaptive_tangents.experiments.kernel_alignment.setup import problem as _problem
from adaptive_tangents.experiments.kernel_alignment.setup import student as _student
from adaptive_tangents.experiments.study import Asked
from adaptive_tangents.experiments.training import SGD
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.measures.alignment import alignment, effective_rank
from adaptive_tangents.measures.explain import explain
from adaptive_tangents.penalties.closed_forms import Quadratic
from adaptive_tangents.runs.record import Clock, RunResult, flatten, heading
from adaptive_tangents.runs.units import Units
from adaptive_tangents.runtime.progress import Progress, silent
from adaptive_tangents.solvers.fit import fit
from adaptive_tangents.solvers.results import Fit
from adaptive_tangents.structures.base import Fixed, Full, Structure
from adaptive_tangents.structures.grouped import LayerScale
from adaptive_tangents.structures.spectral import Left, Right, TwoSided

TARGETS = ("smooth", "sign")

# For each metric: the published value (5,000 samples), and this project's earlier one (2,850 samples, one seed).
REFERENCE: dict[str, dict[str, float | str]] = {
    "smooth.alignment.average": {"paper": 0.17, "project": 0.173},
    "sign.alignment.average": {"paper": 0.40, "project": 0.352},
    "smooth.alignment.initial": {"project": 0.05},
    "sign.alignment.initial": {"project": 0.04},
    "smooth.alignment.final": {"project": 0.28},
    "sign.alignment.final": {"project": 0.59},
    "sign.diagonal.near": {"paper": "20–30", "project": 13.6},
    "sign.diagonal.far": {"paper": "6", "project": 5.9},
    "smooth.diagonal.near": {"project": 15.0},
    "smooth.diagonal.far": {"project": 13.4},
    "sign.diagonal_ratio": {"paper": "3–5", "project": 2.3},
    "smooth.diagonal_ratio": {"project": 1.12},
    "smooth.path_error_db": {},
    "sign.path_error_db": {"project": "48, 50 equal points"},
}


@dataclass(frozen=True)
class KernelAlignmentConfig(TeacherTask):
    """The experiment's settings. The defaults are the published protocol, with sizes taken from the data."""

    near: float = 0.2
    far: float = 0.8
    strengths: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 100.0)
    max_rounds: int = 200
    linearization_points: int = 21


def configured(asked: Asked) -> KernelAlignmentConfig:
    """The settings for what the command line asked."""
    config = KernelAlignmentConfig(**asked_fields(asked, standard=1, full=3))
    if asked.size == "quick":
        return replace(config, training=SGD(epochs=20), path_nodes=16, strengths=(10.0, 100.0))
    return config


def run(
    config: KernelAlignmentConfig,
    *,
    device: str = "cpu",
    progress: Progress = silent,
    units: Units | None = None,
) -> RunResult:
    """Run the experiment.

    ``progress`` is called with the stage and the fraction of all work done. ``units`` keeps each checkpoint as soon as it is
    trained; checkpoints of an earlier run with the same config are reused.

    Raises TangentError if the data are not available or hold too few digits.

    >>> config = KernelAlignmentConfig(width=6, training=SGD(epochs=1), kernel_samples=16, path_nodes=2, strengths=(1.0,))
    >>> sorted(run(config).results["targets"])
    ['sign', 'smooth']
    """
    again = len(TARGETS) * (config.seeds - 1) * sum(_WORK[key] for key in _EVERY_SEED)
    clock = Clock(progress, config.seeds + len(TARGETS) * sum(_WORK.values()) + again)
    units = units or Units()
    targets: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    runs: list[dict[str, Any]] = []
    for k in range(config.seeds):
        each, first = replace(config, seed=config.seed + k), k == 0
        prefix = "" if first else f"seed{each.seed}."
        with clock.stage(f"{prefix}data", 1):
            problem = _problem(each, device)
        runs.append({})
        for name in TARGETS:
            with clock.stage(f"{prefix}{name}.train", _WORK["train"]) as advance:
                target = problem.targets[name]
                start, end, losses = trained(each, name, target, problem, units, advance, device, prefix=prefix)
            runs[-1][name], measured = _measure(each, name, prefix, problem, start, end, clock, device)
            if first:
                targets[name], described = runs[-1][name], problem.data
                _extend(each, name, problem, start, targets[name], measured, clock, device)
                arrays |= {f"{name}.{key}": value.cpu().numpy() for key, value in measured.tensors().items()}
                arrays[f"{name}.training.loss"] = np.array(losses)
    seeds = over_seeds(runs)
    results = {
        **heading(NAME, config_dict(config), clock, device),
        "seed": config.seed,
        "data": described,
        "blocks": list(BLOCKS),
        "targets": targets,
        "reference": REFERENCE,
        "over_seeds": seeds,
        "claims": claims(targets, seeds, described["train"]),
        "metrics": flatten(targets),
    }
    return RunResult(results, arrays)


# Expected work of each stage, in seconds on two cores with the default config; only ratios matter.
_WORK = {"train": 12.0, "features": 3.0, "kernels": 3.0, "path": 4.0, "explain": 10.0, "models": 20.0}
_EVERY_SEED = ("train", "features", "kernels", "path")


def _bands(config: KernelAlignmentConfig, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Masks of the samples near the boundary and of those far from it."""
    near, far = teacher.abs() < config.near, teacher.abs() > config.far
    if not bool(near.any()) or not bool(far.any()):
        raise TangentError(
            f"{NAME}: no sample has a teacher output below {config.near} or none above {config.far}; use more samples"
        )
    return near, far


@dataclass(frozen=True)
class _Measured:
    """What the figures and the exact models need of one trained student."""

    initial: TangentFeatures
    average: AverageFeatures
    change: Tensor
    weight_change: dict[str, Tensor]
    shown: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors for the figures."""
        spectra = {f"singular_values.network.{k}": torch.linalg.svdvals(m) for k, m in self.weight_change.items()}
        return self.shown | {"change": self.change[:, 0]} | spectra


def _measure(
    config: KernelAlignmentConfig,
    name: str,
    prefix: str,
    problem: Problem,
    start: Checkpoint,
    end: Checkpoint,
    clock: Clock,
    device: str,
) -> tuple[dict[str, Any], _Measured]:
    """The measures of every trained student."""
    student, x = _student(config, problem, device), problem.x[problem.chosen]
    y, steepness = problem.targets[name][problem.chosen], problem.targets["smooth"][problem.chosen][:, 0]
    with clock.stage(f"{prefix}{name}.features", _WORK["features"]):
        initial, final = (tangent_features(student, x, params=params) for params in (start, end))
        average = average_features(student, start, end, x, nodes=config.path_nodes)
    assert average.change is not None
    near, far = _bands(config, steepness)
    with clock.stage(f"{prefix}{name}.kernels", _WORK["kernels"]):
        feats = {"initial": initial, "average": average, "final": final}
        measured, found = kernels(feats, average.change, y, near, far)
    with clock.stage(f"{prefix}{name}.path", _WORK["path"]):
        points = config.linearization_points
        positions, off = linearization(student, start, end, x, initial, points=points)
        place, told = places(student, start, end, x, found["average"].diagonal(), near, far, points=points)
    measured |= {
        "path_error": average.error,
        "path_error_db": average.error_db,
        "path_nodes": average.nodes,
        "linearization_error": float(off[-1]),
        "place": told,
        "network": _network_errors(student, end, name, problem),
    }
    weight_change = initial.split(vector(initial, end) - vector(initial, start))
    for block in BLOCKS:
        measured["block"][block]["effective_rank"] = asdict(effective_rank(weight_change[block]))
    shown = {
        "targets": y[:, 0],
        "teacher": steepness,
        "images": problem.images,
        "linearization.positions": positions,
        "linearization.error": off,
        "place": place,
        **{f"kernel.{kind}": kernel.float() for kind, kernel in found.items()},
    }
    return measured, _Measured(initial, average, average.change, weight_change, shown)


def _extend(
    config: KernelAlignmentConfig,
    name: str,
    problem: Problem,
    start: Checkpoint,
    measured: dict[str, Any],
    found: _Measured,
    clock: Clock,
    device: str,
) -> None:
    """The measures of the first seed's students only: transforms that explain the change, and the exact models."""
    with clock.stage(f"{name}.explain", _WORK["explain"]) as progress:
        measured["explain"] = _explanations(found.initial, found.average, progress)
    with clock.stage(f"{name}.models", _WORK["models"]) as progress:
        student = _student(config, problem, device)
        models, fits = _models(config, student, start, name, problem, found.initial, found.change, progress)
    measured["model"] = models
    adaptive = [key for key in models if models[key]["structure"] == "TwoSided"]
    goal = measured["alignment"]["average"]
    measured["adapted_key"] = min(adaptive, key=lambda key: abs(models[key]["alignment"] - goal))
    adapted = fits[measured["adapted_key"]].transform(found.initial)
    found.shown["kernel.adapted"] = adapted.kernel(outputs="trace").float()
    for key, fitted in fits.items():
        for block in BLOCKS:
            found.shown[f"singular_values.{key}.{block}"] = torch.linalg.svdvals(fitted.coefficients[block])


def _network_errors(model: nn.Module, end: Checkpoint, name: str, problem: Problem) -> dict[str, float]:
    train_errors = errors(outputs(model, end, problem.x), problem.targets[name])
    test_errors = errors(outputs(model, end, problem.x_test), problem.test_targets[name])
    return {f"train_{k}": v for k, v in train_errors.items()} | {f"test_{k}": v for k, v in test_errors.items()}


def _explanations(
    initial: TangentFeatures, average: TangentFeatures, progress: Callable[[float], None]
) -> dict[str, Any]:
    structures = {
        "layer_scale": LayerScale(),
        "left": Left(),
        "right": Right(),
        "two_sided": TwoSided(),
        "full": Full(),
    }
    found: dict[str, Any] = {}
    for k, (key, structure) in enumerate(structures.items()):
        explanation = explain(initial, average, structure, rank=None)
        found[key] = {"total": explanation.total, **explanation.r2}
        progress((k + 1) / len(structures))
    return found


_CERTIFICATES = ("objective", "feasibility", "stationarity", "lower_bound", "rounds", "converged", "reason")


def _models(
    config: KernelAlignmentConfig, model: nn.Module, start: Checkpoint, name: str, problem: Problem,
    feats: TangentFeatures, change: Tensor, progress: Callable[[float], None],
) -> tuple[dict[str, Any], dict[str, Fit]]:  # fmt: skip
    """The exact model for each structure and strength, fitted to the kernel samples and tested on all test digits."""
    x = problem.x[problem.chosen]
    residual = problem.targets[name][problem.chosen] - outputs(model, start, x)
    test_feats = tangent_features(model, problem.x_test, params=start)
    test_start = outputs(model, start, problem.x_test)
    grid: list[tuple[str, float | None, Structure]] = [("fixed", None, Fixed())]
    for strength in config.strengths:
        grid.append((f"full_{strength:g}", strength, Full(Quadratic(strength))))
    for strength in config.strengths:
        grid.append((f"two_sided_{strength:g}", strength, TwoSided(Quadratic(strength))))
    models: dict[str, Any] = {}
    fits: dict[str, Fit] = {}
    for k, (key, cost, structure) in enumerate(grid):
        found = fit(feats, residual, structure=structure, max_rounds=config.max_rounds)
        kernel = found.transform(feats).kernel(outputs="trace")
        test = errors(test_start + found.predict(test_feats).to(test_start), problem.test_targets[name])
        models[key] = {
            "structure": type(structure).__name__,
            "strength": cost,
            "alignment": alignment(kernel, change),
            "alignment_centered": alignment(kernel, change, centered=True),
            **{f"test_{kind}": value for kind, value in test.items()},
            **{certificate: getattr(found, certificate) for certificate in _CERTIFICATES},
            "seconds": found.history[-1].seconds,
            "block": {block: {"effective_rank": asdict(effective_rank(found.coefficients[block]))} for block in BLOCKS},
        }
        fits[key] = found
        progress((k + 1) / len(grid))
    return models, fits
