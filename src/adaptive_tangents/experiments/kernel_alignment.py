"""Does training turn the tangent kernel toward the task, and more so where the target is hard for the initial features?

A teacher of random ReLU features gives a smooth target on MNIST digits 2 and 3, and its sign a discontinuous one. A ReLU
student is trained on each. Measured: the initial, path-average and final tangent kernels, their alignment with the change
the network made, per layer; the decomposition of the kernels; where on the data the kernel grew; how structured transforms
explain the feature change; and what the exact adaptive model, fitted to the same data, predicts.
Source: LeJeune & Alemohammad, CPAL 2024, §4 (protocol) and figures 3-4.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptive_tangents.alignment import alignment, decompose, effective_rank, representability
from adaptive_tangents.capture import tangent_features
from adaptive_tangents.data import Dataset, load_digits, normalize_digits
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.common import (
    Asked,
    Clock,
    ExperimentResult,
    Progress,
    Units,
    flatten,
    heading,
    settings,
)
from adaptive_tangents.experiments.training import SGD, relu_network, train
from adaptive_tangents.explain import explain
from adaptive_tangents.features import TangentFeatures
from adaptive_tangents.fits import Fit
from adaptive_tangents.path import AverageFeatures, average_features
from adaptive_tangents.penalties import Quadratic
from adaptive_tangents.solvers import fit
from adaptive_tangents.spectral import Left, Right, TwoSided
from adaptive_tangents.structures import Fixed, Full, LayerScale, Structure

NAME = "kernel-alignment"
BLOCKS = ("hidden1", "hidden2", "readout")
TARGETS = ("smooth", "sign")

# Beside each metric: the published value (5,000 samples), and what this project measured with 2,850 samples and one seed.
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

Checkpoint = Mapping[str, Tensor]


@dataclass(frozen=True)
class KernelAlignmentConfig:
    """The experiment's settings; the defaults are the published protocol, with sizes taken from the data."""

    data: str = "mnist5k"
    data_dir: str | None = None
    seed: int = 0
    digits: tuple[int, int] = (2, 3)
    width: int = 256
    training: SGD = field(default_factory=SGD)
    kernel_samples: int = 500
    path_nodes: int = 50
    near: float = 0.2
    far: float = 0.8
    strengths: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 100.0)
    max_rounds: int = 200
    linearization_points: int = 21

    def __post_init__(self) -> None:
        if self.kernel_samples < 16:
            raise TangentError(f"{NAME}: kernel_samples is at least 16, got {self.kernel_samples}")
        if self.training.epochs < 1 or self.training.batch_size < 1 or self.width < 1 or self.path_nodes < 1:
            raise TangentError(f"{NAME}: epochs, batch size, width and path nodes are positive, got {self}")


@dataclass(frozen=True)
class _Problem:
    """Inputs, both targets, and which training digits the kernels are of, sorted by the teacher's output."""

    x: Float[Tensor, "n d"]
    x_test: Float[Tensor, "m d"]
    targets: dict[str, Float[Tensor, "n 1"]]
    test_targets: dict[str, Float[Tensor, "m 1"]]
    chosen: Tensor
    images: Tensor
    data: dict[str, Any]


def configured(asked: Asked) -> KernelAlignmentConfig:
    """The settings for what was asked."""
    config = KernelAlignmentConfig(
        data=asked.data, data_dir=asked.data_dir, seed=asked.seed,
        kernel_samples=asked.samples or KernelAlignmentConfig.kernel_samples,
        training=SGD() if asked.epochs is None else SGD(epochs=asked.epochs),
    )  # fmt: skip
    if asked.size == "quick":
        return replace(config, training=SGD(epochs=20), kernel_samples=100, path_nodes=16, strengths=(10.0, 100.0))
    return config


