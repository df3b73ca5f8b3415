"""What training will do to a network's tangent features, foretold before it is trained.

A forecast moves the parameters by steps of exact adaptive fits, θ_{k+1} = θ_k + sβ_k, without training (`forecast`). Here
it is made for MLPs on a teacher's targets from smooth to sign, a CNN and a transformer on images, and a pretrained sentence
encoder on texts. Then the network is trained, and the forecast is compared with what happened: the kernel averaged along the
way and the final one, each layer's share of the change, its effective rank, and the directions of the change. Beside it are
the initial kernel, other structures and strengths, shuffled targets, the network itself after a few epochs, and its
second-order model at θ₀, trained alike. The MLP is also trained in other ways and at other widths.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from adaptive_tangents.datasets.image_files import find_cifar10
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.feature_change.networks import Training
from adaptive_tangents.experiments.forecast import NAME
from adaptive_tangents.experiments.forecast.claims import ADAPTIVE, claims
from adaptive_tangents.experiments.forecast.measures import Passes, Turn, compared, total, turn
from adaptive_tangents.experiments.forecast.problems import EPOCHS, Case, Source, State, Task, course, posed
from adaptive_tangents.experiments.forecast.quadratic import SecondOrder
from adaptive_tangents.experiments.forecast.texts import absent
from adaptive_tangents.experiments.kernel_alignment.measures import outputs
from adaptive_tangents.experiments.study import Asked
from adaptive_tangents.experiments.training import train
from adaptive_tangents.forecasting.forecast import forecast
from adaptive_tangents.penalties.closed_forms import Quadratic
from adaptive_tangents.runs.record import Clock, RunResult, flatten, heading, settings
from adaptive_tangents.runs.units import Units
from adaptive_tangents.runtime.progress import Progress, silent
from adaptive_tangents.structures.base import Fixed, Structure
from adaptive_tangents.structures.spectral import Left, TwoSided

# What is compared, in words. λ of the two-sided model at several strengths come after these.
METHODS = {
    "nothing": "K_0, nothing changes",
    "forecast": "forecast",
    "fixed": "forecast, Fixed",
    "left": "forecast, Left",
    "shuffled": "forecast, TwoSided, targets shuffled",
    "quadratic": "second-order model, trained alike",
    **{f"epoch{k}": f"network after {k} epoch{'s' * (k > 1)}" for k in EPOCHS},
}
_ALWAYS = ("nothing", "forecast", "fixed", ADAPTIVE, *(f"epoch{k}" for k in EPOCHS))
# Expected work of each stage, in seconds on one core with the default config; only ratios matter.
_WORK = {"train": 4.0, "reference": 3.0, "method": 4.0}


_Parts = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class ForecastConfig:
    """The experiment's settings.

    ``seeds`` of every network, ``varied_seeds`` of the encoder, the other temperatures τ, ways of training and widths.
    The first ``controls`` seeds have every comparison, the others the forecast, Fixed, TwoSided and the network's own
    course. The MLP learns at most ``digits`` digits of ``data``, the CNN and the transformer ``samples`` images of
    ``classes`` classes of ``images``. Kernels are on ``kernel_samples`` samples, and averages have ``path_nodes`` nodes.
    On every side of at least ``least_width`` units, ``directions`` directions are compared. ``strengths`` are further λ
    of TwoSided.
    """

    data: str = "mnist5k"
    images: str = "mnist5k"
    data_dir: str | None = None
    seed: int = 0
    seeds: int = 2
    controls: int = 1
    varied_seeds: int = 1
    networks: tuple[str, ...] = ("mlp", "cnn", "transformer", "encoder")
    temperatures: tuple[float, ...] = (0.25,)
    ways: tuple[tuple[Literal["sgd", "adam"], float], ...] = (("sgd", 0.01), ("adam", 0.001))
    width: int = 256
    widths: tuple[int, ...] = (64,)
    image_width: int = 16
    epochs: int = 100
    text_epochs: int = 30
    digits: int = 800
    samples: int = 200
    classes: int = 3
    kernel_samples: int = 150
    path_nodes: int = 8
    directions: int = 3
    least_width: int = 16
    strengths: tuple[float, ...] = (3.0,)

    def __post_init__(self) -> None:
        counts = (
            self.seeds,
            self.varied_seeds,
            self.width,
            self.epochs,
            self.text_epochs,
            self.path_nodes,
            self.directions,
        )
        if min(*counts, *self.widths, *self.strengths, self.classes - 1) <= 0 or not 0 <= self.controls <= self.seeds:
            raise TangentError(
                f"{NAME}: counts, widths and strengths must be positive, classes at least 2 and controls at most seeds, got "
                f"{self}"
            )
        if min(self.digits, self.samples) < 16 or self.kernel_samples < 16:
            raise TangentError(f"{NAME}: digits, samples and kernel_samples must be at least 16, got {self}")
        unknown = set(self.networks) - {"mlp", "cnn", "transformer", "encoder"}
        if unknown or not self.networks:
            raise TangentError(f"{NAME}: networks are mlp, cnn, transformer and encoder, got {self.networks}")

    @property
    def source(self) -> Source:
        """Where the data come from."""
        return Source(
            self.data, self.images, self.data_dir, self.digits, self.samples, self.classes, self.kernel_samples
        )  # fmt: skip

    def cases(self) -> list[Case]:
        """Every network to be foretold, the main ones first."""
        sgd, adam = Training("sgd", 0.1, self.epochs), Training("adam", 2e-3, self.epochs, 50)
        text = Training("adam", 2e-4, self.text_epochs, 8)
        mlp = Case("mlp-sign", "MLP, sign", "mlp", "sign", self.width, sgd)
        found = [mlp, replace(mlp, key="mlp-smooth", words="MLP, smooth target", target="smooth")]
        found += [
            Case("cnn", "CNN", "cnn", "classes", self.image_width, adam),
            Case("transformer", "transformer", "transformer", "classes", 2 * self.image_width, adam),
            Case("encoder", "sentence encoder", "encoder", "subject", 384, text),
        ]
        for t in self.temperatures:
            found.append(
                replace(mlp, key=f"mlp-tau{t:g}", words=f"MLP, τ = {t:g}", target=f"tau{t:g}", varied="target")
            )
        for optimizer, rate in self.ways:
            way, name = replace(sgd, optimizer=optimizer, learning_rate=rate), {"sgd": "SGD", "adam": "Adam"}[optimizer]
            words = f"MLP, sign, {name}, rate {rate:g}"
            found.append(
                replace(
                    mlp, key=f"mlp-{optimizer}{rate:g}", words=words, training=way, varied="training", foretold=mlp.key
                )
            )
        for case in found[2:4] if self.ways else ():
            way, words = Training("sgd", 0.02, self.epochs, 50), f"{case.words}, SGD, rate 0.02"
            key = f"{case.key}-sgd0.02"
            found.append(replace(case, key=key, words=words, training=way, varied="training", foretold=case.key))
        for width in self.widths:
            found.append(
                replace(mlp, key=f"mlp-width{width}", words=f"MLP, sign, width {width}", width=width, varied="width")
            )
        return [case for case in found if case.kind in self.networks]

    def methods(self, case: Case, nth: int) -> list[str]:
        """What is compared for the nth seed of a case."""
        if case.varied or nth >= self.controls:
            return list(_ALWAYS)
        known = [m for m in METHODS if m != "quadratic" or case.target == "sign"]
        return known + [ADAPTIVE] + [f"two_sided_{strength:g}" for strength in self.strengths if strength != 1]


def words_of(method: str) -> str:
    """A comparison in words.

    >>> words_of("two_sided_0.3")
    'forecast, TwoSided, λ = 0.3'
    """
    return METHODS.get(method) or f"forecast, TwoSided, λ = {method.removeprefix('two_sided_')}"


def configured(asked: Asked) -> ForecastConfig:
    """The settings for what the command line asked; images are CIFAR-10 if its files are in the data folder."""
    color = asked.data_dir is not None and find_cifar10(Path(asked.data_dir)) is not None
    config = ForecastConfig(
        data="mnist5k" if asked.data == "cifar10" else asked.data,
        images="cifar10" if color or asked.data == "cifar10" else asked.data,
        data_dir=asked.data_dir,
        seed=asked.seed,
        seeds=asked.seeds or asked.sized(ForecastConfig.seeds, quick=1, full=5),
        varied_seeds=asked.sized(1, full=3),
        samples=asked.samples or asked.sized(ForecastConfig.samples, quick=48, full=400),
        classes=asked.sized(ForecastConfig.classes, full=10),
        epochs=asked.epochs or asked.sized(ForecastConfig.epochs, quick=20),
    )
    if asked.size == "full":
        ways: tuple[tuple[Literal["sgd", "adam"], float], ...] = (*config.ways, ("sgd", 0.2), ("adam", 0.01))
        config = replace(config, ways=ways, widths=(64, 512, 1024), strengths=(3.0, 0.3))
        config = replace(config, temperatures=(1.0, 0.5, 0.25, 0.1))
        return replace(config, controls=config.seeds, kernel_samples=300, path_nodes=16)
    if asked.size == "quick":
        config = replace(config, networks=("mlp", "cnn"), temperatures=(), ways=(), widths=(), strengths=(), width=16)
        return replace(config, controls=0, digits=80, image_width=8, kernel_samples=48, path_nodes=4)
    return config


def config_dict(config: ForecastConfig) -> dict[str, Any]:
    """The settings as plain values, with the ways of training in words."""
    plain = settings(config)
    return plain | {"ways": ", ".join(f"{optimizer} {rate:g}" for optimizer, rate in config.ways)}


def run(
    config: ForecastConfig,
    *,
    device: str = "cpu",
    progress: Progress = silent,
    units: Units | None = None,
) -> RunResult:
    """Foretell and train every network and compare. Each training, its kernels and each comparison are parts of the run.

    Raises TangentError if the data are not available or hold too few samples, or if training diverges.
    """
    units = units or Units()
    why = absent() if "encoder" in config.networks else ""
    cases = [case for case in config.cases() if not (why and case.kind == "encoder")]
    few = {case.key for case in cases if case.varied or case.kind == "encoder"}
    seeds = {case.key: config.varied_seeds if case.key in few else config.seeds for case in cases}
    clock = Clock(progress, sum(_work(config, case, k) for case in cases for k in range(seeds[case.key])))
    found: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    data: dict[str, str] = {}
    shared: _Parts = {}
    for case in cases:
        runs = []
        for k in range(seeds[case.key]):
            seed = config.seed + k
            task = posed(case, config.source, seed, device)
            runs.append(_measured(config, case, task, seed, config.methods(case, k), clock, units, shared))
            if k == 0:
                data[task.data["name"]] = task.data["source"]
                described = {"n": len(task.x), "outputs": task.y.shape[1], "data": task.data["name"]}
                arrays |= {
                    f"{case.key}.told": task.told.cpu().numpy(),
                    f"{case.key}.y": task.y[task.chosen].cpu().numpy(),
                }
        found[case.key] = _described(case) | described | _over_seeds(runs)
        arrays |= {f"{case.key}.kernel.{key}": v.float().cpu().numpy() for key, v in runs[0].kernels.items()}
    results = {
        **heading(NAME, config_dict(config), clock, device),
        "seed": config.seed,
        "data": data,
        "cases": found,
        "skipped": {"encoder": why} if why else {},
        "claims": claims(found),
        "metrics": flatten({
            key: {metric: float(np.mean(v)) for metric, v in case["methods"]["forecast"].items() if metric != "seconds"}
            for key, case in found.items()
        }),
    }  # fmt: skip
    return RunResult(results, arrays)


@dataclass(frozen=True)
class _Seed:
    """What one seed of a case gave: numbers and numbers by layer of each comparison and of the trained network."""

    layers: tuple[str, ...]
    numbers: Mapping[str, Mapping[str, float]]
    by_layer: Mapping[str, Mapping[str, list[float]]]
    kernels: Mapping[str, Tensor]


def _work(config: ForecastConfig, case: Case, nth: int) -> float:
    return _WORK["train"] + _WORK["reference"] + _WORK["method"] * len(config.methods(case, nth))


def _described(case: Case) -> dict[str, Any]:
    t = case.training
    rule = {"sgd": "SGD", "adam": "Adam"}[t.optimizer]
    return {
        "words": case.words, "kind": case.kind, "target": case.target, "varied": case.varied, "width": case.width,
        "epochs": t.epochs, "training": f"{rule}, rate {t.learning_rate:g}, {t.epochs} epochs",
    }  # fmt: skip


def _over_seeds(runs: list[_Seed]) -> dict[str, Any]:
    """Every number of every comparison over the seeds that have it; numbers by layer are those of the first seed."""
    first = runs[0]
    methods = {
        method: {key: [run.numbers[method][key] for run in runs if method in run.numbers] for key in numbers}
        for method, numbers in first.numbers.items()
    }
    trained = methods.pop("trained")
    return {"layers": list(first.layers), "methods": methods, "trained": trained, "by_layer": first.by_layer}


def _measured(
    config: ForecastConfig,
    case: Case,
    task: Task,
    seed: int,
    methods: list[str],
    clock: Clock,
    units: Units,
    shared: _Parts,
) -> _Seed:
    """Train one network, foretell it in every way, and compare."""
    prefix = f"{case.key}.seed{seed}"
    with clock.stage(f"{prefix}.train", _WORK["train"]) as advance:
        states, losses, seconds = course(case, task, seed, units, advance)
    with clock.stage(f"{prefix}.reference", _WORK["reference"]):
        kept = units(f"{prefix}.reference", lambda: _reference(config, task, states["end"]))
    truth = Turn.of(kept, "trained")
    numbers: dict[str, dict[str, float]] = {}
    by_layer: dict[str, dict[str, list[float]]] = {}
    kernels = {"average": total(truth.average), "final": total(truth.final)}
    for method in ("trained", *methods):
        with clock.stage(f"{prefix}.{method}", _WORK["method"] if method != "trained" else 0.0):
            state: State = states["end"]
            cost: dict[str, Tensor] = {}
            if method != "trained":
                state, cost = _foretold(case, task, seed, method, states, units, shared)
            part = units(f"{prefix}.{method}", partial(_compared, config, task, method, state, cost, truth))
        numbers[method] = {key: float(v) for key, v in part.items() if v.ndim == 0}
        by_layer[method] = {
            k.removeprefix("by_layer:"): v.tolist() for k, v in part.items() if k.startswith("by_layer:")
        }
        if method in ("nothing", "forecast"):
            kernels["initial" if method == "nothing" else "forecast"] = part["kernel"]
    numbers["trained"] |= {"seconds": seconds, "last_loss": losses[-1]}
    return _Seed(tuple(truth.change), numbers, by_layer, kernels)


def _reference(config: ForecastConfig, task: Task, end: State) -> dict[str, Tensor]:
    return turn(task, end, nodes=config.path_nodes).tensors("trained")


def _compared(
    config: ForecastConfig, task: Task, method: str, state: State, cost: Mapping[str, Tensor], truth: Turn
) -> dict[str, Tensor]:
    """One foretold state against the trained one, with its cost."""
    found = truth if method == "trained" else turn(task, state, nodes=config.path_nodes)
    part = compared(task, found, truth, state, directions=config.directions, least_width=config.least_width)
    if "diverged" in cost:
        part = {key: torch.full_like(value, torch.nan) for key, value in part.items()}
    shown = {"kernel": total(found.average)} if method in ("nothing", "forecast") else {}
    return part | dict(cost) | shown


def _foretold(
    case: Case, task: Task, seed: int, method: str, states: Mapping[str, State], units: Units, shared: _Parts
) -> tuple[State, dict[str, Tensor]]:
    """The foretold parameters and the cost of making them, a part of the run that ways of training share."""
    if method == "nothing":
        return {}, {"passes": _number(0.0)}
    if method.startswith("epoch"):
        # A training shorter than that has ended by then.
        done = min(int(method.removeprefix("epoch")), case.training.epochs)
        return states.get(method, states["end"]), {"passes": _number(done * len(task.x))}
    name = f"{case.foretold or case.key}.seed{seed}"
    made = _second_order if method == "quadratic" else _forecast
    part = f"{name}.{method}.foretold"
    if part not in shared:
        shared[part] = units(part, lambda: made(case, task, seed, method))
    return _split(shared[part], task)


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _split(part: Mapping[str, Tensor], task: Task) -> tuple[State, dict[str, Tensor]]:
    """The parameters and the costs of a part."""
    cost = {key.removeprefix("cost:"): value for key, value in part.items() if key.startswith("cost:")}
    return {key: value.to(task.y.device) for key, value in part.items() if not key.startswith("cost:")}, cost


def _second_order(case: Case, task: Task, seed: int, method: str) -> dict[str, Tensor]:
    began, model = time.process_time(), SecondOrder(task.model)
    generator = torch.Generator().manual_seed(seed + 2)
    losses = train(model, task.x, task.y, settings=case.training, generator=generator, progress=lambda _: None)
    diverged = not losses[-1] <= losses[0]
    moved = {} if diverged else dict(model.moved())
    told = {"cost:diverged": _number(1.0)} if diverged else {}
    return moved | told | {"cost:passes": _number(math.nan), "cost:seconds": _number(time.process_time() - began)}


def _forecast(case: Case, task: Task, seed: int, method: str) -> dict[str, Tensor]:
    began, y = time.process_time(), task.y
    if method == "shuffled":
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed + 3))
        y = y[order.to(y.device)]
    size = float((y - outputs(task.model, task.whole({}), task.x)).square().mean())
    structure = None if method == "forecast" else _structure(method, size)
    with Passes().of(task.model, y.shape[1]) as passes:
        found = forecast(task.model, task.x, y, structure=structure, seed=seed)
    return {name: found.params[name] for name, p in task.model.named_parameters() if p.requires_grad} | {
        "cost:passes": _number(passes.count),
        "cost:seconds": _number(time.process_time() - began),
        "cost:steps": _number(len(found.steps)),
        "cost:adapts": _number(not isinstance(found.structure, Fixed)),
    }


def _structure(method: str, size: float) -> Structure:
    """The structure of a comparison; λ is in units of the mean square of what is to be learned, as in `forecast`."""
    if method == "fixed":
        return Fixed()
    strength = float(method.removeprefix("two_sided_")) if method.startswith("two_sided_") else 1.0
    kind = Left if method == "left" else TwoSided
    return kind(Quadratic(strength * size))
