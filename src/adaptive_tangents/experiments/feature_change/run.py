"""Is the feature change of a trained network a transform of each layer, and is it the one that the exact model finds?

An MLP, a CNN and a small transformer are trained to tell two classes of images apart. For each, the best transform of every
structure explains, layer by layer, the change of tangent features from the initial φ₀ to the average φ̄ over the path of
training, and to the final φ_T. R² is on samples held out from the fit and from the choice of its ridge. The exact two-sided
model predicts a transform from φ₀ and the labels alone, without the trained network. Measured is how much of the change
that transform explains, and whether it acts in the measured directions.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.capture.path_average import average_features
from adaptive_tangents.datasets.images import load_digits, normalize_digits
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.claims import over_seeds
from adaptive_tangents.experiments.feature_change import NAME
from adaptive_tangents.experiments.feature_change.claims import claims
from adaptive_tangents.experiments.feature_change.networks import TRAINING, Training, network
from adaptive_tangents.experiments.feature_change.transform_match import match
from adaptive_tangents.experiments.kernel_alignment.measures import outputs, vector
from adaptive_tangents.experiments.study import Asked
from adaptive_tangents.experiments.training import train
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.features.transforms import LowRank, Matrix, Sides, Transform
from adaptive_tangents.measures.alignment import effective_rank
from adaptive_tangents.measures.explain import explain
from adaptive_tangents.penalties.closed_forms import Quadratic
from adaptive_tangents.runs.record import Clock, RunResult, flatten, heading, settings
from adaptive_tangents.runs.units import Units
from adaptive_tangents.runtime.progress import Progress, silent
from adaptive_tangents.solvers.fit import fit
from adaptive_tangents.solvers.results import Fit
from adaptive_tangents.structures.base import Fixed, Full, Structure
from adaptive_tangents.structures.grouped import LayerScale
from adaptive_tangents.structures.spectral import Left, Right, TwoSided

STRUCTURES: dict[str, Structure] = {
    "layer_scale": LayerScale(), "left": Left(), "right": Right(), "two_sided": TwoSided(), "full": Full(),
}  # fmt: skip
GOALS = ("average", "final")
SIDES = ("left", "right")


@dataclass(frozen=True)
class FeatureChangeConfig:
    """The experiment's settings.

    ``samples`` training images serve explanations and fits; ``held_out`` test images judge predictions. Every explanation
    tries the ``ridges`` toward the identity. ``strengths`` λ of the exact model are relative to the squared largest singular
    value of the fixed kernel's coefficients; the one with the lowest error on the held-out images is used. At each side with
    at least ``least_width`` units, ``directions`` directions are compared, and ``draws`` random subspaces give the level of
    chance.
    """

    data: str = "mnist5k"
    data_dir: str | None = None
    seed: int = 0
    seeds: int = 1
    classes: tuple[int, int] = (2, 3)
    networks: tuple[str, ...] = tuple(TRAINING)
    width: int = 32
    training: dict[str, Training] = field(default_factory=lambda: dict(TRAINING))
    samples: int = 500
    held_out: int = 300
    path_nodes: int = 16
    ridges: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    strengths: tuple[float, ...] = (10.0, 1.0, 0.1)
    max_rounds: int = 100
    directions: int = 3
    least_width: int = 16
    draws: int = 200

    def __post_init__(self) -> None:
        counts = (self.seeds, self.width // 8, self.path_nodes, self.directions, self.draws, len(self.strengths))
        if min(counts) < 1 or self.samples < 16 or self.held_out < 1:
            raise TangentError(f"{NAME}: counts must be positive, width at least 8 and samples at least 16, got {self}")
        if not self.networks or not set(self.networks) <= set(self.training):
            raise TangentError(f"{NAME}: networks are {', '.join(self.training)}, got {self.networks}")


@dataclass(frozen=True)
class Images:
    """Images of unit norm and their two classes as ±1; ``chosen`` are the training images that are measured."""

    name: str
    source: str
    x: Float[Tensor, "n k h w"]
    y: Float[Tensor, "n 1"]
    x_test: Float[Tensor, "m k h w"]
    y_test: Float[Tensor, "m 1"]
    chosen: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, breadth = self.x.shape[1:]
        return channels, height, breadth

    def scaled(self, kind: str, x: Tensor) -> Tensor:
        """Images as a network sees them: unit norm for an MLP, as in kernel-alignment, else pixels of unit mean square."""
        return x if kind == "mlp" else x * x[0].numel() ** 0.5


def configured(asked: Asked) -> FeatureChangeConfig:
    """The settings for what the command line asked."""
    config = FeatureChangeConfig(
        **asked.source,
        seeds=asked.seeds or asked.sized(1, full=3),
        samples=asked.samples or asked.sized(FeatureChangeConfig.samples, quick=96),
    )
    epochs = asked.epochs or asked.sized(None, quick=5)
    if epochs is not None:
        config = replace(config, training={k: replace(t, epochs=epochs) for k, t in config.training.items()})
    if asked.size == "quick":
        return replace(config, held_out=100, width=8, path_nodes=8, ridges=(0.1, 1.0), strengths=(1.0,))
    return config


def run(
    config: FeatureChangeConfig,
    *,
    device: str = "cpu",
    progress: Progress = silent,
    units: Units | None = None,
) -> RunResult:
    """Train the networks, explain their feature change, and compare with the exact model's transforms.

    ``units`` keeps each trained network and each explanation as soon as it is made.
    Raises TangentError if the data are not available or hold too few images, or if training diverges.
    """
    units = units or Units()
    clock = Clock(progress, config.seeds * len(config.networks) * sum(_WORK.values()))
    runs: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    for s in range(config.seeds):
        each = replace(config, seed=config.seed + s)
        images = _images(each, device)
        runs.append({})
        for kind in config.networks:
            runs[-1][kind], shown = _measure(each, kind, images, clock, units)
            if s == 0:
                arrays |= {f"{kind}.{key}": values.cpu().numpy() for key, values in shown.items()}
        if s == 0:
            described = {
                "name": images.name,
                "source": images.source,
                "train": len(images.x),
                "test": len(images.x_test),
            }
    seeds = over_seeds(runs)
    results = {
        **heading(NAME, config_dict(config), clock, device),
        "data": described,
        "networks": runs[0],
        "over_seeds": seeds,
        "claims": claims(runs),
        "metrics": flatten(runs[0]),
    }
    return RunResult(results, arrays)


def config_dict(config: FeatureChangeConfig) -> dict[str, Any]:
    """The settings as plain values, with each network's training in words."""
    plain = settings(config)
    words = {
        f"training of the {kind}": f"{t['optimizer']}, rate {t['learning_rate']:g}, {t['epochs']} epochs"
        for kind, t in plain.pop("training").items()
    }
    return plain | words


