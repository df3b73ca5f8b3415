"""Is the weight change low-rank, and do adaptive features make it so while fixed ones do not?

A ReLU network classifies MNIST's ten digits from n of them. The same SGD on the same batches trains its linearization at the
initial weights, with fixed and with adaptive features (`TangentModule` with `Fixed` and `TwoSided`). Compared, layer by
layer, are the singular values of the network's change θ_T − θ_0, of the fixed model's coefficients, of the adaptive model's
inner θ and its effective coefficients B = M_Lᵀ Θ M_R, and of the exact fits. Every block has its biases as one more input
column. Pixels are divided by 255 and not centered.

The published figure, for n = 500, draws n fresh digits from the whole training set every epoch; here that is compared with
the same n digits in every epoch. Training lasts a given number of epochs; no test set stops it. Exact fits interpolate the
one-hot labels of the first n digits under squared error.
Source: LeJeune & Alemohammad, arXiv:2308.15478, first versions (figure); CPAL 2024, §3 (solutions approximately of low rank).
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.datasets.images import load_digits
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.spectra import WEIGHTS as NAME
from adaptive_tangents.experiments.spectra.claims import LEADING, MEASURES, weight_claims
from adaptive_tangents.experiments.study import Asked
from adaptive_tangents.experiments.training import epoch, relu_network
from adaptive_tangents.measures.alignment import effective_rank
from adaptive_tangents.nn.tangent_module import TangentModule
from adaptive_tangents.penalties.closed_forms import Quadratic
from adaptive_tangents.runs.record import Clock, RunResult, flatten, heading, settings
from adaptive_tangents.runs.units import Units
from adaptive_tangents.runtime.progress import Progress, silent
from adaptive_tangents.solvers.fit import fit
from adaptive_tangents.structures.base import Fixed, Structure
from adaptive_tangents.structures.spectral import TwoSided

CLASSES = 10
PROTOCOLS, EXACT = ("fixed subset", "fresh subset each epoch"), "exact"
# The trained models, and the matrices that each gives.
TRAINED = {"network": ("network",), "fixed": ("fixed",), "adaptive": ("adaptive", "inner")}

# Expected work of each stage, in seconds on one core with the default config; only ratios matter.
_WORK = {"network": 2.0, "fixed": 5.0, "adaptive": 15.0, "exact": 25.0}


@dataclass(frozen=True)
class WeightSpectraConfig:
    """Settings: digits, a network of ``depth`` dense layers, SGD as published, λ of the exact fits."""

    data: str = "mnist5k"
    data_dir: str | None = None
    seed: int = 0
    seeds: int = 3
    samples: int = 500
    depth: int = 5
    width: int = 128
    protocols: tuple[str, ...] = PROTOCOLS
    epochs: int = 100
    batch_size: int = 50
    learning_rate: float = 0.01
    momentum: float = 0.9
    strengths: tuple[float, ...] = (0.1, 0.01)
    tol: float = 1e-6

    def __post_init__(self) -> None:
        counts = (self.seeds, self.samples - 1, self.depth - 1, self.width - 1, self.epochs, self.batch_size)
        if min(counts) < 1:
            raise TangentError(
                f"{NAME}: seeds, epochs and batch size must be positive, and samples, depth and width at least 2, got {self}"
            )
        unknown = [name for name in self.protocols if name not in PROTOCOLS]
        if unknown or not self.protocols:
            raise TangentError(f"{NAME}: protocols are {', '.join(PROTOCOLS)}, got {self.protocols}")

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers' names."""
        return tuple(f"layer{k}" for k in range(1, self.depth + 1))


def configured(asked: Asked) -> WeightSpectraConfig:
    """The settings for what the command line asked."""
    default = WeightSpectraConfig(
        **asked.source,
        seeds=asked.seeds or asked.sized(3, quick=1, full=5),
        epochs=asked.epochs or asked.sized(100, quick=40, full=300),
    )
    if asked.size == "quick":
        return replace(default, samples=60, width=32, strengths=(0.1,))
    return replace(default, samples=asked.samples or default.samples)


@dataclass(frozen=True)
class _Digits:
    """Training digits, whose first n are the fixed subset, and test digits."""

    x: Float[Tensor, "m d"]
    labels: Int[Tensor, " m"]
    x_test: Float[Tensor, "k d"]
    test_labels: Int[Tensor, " k"]
    data: dict[str, Any]