def run(
    config: KernelAlignmentConfig,
    *,
    device: str = "cpu",
    progress: Progress = lambda stage, fraction: None,
    units: Units | None = None,
) -> ExperimentResult:
    """Run the experiment.

    ``progress`` hears the stage and the share of all work done; ``units`` keeps each checkpoint as soon as it is trained,
    and what an earlier run of the same config trained is not trained again.

    Raises TangentError where the data cannot be had or hold too few digits.

    >>> config = KernelAlignmentConfig(width=6, training=SGD(epochs=1), kernel_samples=16, path_nodes=2, strengths=(1.0,))
    >>> sorted(run(config).results["targets"])
    ['sign', 'smooth']
    """
    clock = Clock(progress, 1 + len(TARGETS) * sum(_WORK.values()))
    with clock.stage("data", 1):
        problem = _problem(config, device)
    targets: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for name in TARGETS:
        start, end, losses = _trained(config, name, problem, clock, units or Units(), device)
        targets[name], measured = _measure(config, name, problem, start, end, clock, device)
        arrays |= {f"{name}.{key}": value for key, value in measured.items()}
        arrays[f"{name}.training.loss"] = np.array(losses)
    results = {
        **heading(NAME, config_dict(config), clock, device),
        "seed": config.seed,
        "data": problem.data,
        "blocks": list(BLOCKS),
        "targets": targets,
        "reference": REFERENCE,
        "metrics": flatten(targets),
    }
    return ExperimentResult(results, arrays)


def config_dict(config: KernelAlignmentConfig) -> dict[str, Any]:
    """The settings as plain values, training's beside the others."""
    plain = settings(config)
    return plain | {f"training.{key}": value for key, value in plain.pop("training").items()}


# Work expected of each stage, in seconds on two cores with the default config: only their ratio matters.
_WORK = {"train": 12.0, "features": 3.0, "kernels": 3.0, "explain": 10.0, "models": 20.0}


def _problem(config: KernelAlignmentConfig, device: str) -> _Problem:
    digits = load_digits(config.data, data_dir=config.data_dir, classes=config.digits)
    x, x_test = (normalize_digits(images).to(device) for images in (digits.train_images, digits.test_images))
    n = len(x)
    if n < config.kernel_samples:
        raise TangentError(
            f"{NAME}: {digits.name} holds {n} training digits {config.digits}, fewer than kernel_samples = "
            f"{config.kernel_samples}; lower kernel_samples or use more data"
        )
    generator = torch.Generator().manual_seed(config.seed)
    teacher = relu_network(
        (x.shape[1], config.width, config.width), ("hidden1", "hidden2"), bias=False, generator=generator
    )
    teacher.append(nn.ReLU()).to(device)
    signs = torch.where(digits.train_labels == config.digits[0], -1.0, 1.0).to(device)[:, None]
    with torch.no_grad():
        features, test_features = teacher(x), teacher(x_test)
    readout = torch.linalg.lstsq(features.double().cpu(), signs.double().cpu(), driver="gelsd").solution.to(device)
    smooth, smooth_test = ((f.double() @ readout).to(x.dtype) for f in (features, test_features))
    chosen = torch.randperm(n, generator=generator)[: config.kernel_samples].to(device)
    chosen = chosen[smooth[chosen, 0].argsort()]
    return _Problem(
        x,
        x_test,
        {"smooth": smooth, "sign": _sign(smooth)},
        {"smooth": smooth_test, "sign": _sign(smooth_test)},
        chosen,
        digits.train_images[chosen.cpu()],
        _describe(digits, config),
    )


def _describe(digits: Dataset, config: KernelAlignmentConfig) -> dict[str, Any]:
    return {
        "name": digits.name,
        "source": digits.source,
        "train": len(digits.train_images),
        "test": len(digits.test_images),
        "kernel_samples": config.kernel_samples,
    }


def _sign(y: Tensor) -> Tensor:
    return torch.where(y < 0, -1.0, 1.0).to(y.dtype)


def _student(config: KernelAlignmentConfig, problem: _Problem, device: str) -> nn.Sequential:
    generator = torch.Generator().manual_seed(config.seed + 1)
    widths = (problem.x.shape[1], config.width, config.width, 1)
    return relu_network(widths, BLOCKS, bias=True, generator=generator).to(device)