# Expected work of each stage, in seconds; only ratios matter.
_WORK = {"train": 20.0, "features": 10.0, "explain": 60.0, "models": 20.0, "fresh": 5.0, "match": 5.0}


def _images(config: FeatureChangeConfig, device: str) -> Images:
    """Two classes of the data set, normalized; the seed draws the images that are measured."""
    data = load_digits(config.data, data_dir=config.data_dir, classes=config.classes)
    x, x_test = (
        normalize_digits(images).reshape(-1, 1, *images.shape[1:]).to(device)
        for images in (data.train_images, data.test_images)
    )
    y, y_test = (
        torch.where(labels == config.classes[0], -1.0, 1.0).to(device)[:, None]
        for labels in (data.train_labels, data.test_labels)
    )
    if len(x) < config.samples or len(x_test) < config.held_out:
        raise TangentError(
            f"{NAME}: {data.name} holds {len(x)} and {len(x_test)} images of classes {config.classes}, fewer than "
            "samples = "
            f"{config.samples} or held_out = {config.held_out}; lower them or use more data"
        )
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(x), generator=generator)[: config.samples].to(device)
    return Images(data.name, data.source, x, y, x_test, y_test, chosen)


def _measure(
    config: FeatureChangeConfig, kind: str, images: Images, clock: Clock, units: Units
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Measure one trained network; return its numbers and the tensors of its figures."""
    prefix = f"seed{config.seed}.{kind}"
    model = network(kind, images.shape, width=config.width, seed=config.seed + 1).to(images.x)
    start, end = _trained(config, kind, prefix, model, images, clock, units)
    x, fresh = images.scaled(kind, images.x[images.chosen]), images.scaled(kind, images.x_test[: config.held_out])
    with clock.stage(f"{prefix}.features", _WORK["features"]):
        initial, final = (tangent_features(model, x, params=params) for params in (start, end))
        average = average_features(model, start, end, x, nodes=config.path_nodes)
        held, held_average = (
            tangent_features(model, fresh, params=start),
            average_features(model, start, end, fresh, nodes=config.path_nodes),
        )
    found, measured = _explained(config, prefix, initial, {"average": average, "final": final}, clock, units)
    predicted, shuffled, told = _predicted(config, kind, prefix, images, model, start, initial, held, clock)
    with clock.stage(f"{prefix}.fresh", _WORK["fresh"]):
        fresh_r2 = {"measured": _r2({}, _grams(held, held_average, measured), None)}
        for key, exact in (("predicted", predicted), ("shuffled", shuffled)):
            fitted, judged = (_grams(a, b, exact.transforms) for a, b in ((initial, average), (held, held_average)))
            fresh_r2 |= {key: _r2(fitted, judged, None), f"{key}_scaled": _r2(fitted, judged, (1, 2))}
            fresh_r2["scale"] = _r2(fitted, judged, (1,))
    shapes = {name: list(block.shape) for name, block in initial.blocks.items()}
    matrices = [name for name, shape in shapes.items() if min(shape) > 1]
    weights, change = (
        initial.split(v) for v in (vector(initial, start), vector(initial, end) - vector(initial, start))
    )
    train_outputs, test_outputs = (outputs(model, end, images.scaled(kind, v)) for v in (images.x, images.x_test))
    numbers = {
        "blocks": shapes,
        "matrices": matrices,
        "test_error": float((test_outputs.sign() != images.y_test).float().mean()),
        "train_mse": float(((train_outputs - images.y) ** 2).mean()),
        "path_error_db": average.error_db,
        "weight_change": {k: float(change[k].norm() / weights[k].norm().clamp_min(1e-30)) for k in matrices},
        "explain": found,
        "fresh": fresh_r2,
        "fit": told,
    }
    with clock.stage(f"{prefix}.match", _WORK["match"]):
        numbers["sides"], shown = _sides(config, matrices, measured, predicted.transforms, shuffled.transforms)
    return numbers, shown


def _trained(
    config: FeatureChangeConfig, kind: str, prefix: str, model: nn.Module, images: Images, clock: Clock, units: Units
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    start = {key: value.detach().clone() for key, value in model.state_dict().items()}
    with clock.stage(f"{prefix}.train", _WORK["train"]) as progress:

        def make() -> dict[str, Tensor]:
            x = images.scaled(kind, images.x)
            generator = torch.Generator().manual_seed(config.seed + 2)
            losses = train(model, x, images.y, settings=config.training[kind], generator=generator, progress=progress)
            if not np.isfinite(losses[-1]):
                raise TangentError(f"{NAME}: training the {kind} diverged; lower its learning rate")
            return {key: value.detach().clone() for key, value in model.state_dict().items()}

        end = {key: value.to(images.x.device) for key, value in units(f"{prefix}.end", make).items()}
    model.load_state_dict(start)
    return start, end


def _explained(
    config: FeatureChangeConfig,
    prefix: str,
    initial: TangentFeatures,
    goals: Mapping[str, TangentFeatures],
    clock: Clock,
    units: Units,
) -> tuple[dict[str, Any], dict[str, Transform]]:
    """R² of every structure for both changes, and the measured two-sided transforms from φ₀ to φ̄."""
    found: dict[str, Any] = {goal: {} for goal in goals}
    transforms: dict[str, Transform] = {}
    share = _WORK["explain"] / (len(goals) * len(STRUCTURES))
    for goal, after in goals.items():
        for key, structure in STRUCTURES.items():
            with clock.stage(f"{prefix}.{goal}.{key}", share):
                make = partial(_explanation, initial, after, structure, config.ridges)
                part = units(f"{prefix}.{goal}.{key}", make)
            names = ("total", *initial.blocks)
            found[goal][key] = {name: float(part[f"r2.{name}"]) for name in names}
            if (goal, key) == ("average", "two_sided"):
                transforms = {name: _sides_of(part, name) for name in initial.blocks}
    return found, transforms


def _sides_of(part: Mapping[str, Tensor], name: str) -> Sides:
    left, right = (Matrix(part[f"{side}.{name}"]) if f"{side}.{name}" in part else None for side in SIDES)
    return Sides(left, right)


def _explanation(
    initial: TangentFeatures, after: TangentFeatures, structure: Structure, ridges: tuple[float, ...]
) -> dict[str, Tensor]:
    """R² of a structure, in total and by block, and its sides if it has them."""
    found = explain(initial, after, structure, strengths=ridges, rank=None)
    part = {f"r2.{name}": torch.tensor(value, dtype=torch.float64) for name, value in found.r2.items()}
    part["r2.total"] = torch.tensor(found.total, dtype=torch.float64)
    for name, transform in (found.transforms or {}).items():
        assert isinstance(transform, Sides)
        for side in SIDES:
            factor = getattr(transform, side)
            if factor is not None:
                part[f"{side}.{name}"] = factor.matrix()
    return part


def _predicted(
    config: FeatureChangeConfig, kind: str, prefix: str, images: Images, model: nn.Module, start: Mapping[str, Tensor],
    initial: TangentFeatures, held: TangentFeatures, clock: Clock,
) -> tuple[Fit, Fit, dict[str, Any]]:  # fmt: skip
    """The exact two-sided model of the labels, that of shuffled labels at the same strength, and certificates."""
    x, fresh = (images.scaled(kind, v) for v in (images.x[images.chosen], images.x_test[: config.held_out]))
    begun, begun_fresh = outputs(model, start, x), outputs(model, start, fresh)
    y, y_fresh = images.y[images.chosen], images.y_test[: config.held_out]
    with clock.stage(f"{prefix}.models", _WORK["models"]) as progress:
        fixed = fit(initial, y - begun, structure=Fixed())
        top = max(float(torch.linalg.svdvals(matrix)[0]) for matrix in fixed.coefficients.values()) ** 2

        def error(found: Fit) -> float:
            return float(((begun_fresh + found.predict(held).to(begun_fresh) - y_fresh) ** 2).mean())

        fits: dict[float, Fit] = {}
        for k, share in enumerate(config.strengths):
            structure = TwoSided(Quadratic(share * top))
            fits[share] = fit(initial, y - begun, structure=structure, max_rounds=config.max_rounds)
            progress((k + 1) / (len(config.strengths) + 1))
        best = min(fits, key=lambda share: error(fits[share]))
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(config.seed + 3)).to(y.device)
        shuffled = fit(
            initial, y[order] - begun, structure=TwoSided(Quadratic(best * top)), max_rounds=config.max_rounds
        )
    chosen = fits[best]
    return chosen, shuffled, {
        "strength": best, "errors": {f"{share:g}": error(found) for share, found in fits.items()},
        "fixed_error": error(fixed),
        "rounds": chosen.rounds, "stationarity": chosen.stationarity, "feasibility": chosen.feasibility,
        "converged": chosen.converged and shuffled.converged,
    }  # fmt: skip


def _grams(
    before: TangentFeatures, after: TangentFeatures, transforms: Mapping[str, Transform]
) -> dict[str, Float[Tensor, "3 3"]]:
    """For each block, the inner products of φ̄, φ₀ and Mφ₀ over all samples."""
    three = [feats.to(torch.float64) for feats in (after, before)]
    three.append(three[1].transformed(transforms))
    grams = {name: torch.zeros(3, 3, dtype=torch.float64) for name in before.blocks}
    for j in range(3):
        for k in range(j + 1):
            kernels = three[j].kernel(None if j == k else three[k], outputs="trace", by_block=True)
            for name, kernel in kernels.items():
                grams[name][j, k] = grams[name][k, j] = kernel.diagonal().sum()
    return grams


def _r2(
    fitted: Mapping[str, Tensor], fresh: Mapping[str, Tensor], regressors: tuple[int, ...] | None
) -> dict[str, float]:
    """R² on fresh samples, in total and by block, of Mφ₀ or of a fitted combination of the ``regressors``.

    Regressor 1 is φ₀ and 2 is Mφ₀; ``fitted`` determines their weights.
    """
    errors, changes = {}, {}
    for name, gram in fresh.items():
        weights = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
        if regressors is not None:
            index, own = list(regressors), fitted[name]
            weights[2] = 0.0
            solved = torch.linalg.lstsq(own[index][:, index], own[index, 0][:, None], driver="gelsd").solution[:, 0]
            weights[index] = -solved
        errors[name] = float(weights @ gram @ weights)
        changes[name] = float(gram[0, 0] - 2 * gram[0, 1] + gram[1, 1])
    r2 = {name: 1 - errors[name] / changes[name] for name in errors if changes[name] > 1e-12 * float(fresh[name][0, 0])}
    return {"total": 1 - sum(errors.values()) / sum(changes.values()), **r2}


def _sides(
    config: FeatureChangeConfig, names: list[str], measured: Mapping[str, Transform], predicted: Mapping[str, Transform],
    shuffled: Mapping[str, Transform],
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # fmt: skip
    """For each wide enough side, singular values, and the agreement of the predicted and the measured transform."""
    numbers: dict[str, Any] = {}
    shown: dict[str, Tensor] = {}
    for name in names:
        for side in SIDES:
            found, wanted, other = (_matrix(t[name], side) for t in (measured, predicted, shuffled))
            if found is None or wanted is None or other is None or len(found) < config.least_width:
                continue
            agreed, by_chance = (
                match(found, each, k=config.directions, draws=config.draws, seed=config.seed)
                for each in (wanted, other)
            )
            key = f"{name}.{side}"
            values = torch.linalg.svdvals(found)
            shown |= {f"{key}.measured": values, f"{key}.predicted": torch.linalg.svdvals(wanted)}
            rank = effective_rank(found - torch.eye(len(found)).to(found))
            numbers[key] = {
                "width": len(found), "largest": values[:3].tolist(), "participation": rank.participation,
                "match": None if agreed is None else asdict(agreed),
                "shuffled": None if by_chance is None else asdict(by_chance),
            }  # fmt: skip
    return numbers, shown


def _matrix(transform: Transform, side: str) -> Float[Tensor, "d d"] | None:
    assert isinstance(transform, Sides)
    factor = transform.left if side == "left" else transform.right
    assert factor is None or isinstance(factor, LowRank | Matrix)
    return None if factor is None else factor.matrix().double()