def run(
    config: WeightSpectraConfig,
    *,
    device: str = "cpu",
    progress: Progress = silent,
    units: Units | None = None,
) -> RunResult:
    """Train and fit every model, each as a part of the run, and judge the claims about their singular values.

    Raises TangentError if the data are not available or hold too few digits, or if training diverges.

    >>> tiny = WeightSpectraConfig(seeds=1, samples=10, depth=2, width=20, epochs=1, strengths=(), protocols=PROTOCOLS[:1])
    >>> list(run(tiny).results["ranks"])
    ['fixed subset', 'exact']
    """
    jobs = list(_jobs(config))
    clock = Clock(progress, sum(job.work for job in jobs))
    units, digits = units or Units(), _digits(config, device)
    parts: dict[Job, dict[str, Tensor]] = {}
    for job in jobs:
        with clock.stage(job.name, job.work) as advance:
            parts[job] = units(job.name, partial(_made, config, job, digits, advance, device))
    arrays = _arrays(config, parts)
    models = {group: list(TRAINED) for group in config.protocols} | {EXACT: list(structures(config))}
    ranks = {
        group: {
            kind: {layer: ranks_of(arrays[f"{group}.{kind}.{layer}"]) for layer in config.layers}
            for model in of
            for kind in _kinds(model)
        }
        for group, of in models.items()
    }
    errors = {
        group: {model: arrays[f"{group}.{model}.error"][:, 0].tolist() for model in of} for group, of in models.items()
    }
    results = {
        **heading(NAME, settings(config), clock, device),
        "seed": config.seed,
        "data": digits.data,
        "layers": {layer: list(parts[jobs[0]][f"{jobs[0].model}/{layer}"].shape) for layer in config.layers},
        "ranks": ranks,
        "errors": errors,
        "claims": weight_claims(ranks),
        "metrics": flatten({"rank": means(ranks), "error": means(errors)}),
    }
    return RunResult(results, arrays)


@dataclass(frozen=True)
class Job:
    """One part of a run: a seed, a protocol (or exact), and the model trained (or fitted)."""

    seed: int
    group: str
    model: str

    @property
    def name(self) -> str:
        """The part's name."""
        return f"seed{self.seed}.{self.group.replace(' ', '-')}.{self.model}"

    @property
    def work(self) -> float:
        """The expected work."""
        return _WORK["exact" if self.group == EXACT else self.model]


def _jobs(config: WeightSpectraConfig) -> Iterator[Job]:
    for seed in range(config.seed, config.seed + config.seeds):
        yield from (Job(seed, protocol, model) for protocol in config.protocols for model in TRAINED)
        yield from (Job(seed, EXACT, model) for model in structures(config))


def _kinds(model: str) -> tuple[str, ...]:
    """The names of the matrices that a model gives."""
    return TRAINED.get(model, (model,))