def _trained(
    config: KernelAlignmentConfig,
    name: str,
    problem: _Problem,
    clock: Clock,
    units: Units,
    device: str,
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    student = _student(config, problem, device)
    start = _snapshot(student)
    with clock.stage(f"{name}.train", _WORK["train"]) as progress:
        earlier, course = units.get(f"{name}.end"), units.get(f"{name}.training")
        if earlier is not None and course is not None:
            return start, {key: value.to(device) for key, value in earlier.items()}, course["loss"].tolist()
        generator = torch.Generator().manual_seed(config.seed + 2)
        target = problem.targets[name]
        losses = train(student, problem.x, target, settings=config.training, generator=generator, progress=progress)
    if not np.isfinite(losses[-1]):
        raise TangentError(f"{NAME}: training on the {name} target diverged; lower the learning rate")
    end = _snapshot(student)
    for kind, checkpoint in (("start", start), ("end", end), ("training", {"loss": torch.tensor(losses)})):
        units.put(f"{name}.{kind}", checkpoint)
    return start, end, losses


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def _measure(
    config: KernelAlignmentConfig,
    name: str,
    problem: _Problem,
    start: Checkpoint,
    end: Checkpoint,
    clock: Clock,
    device: str,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """All measurements of one trained student, and the arrays behind the figures."""
    student, x = _student(config, problem, device), problem.x[problem.chosen]
    y, steepness = problem.targets[name][problem.chosen], problem.targets["smooth"][problem.chosen][:, 0]
    with clock.stage(f"{name}.features", _WORK["features"]):
        feats = {
            "initial": tangent_features(student, x, params=start),
            "average": average_features(student, start, end, x, nodes=config.path_nodes),
            "final": tangent_features(student, x, params=end),
        }
    average = feats["average"]
    assert isinstance(average, AverageFeatures)
    assert average.change is not None
    change = average.change
    with clock.stage(f"{name}.kernels", _WORK["kernels"]):
        measured, kernels = _kernels(config, feats, change, y, steepness)
        positions, errors = _linearization(config, student, start, end, x, feats["initial"])
    measured |= {
        "path_error": average.error,
        "path_error_db": average.error_db,
        "path_nodes": average.nodes,
        "network": _network_errors(student, end, name, problem),
    }
    weight_change = feats["initial"].split(_vector(feats["initial"], end) - _vector(feats["initial"], start))
    for block in BLOCKS:
        measured["block"][block]["effective_rank"] = asdict(effective_rank(weight_change[block]))
    with clock.stage(f"{name}.explain", _WORK["explain"]) as progress:
        measured["explain"] = _explanations(feats["initial"], average, progress)
    with clock.stage(f"{name}.models", _WORK["models"]) as progress:
        models, fits = _models(config, student, start, name, problem, feats["initial"], change, progress)
    measured["model"] = models
    adaptive = [key for key in models if models[key]["structure"] == "TwoSided"]
    goal = measured["alignment"]["average"]
    measured["adapted_key"] = min(adaptive, key=lambda key: abs(models[key]["alignment"] - goal))
    adapted = fits[measured["adapted_key"]].transform(feats["initial"])
    arrays = {
        "targets": y[:, 0],
        "teacher": steepness,
        "change": change[:, 0],
        "images": problem.images,
        "linearization.positions": positions,
        "linearization.error": errors,
        "kernel.adapted": adapted.kernel(outputs="trace").float(),
        **{f"kernel.{kind}": kernel.float() for kind, kernel in kernels.items()},
        **{f"singular_values.network.{block}": torch.linalg.svdvals(weight_change[block]) for block in BLOCKS},
        **{
            f"singular_values.{key}.{block}": torch.linalg.svdvals(found.coefficients[block])
            for key, found in fits.items()
            for block in BLOCKS
        },
    }
    return measured, {key: value.cpu().numpy() for key, value in arrays.items()}


def _kernels(
    config: KernelAlignmentConfig, feats: Mapping[str, TangentFeatures], change: Tensor, y: Tensor, teacher: Tensor
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    blocks = {kind: f.kernel(outputs="trace", by_block=True) for kind, f in feats.items()}
    kernels = {kind: torch.stack(list(parts.values())).sum(0) for kind, parts in blocks.items()}
    diagonal = kernels["average"].diagonal()
    near, far = teacher.abs() < config.near, teacher.abs() > config.far
    if not bool(near.any()) or not bool(far.any()):
        raise TangentError(
            f"{NAME}: no sample has a teacher output below {config.near} or none above {config.far}; use more samples"
        )
    around = {"near": float(diagonal[near].mean()), "far": float(diagonal[far].mean())}
    found = representability(kernels["initial"], y[:, 0])
    decomposed = {kind: decompose(kernels[kind], kernels["initial"], change) for kind in ("average", "final")}
    measured: dict[str, Any] = {
        "alignment": {kind: alignment(kernel, change) for kind, kernel in kernels.items()},
        "alignment_centered": {kind: alignment(kernel, change, centered=True) for kind, kernel in kernels.items()},
        "alignment_target": {kind: alignment(kernel, y) for kind, kernel in kernels.items()},
        "block": {
            block: {
                "alignment": {kind: alignment(parts[block], change) for kind, parts in blocks.items()},
                "trace_share": {
                    kind: float(parts[block].trace() / kernels[kind].trace()) for kind, parts in blocks.items()
                },
            }
            for block in BLOCKS
        },
        "diagonal": around,
        "diagonal_ratio": around["near"] / around["far"],
        "decomposition": {
            kind: {"initial_weight": d.initial_weight, "target_weight": d.target_weight, "explained": d.explained}
            for kind, d in decomposed.items()
        },
        "representability": {
            "rkhs_norm": found.rkhs_norm,
            "top10_energy": float(found.energy[min(10, len(found.energy)) - 1]),
            "leave_one_out_rmse": found.leave_one_out_rmse,
        },
    }
    return measured, kernels


def _vector(feats: TangentFeatures, parameters: Checkpoint) -> Tensor:
    return torch.cat([parameters[name].flatten() for name in feats.parameters])


def _linearization(
    config: KernelAlignmentConfig,
    model: nn.Module,
    start: Checkpoint,
    end: Checkpoint,
    x: Tensor,
    initial: TangentFeatures,
) -> tuple[Tensor, Tensor]:
    """Relative error of f(x;θ₀) + φ₀(x)(θ_s − θ₀) against f(x;θ_s), s from 0 to 1 along the straight path."""
    step = initial.matvec(_vector(initial, end) - _vector(initial, start))
    positions = torch.linspace(0, 1, config.linearization_points)
    first, errors = _outputs(model, start, x), [0.0]
    for s in positions[1:].tolist():
        between = {key: torch.lerp(start[key], end[key], s) for key in start}
        moved = _outputs(model, between, x) - first
        errors.append(float((moved - s * step).norm() / moved.norm()))
    return positions, torch.tensor(errors)


def _outputs(model: nn.Module, parameters: Checkpoint, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.func.functional_call(model, dict(parameters), (x,))  # type: ignore[no-any-return]


def _network_errors(model: nn.Module, end: Checkpoint, name: str, problem: _Problem) -> dict[str, float]:
    train_errors = _errors(_outputs(model, end, problem.x), problem.targets[name])
    test_errors = _errors(_outputs(model, end, problem.x_test), problem.test_targets[name])
    return {f"train_{k}": v for k, v in train_errors.items()} | {f"test_{k}": v for k, v in test_errors.items()}


def _errors(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """Mean squared error, and the share of samples with the wrong sign."""
    wrong = _sign(prediction) != _sign(target)
    return {"mse": float(((prediction - target) ** 2).mean()), "error": float(wrong.double().mean())}


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
        explanation = explain(initial, average, structure)
        found[key] = {"total": explanation.total, **explanation.r2}
        progress((k + 1) / len(structures))
    return found


_CERTIFICATES = ("objective", "feasibility", "stationarity", "lower_bound", "rounds", "converged", "reason")


def _models(
    config: KernelAlignmentConfig, model: nn.Module, start: Checkpoint, name: str, problem: _Problem,
    feats: TangentFeatures, change: Tensor, progress: Callable[[float], None],
) -> tuple[dict[str, Any], dict[str, Fit]]:  # fmt: skip
    """The exact adaptive model over structures and strengths, fitted to the kernel samples and tested on all test digits."""
    x = problem.x[problem.chosen]
    residual = problem.targets[name][problem.chosen] - _outputs(model, start, x)
    test_feats = tangent_features(model, problem.x_test, params=start)
    test_start = _outputs(model, start, problem.x_test)
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
        test = _errors(test_start + found.predict(test_feats).to(test_start), problem.test_targets[name])
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