def _arrays(config: WeightSpectraConfig, parts: dict[Job, dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """Singular values of every kind of matrix, losses and test errors, one row per seed."""
    rows: dict[str, list[np.ndarray]] = {}
    for job, made in parts.items():
        for kind in _kinds(job.model):
            for layer in config.layers:
                values = torch.linalg.svdvals(made[f"{kind}/{layer}"].double())
                rows.setdefault(f"{job.group}.{kind}.{layer}", []).append(values.cpu().numpy())
        for key in {"loss", "error"} & set(made):
            rows.setdefault(f"{job.group}.{job.model}.{key}", []).append(made[key].cpu().numpy())
    return {key: np.stack(values) for key, values in rows.items()}


def structures(config: WeightSpectraConfig) -> dict[str, Structure]:
    """The structures of the exact fits, by key: Fixed, and TwoSided at each λ."""
    return {"Fixed": Fixed()} | {
        f"TwoSided_{strength:g}": TwoSided(Quadratic(strength)) for strength in config.strengths
    }


def ranks_of(values: Float[np.ndarray, "seeds k"]) -> dict[str, list[float]]:
    """The effective ranks of each seed's singular values, and the leading ones' share of Σσ², by measure.

    >>> ranks_of(np.ones((1, 20)))
    {'stable': [20.0], 'entropy': [20.0], 'participation': [20.0], 'leading': [0.5]}
    """
    found = [asdict(effective_rank(torch.from_numpy(row))) for row in values]
    ranks = {measure: [round(each[measure], 9) for each in found] for measure in MEASURES}
    squares = values**2
    return ranks | {"leading": (squares[:, :LEADING].sum(1) / squares.sum(1)).tolist()}


def means(tree: Any) -> Any:
    """The nested mapping with every list replaced by its mean.

    >>> means({"a": {"b": [1.0, 2.0]}})
    {'a': {'b': 1.5}}
    """
    return {k: means(v) for k, v in tree.items()} if isinstance(tree, dict) else float(np.mean(tree))


def _digits(config: WeightSpectraConfig, device: str) -> _Digits:
    digits = load_digits(config.data, data_dir=config.data_dir)
    n = len(digits.train_labels)
    if n < config.samples:
        raise TangentError(
            f"{NAME}: {digits.name} holds {n} training digits, fewer than samples = {config.samples}; lower samples or "
            "use more data"
        )
    x, x_test = (
        images.flatten(1).to(torch.float32).to(device) / 255 for images in (digits.train_images, digits.test_images)
    )
    data = {
        "name": digits.name, "source": digits.source, "train": n, "test": len(x_test), "samples": config.samples
    }  # fmt: skip
    return _Digits(x, digits.train_labels.to(device), x_test, digits.test_labels.to(device), data)


def _network(config: WeightSpectraConfig, inputs: int, seed: int, device: str) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    widths = (inputs, *(config.width for _ in config.layers[1:]), CLASSES)
    return relu_network(widths, config.layers, bias=True, generator=generator).to(device)


def _made(
    config: WeightSpectraConfig, job: Job, digits: _Digits, advance: Callable[[float], None], device: str
) -> dict[str, Tensor]:
    """The matrices of a part, named kind/layer, the loss of every epoch, and the test error."""
    network = _network(config, digits.x.shape[1], job.seed, device)
    if job.group == EXACT:
        return _fitted(config, job, digits, network)
    trained: dict[str, Structure] = {"fixed": Fixed(), "adaptive": TwoSided()}
    start = {name: value.detach().clone() for name, value in network.named_parameters()}
    module = network if job.model == "network" else TangentModule(network, trained[job.model])
    losses = sgd(module, config, digits.x, digits.labels, job, advance)
    if not np.isfinite(losses[-1]):
        raise TangentError(f"{NAME}: training the {job.model} model diverged; lower the learning rate")
    with torch.no_grad():
        error = _error(module(digits.x_test), digits.test_labels)
    named = {"loss": torch.tensor(losses, dtype=torch.float64), "error": error}
    for kind, matrices in _matrices(module, job.model, start).items():
        named |= {f"{kind}/{layer}": matrix for layer, matrix in matrices.items()}
    return named


def _matrices(module: nn.Module, model: str, start: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """θ_T − θ_0 of a network, [weight | bias] per layer; or B of a tangent module, and θ if it differs from B."""
    if not isinstance(module, TangentModule):
        moved = {name: value.detach() - start[name] for name, value in module.named_parameters()}
        layers = [name.removesuffix(".bias") for name in moved if name.endswith(".bias")]
        return {model: {of: torch.cat([moved[f"{of}.weight"], moved[f"{of}.bias"][:, None]], 1) for of in layers}}
    found = {model: module.effective_coefficients()}
    return found if model == "fixed" else found | {"inner": module.inner_coefficients()}


def sgd(
    module: nn.Module,
    config: WeightSpectraConfig,
    x: Float[Tensor, "m d"],
    labels: Int[Tensor, " m"],
    job: Job,
    advance: Callable[[float], None],
) -> list[float]:
    """Train on cross-entropy by SGD with momentum and constant rate; each epoch has the first n digits, or n fresh ones."""
    generator = torch.Generator().manual_seed(job.seed + 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=config.learning_rate, momentum=config.momentum)
    pool = config.samples if job.group == PROTOCOLS[0] else len(x)
    losses = []
    for done in range(config.epochs):
        drawn = torch.randperm(pool, generator=generator)[: config.samples]
        batches = torch.split(drawn, config.batch_size)
        total = epoch(lambda index: nn.functional.cross_entropy(module(x[index]), labels[index]), optimizer, batches)
        losses.append(total / config.samples)
        advance((done + 1) / config.epochs)
    return losses


def _fitted(config: WeightSpectraConfig, job: Job, digits: _Digits, network: nn.Module) -> dict[str, Tensor]:
    n = config.samples
    with torch.no_grad():
        start, test_start = network(digits.x[:n]), network(digits.x_test)
    wanted = nn.functional.one_hot(digits.labels[:n], CLASSES).to(start)
    feats = tangent_features(network, digits.x[:n])
    found = fit(feats, wanted - start, structure=structures(config)[job.model], tol=config.tol)
    # In parts, because features of all test digits would take too much memory.
    moved = torch.cat([found.predict(tangent_features(network, part)) for part in torch.split(digits.x_test, 1000)])
    named = {f"{job.model}/{layer}": matrix for layer, matrix in found.coefficients.items()}
    return {**named, "error": _error(test_start + moved, digits.test_labels)}


def _error(outputs: Float[Tensor, "k c"], labels: Int[Tensor, " k"]) -> Float[Tensor, " 1"]:
    """The share of digits whose largest output is that of another class."""
    return (outputs.argmax(1) != labels).double().mean()[None].cpu()
