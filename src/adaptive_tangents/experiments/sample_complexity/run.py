"""How many samples do adaptive tangent features need, and what did the published curves of the error over samples measure?

A network, its linearization at the start (fixed features) and the linearization with features Mφ (adaptive) are trained
alike on n samples per epoch, by two protocols: a fresh random subset of size n each epoch, as published, where n counts
samples per epoch out of the whole training set; or the same subset of n in every epoch. The reported epoch is the best on
the test set, as published, or the best on a validation split, both from one run. Exact fits use the same subset.
Source: the figure of the first versions of LeJeune & Alemohammad (arXiv:2308.15478v1) and the code published with it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.datasets.image_files import find_cifar10
from adaptive_tangents.datasets.images import load_images
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.sample_complexity import NAME
from adaptive_tangents.experiments.sample_complexity.claims import FRESH, PROTOCOLS, SELECTIONS, claims, published
from adaptive_tangents.experiments.sample_complexity.training import (
    MODELS,
    Course,
    Model,
    error,
    model,
    network,
    random,
    recipe,
    stopped,
    train,
)
from adaptive_tangents.experiments.study import Asked
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.penalties.closed_forms import Quadratic
from adaptive_tangents.runs.record import Clock, RunResult, flatten, heading, settings
from adaptive_tangents.runs.units import Units
from adaptive_tangents.runtime.progress import Progress, silent
from adaptive_tangents.solvers.fit import fit
from adaptive_tangents.structures.base import Fixed, Structure
from adaptive_tangents.structures.spectral import TwoSided

FOCUS = 1000  # the size that claims are about; measured first
Loss = Literal["squared", "cross-entropy"]
LOSSES: tuple[Loss, ...] = ("squared", "cross-entropy")
_AT_LEAST = 40  # epochs, regardless of the limit on steps
PUBLISHED_SIZES = (125, 250, 500, 1000, 2000, 4000, 8000, 16000, 32000)
_CONVOLUTIONAL_SIZES = (1000,)  # for --full: a step of the convolutional models takes ten times as long


@dataclass(frozen=True)
class SampleComplexityConfig:
    """Data sets and sizes. Sizes that a data set cannot fill are left out; ``everything`` adds all its samples.

    ``convolutional_sizes``, if given, replace the sizes, including all samples, for data sets that a convolutional network
    learns. ``patience``, ``max_epochs`` and ``max_steps`` end a training run, the last not before 40 epochs. ``validation``
    and ``test`` limit the samples held out and tested on. Exact fits use up to ``exact`` samples, with ``strengths`` λ of
    both penalties and the ridge ρ of each loss.
    """

    datasets: tuple[str, ...] = ("mnist5k",)
    data_dir: str | None = None
    seed: int = 0
    seeds: int = 1
    sizes: tuple[int, ...] = (250, 1000)
    convolutional_sizes: tuple[int, ...] = ()
    everything: bool = False
    models: tuple[Model, ...] = MODELS
    width: int = 128
    depth: int = 5
    patience: int = 20
    max_epochs: int = 1000
    max_steps: int = 10_000
    validation: int = 1000
    test: int = 2000
    exact: int = 250
    strengths: tuple[float, ...] = (1.0, 10.0)
    squared_ridge: float = 0.1
    cross_entropy_ridge: float = 0.1

    def __post_init__(self) -> None:
        counts = (self.seeds, self.width, self.depth, self.max_epochs, self.max_steps, self.validation, self.test)
        falls = any(a >= b for sizes in (self.sizes, self.convolutional_sizes) for a, b in pairwise(sizes))
        if min(*counts, *self.sizes, *self.convolutional_sizes) < 1 or not self.sizes or falls:
            raise TangentError(f"{NAME}: counts must be positive and sizes increasing, got {self}")
        if self.patience < 0 or not self.datasets or not self.models or set(self.models) - set(MODELS):
            raise TangentError(
                f"{NAME}: needs patience of 0 or more, a data set, and some of the models {', '.join(MODELS)}; got {self}"
            )

    def asked(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The requested sizes for images of this shape; three dimensions mean color."""
        return self.convolutional_sizes if self.convolutional_sizes and len(shape) == 3 else self.sizes

    def epochs(self, n: int, batch: int) -> int:
        """The most epochs of n samples: fewer for large n, to limit the number of steps."""
        return min(self.max_epochs, max(_AT_LEAST, self.max_steps // max(n // batch, 1)))


def configured(asked: Asked) -> SampleComplexityConfig:
    """The settings for what was asked; ``--full`` adds CIFAR-10 if its files are in the data folder."""
    full = asked.size == "full"
    beside = full and asked.data_dir is not None and find_cifar10(Path(asked.data_dir)) is not None
    datasets = (asked.data, "cifar10") if beside and asked.data != "cifar10" else (asked.data,)
    config = SampleComplexityConfig(datasets=datasets, data_dir=asked.data_dir, seed=asked.seed, seeds=asked.seeds or 1)
    if full:
        config = replace(
            config, sizes=PUBLISHED_SIZES, convolutional_sizes=_CONVOLUTIONAL_SIZES, everything=True, exact=500
        )
    if asked.size == "quick":
        config = replace(config, sizes=(50, 200), max_epochs=15, test=500, validation=200, exact=50)
    if asked.samples is not None:
        config = replace(config, sizes=(asked.samples,), convolutional_sizes=(), everything=False)
    return config if asked.epochs is None else replace(config, max_epochs=asked.epochs)


@dataclass(frozen=True)
class Split:
    """A data set for one seed: training samples in random order, validation and test samples, and the initial network."""

    pool: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    shape: tuple[int, ...]
    classes: int
    described: dict[str, Any]

    def network(self, config: SampleComplexityConfig, seed: int) -> nn.Sequential:
        """The initial network, the same for every model and size."""
        made = network(
            self.shape, self.classes, width=config.width, depth=config.depth, generator=random(seed, "network")
        )
        return made.to(self.pool[0].device)


def split(config: SampleComplexityConfig, dataset: str, seed: int, device: str = "cpu") -> Split:
    """Load and divide a data set: an eighth of the training images, at most ``validation``, is held out.

    Raises TangentError if the data are not available, or hold fewer than two training images or one of another class.
    """
    images = load_images(dataset, data_dir=config.data_dir)
    held_out = min(config.validation, len(images.train_labels) // 8)
    order = torch.randperm(len(images.train_labels), generator=random(seed, dataset, "split"))
    tested = torch.randperm(len(images.test_labels), generator=random(seed, dataset, "test"))[: config.test]
    if held_out < 1:
        raise TangentError(f"{NAME}: {images.name} holds {len(order)} training images; 8 or more are needed")

    def part(x: Tensor, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return (x[index].float() / 255).to(device), y[index].to(device)

    described = {
        "name": images.name, "source": images.source, "train": len(order), "pool": len(order) - held_out,
        "validation": held_out, "test": len(tested), "of_test": len(images.test_labels),
    }  # fmt: skip
    return Split(
        part(images.train_images, images.train_labels, order[held_out:]),
        part(images.train_images, images.train_labels, order[:held_out]),
        part(images.test_images, images.test_labels, tested),
        tuple(images.train_images.shape[1:]),
        int(max(images.train_labels.max(), images.test_labels.max())) + 1,
        described,
    )


def run(
    config: SampleComplexityConfig,
    *,
    device: str = "cpu",
    progress: Progress = silent,
    units: Units | None = None,
) -> RunResult:
    """Train every model on every number of samples by both protocols, make the exact fits, and compare with the published.

    Each training run and each fit is a unit. Raises TangentError if ``split`` does, if the data hold fewer samples than the
    smallest size, or if training diverges.

    >>> small = SampleComplexityConfig(sizes=(20,), width=4, depth=2, max_epochs=1, test=50, exact=0, models=("network",))
    >>> list(run(small).results["errors"]["mnist5k"])
    ['fresh subset each epoch', 'fixed subset']
    """
    units = units or Units()
    splits = {name: split(config, name, config.seed, device) for name in config.datasets}
    sizes = {name: _sizes(config, part) for name, part in splits.items()}
    clock = Clock(progress, sum(_work(config, n) for held in sizes.values() for n in held) * config.seeds)
    errors: dict[str, Any] = {}
    runs: dict[str, Any] = {}
    exact: dict[str, Any] = {}
    seconds = 0.0
    for name in config.datasets:
        courses: dict[tuple[str, Model, int], list[Course]] = {}
        fits: dict[tuple[Loss, str, int], list[dict[str, float]]] = {}
        for k in range(config.seeds):
            seed = config.seed + k
            here = splits[name] if k == 0 else split(config, name, seed, device)
            for n in sorted(sizes[name], key=lambda n: abs(math.log(n / FOCUS))):
                with clock.stage(f"{name}, seed {seed}, n = {n}", _work(config, n)) as heard:
                    for key, course in _trained(config, name, here, seed, n, units, heard).items():
                        courses.setdefault((*key, n), []).append(course)
                    for (loss, strength), found in _fitted(config, name, here, seed, n, units).items():
                        fits.setdefault((loss, strength, n), []).append(found)
        most = {n: config.epochs(n, recipe(splits[name].shape).batch(n)) for n in sizes[name]}
        errors[name], runs[name] = _summary(config, most, courses)
        exact[name] = _exact_summary(sizes[name], fits)
        seconds += sum(course.seconds for each in courses.values() for course in each)
        seconds += sum(found["seconds"] for each in fits.values() for found in each)
    described = {name: part.described | {"sizes": sizes[name]} for name, part in splits.items()}
    results: dict[str, Any] = {
        **heading(NAME, settings(config), clock, device),
        "data": described,
        "errors": errors,
        "runs": runs,
        "exact": exact,
        "left_out": {name: _left_out(config, part, sizes[name], described[name]) for name, part in splits.items()},
        "published": {name: published(name) for name in config.datasets},
        "claims": claims(errors, runs, exact, described),
        "metrics": flatten({"errors": errors, "exact": exact}),
    }
    # After a resumption the clock covers only the last part of the run.
    results["wall_seconds"]["total"] = max(results["wall_seconds"]["total"], seconds)
    return RunResult(results, {f"sizes.{name}": np.array(sizes[name]) for name in config.datasets})


def _sizes(config: SampleComplexityConfig, part: Split) -> list[int]:
    """The sizes that a data set has enough samples for."""
    held, asked = len(part.pool[1]), config.asked(part.shape)
    found = [n for n in asked if n <= held]
    if not found:
        raise TangentError(
            f"{NAME}: {part.described['name']} leaves {held} samples to train on, fewer than {asked[0]}; use smaller "
            "sizes or more data"
        )
    return [*found, held] if config.everything and asked == config.sizes and held > found[-1] else found


def _work(config: SampleComplexityConfig, n: int) -> float:
    """Expected work for one size: tests, steps and exact fits."""
    return len(config.models) * (1500 + n) + (30 * n if n <= config.exact else 0)


def _trained(
    config: SampleComplexityConfig, name: str, here: Split, seed: int, n: int, units: Units, heard: Any
) -> dict[tuple[str, Model], Course]:
    """The training runs for one size: both protocols, every model."""
    found: dict[tuple[str, Model], Course] = {}
    total = len(PROTOCOLS) * len(config.models)
    how = recipe(here.shape)
    most = config.epochs(n, how.batch(n))
    for protocol in PROTOCOLS:
        for kind in config.models:
            done = len(found)

            def make(protocol: str = protocol, kind: Model = kind, done: int = done) -> dict[str, Tensor]:
                course = train(
                    model(kind, here.network(config, seed)), here.pool, here.test, here.validation,
                    n=n, fresh=protocol == FRESH, recipe=how, patience=config.patience, max_epochs=most,
                    generator=random(seed, name, protocol, n),
                    progress=lambda fraction: heard((done + fraction) / total),
                )  # fmt: skip
                return {
                    "test": course.test, "validation": course.validation, "loss": course.loss,
                    "distinct": torch.tensor(course.distinct),
                    "seconds": torch.tensor(course.seconds),
                }  # fmt: skip

            key = f"{name}.{protocol}.{kind}.n{n}.seed{seed}".replace(":", "-").replace(" ", "-")
            kept = units(key, make)
            found[protocol, kind] = Course(
                kept["test"], kept["validation"], kept["loss"], int(kept["distinct"]), float(kept["seconds"])
            )
    return found


def _fitted(
    config: SampleComplexityConfig, name: str, here: Split, seed: int, n: int, units: Units
) -> dict[tuple[Loss, str], dict[str, float]]:
    """The exact fits to one subset, for each loss: the fixed kernel, and TwoSided at every strength."""
    if n > config.exact:
        return {}
    structures: dict[str, Structure] = {"fixed": Fixed()}
    structures |= {f"λ = {strength:g}": TwoSided(Quadratic(strength)) for strength in config.strengths}
    features: list[TangentFeatures] = []
    found: dict[tuple[Loss, str], dict[str, float]] = {}
    start = here.network(config, seed)
    for loss in LOSSES:
        for k, (word, structure) in enumerate(structures.items()):

            def make(loss: Loss = loss, structure: Structure = structure) -> dict[str, Tensor]:
                if not features:
                    held = (here.pool[0][:n], here.validation[0], here.test[0])
                    features.extend(tangent_features(start, x) for x in held)
                return _exact_fit(config, here, start, features, loss, structure)

            key = f"{name}.exact.{loss}.{k}.n{n}.seed{seed}".replace(":", "-")
            found[loss, word] = {what: float(value) for what, value in units(key, make).items()}
    return found


def _exact_fit(
    config: SampleComplexityConfig,
    here: Split,
    start: nn.Module,
    features: list[TangentFeatures],
    loss: Loss,
    structure: Structure,
) -> dict[str, Tensor]:
    """One fit: validation and test errors, and certificates."""
    feats, *held_out = features
    n = feats.n
    x, labels = here.pool[0][:n], here.pool[1][:n]
    with torch.no_grad():
        initial = start(x)
    if loss == "squared":
        target = nn.functional.one_hot(labels, here.classes).to(initial) - initial
        found = fit(feats, target, structure=structure, ridge=config.squared_ridge, tol=1e-6)
    else:
        ridge = config.cross_entropy_ridge
        found = fit(feats, labels, structure=structure, loss=loss, offset=initial, ridge=ridge, tol=1e-6)
    made = {"stationarity": found.stationarity, "rounds": found.rounds, "converged": found.converged}
    made["seconds"] = found.history[-1].seconds
    for which, other, (inputs, wanted) in zip(
        ("validation", "test"), held_out, (here.validation, here.test), strict=True
    ):
        change = found.predict(other)
        with torch.no_grad():
            outputs = start(inputs) + change.to(initial)
        made[which] = error(nn.Identity(), outputs, wanted)
    return {key: torch.tensor(float(value), dtype=torch.float64) for key, value in made.items()}


def _summary(
    config: SampleComplexityConfig, most: Mapping[int, int], courses: Mapping[tuple[str, Model, int], list[Course]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Errors per seed by protocol, selection, model and size; and the runs' lengths and numbers of samples seen."""
    errors: dict[str, Any] = {}
    runs: dict[str, Any] = {}
    for protocol in PROTOCOLS:
        errors[protocol] = {selection: {kind: {} for kind in config.models} for selection in SELECTIONS}
        runs[protocol] = {kind: {} for kind in config.models}
        for kind in config.models:
            for n in most:
                made = courses[protocol, kind, n]
                chosen = {
                    selection: [stopped(getattr(course, curve), config.patience) for course in made]
                    for selection, curve in SELECTIONS.items()
                }
                for selection, epochs in chosen.items():
                    errors[protocol][selection][kind][str(n)] = [
                        float(course.test[epoch]) for course, epoch in zip(made, epochs, strict=True)
                    ]
                runs[protocol][kind][str(n)] = {
                    "epochs": [len(course.test) for course in made],
                    "best_epoch": [epoch + 1 for epoch in next(iter(chosen.values()))],
                    "capped": sum(len(course.test) == most[n] for course in made),
                    "distinct": [course.distinct for course in made],
                    "loss": [float(course.loss[-1]) for course in made],
                }
    return errors, runs


def _exact_summary(sizes: list[int], fits: Mapping[tuple[Loss, str, int], list[dict[str, float]]]) -> dict[str, Any]:
    """Test errors per seed of the exact fits by loss and size: fixed, every strength, the best in validation."""
    made: dict[str, Any] = {}
    for loss in LOSSES:
        words = list(dict.fromkeys(word for l, word, _ in fits if l == loss))
        for n in sizes:
            held = {word: fits[loss, word, n] for word in words if (loss, word, n) in fits}
            if not held:
                continue
            of_seeds = {word: [found["test"] for found in each] for word, each in held.items()}
            adaptive = [word for word in held if word != "fixed"]
            best = []
            for k in range(len(held["fixed"])) if adaptive else ():
                word = min(adaptive, key=lambda word: held[word][k]["validation"])
                best.append({"strength": word, "test": held[word][k]["test"]})
            made.setdefault(loss, {})[str(n)] = {
                "errors": of_seeds,
                "adaptive": [found["test"] for found in best],
                "chosen": [found["strength"] for found in best],
                "converged": all(found["converged"] for each in held.values() for found in each),
                "stationarity": max(found["stationarity"] for each in held.values() for found in each),
            }
    return made


def _left_out(config: SampleComplexityConfig, part: Split, sizes: list[int], described: Mapping[str, Any]) -> list[str]:
    """Sentences on what was not measured, and why."""
    said, asked, classes = [], config.asked(part.shape), part.classes
    if asked != config.sizes:
        other = [n for n in config.sizes if n not in asked]
        said.append(
            f"n = {', '.join(f'{n:,}' for n in other)}: convolutional networks were trained only for n = "
            f"{', '.join(f'{n:,}' for n in asked)}, because their steps take ten times as long."
        )
    beyond = [n for n in asked if n > described["pool"]]
    if beyond:
        said.append(
            f"n = {', '.join(f'{n:,}' for n in beyond)}: {described['name']} has only {described['pool']:,} training "
            "samples."
        )
    large = [n for n in sizes if n > config.exact]
    if large and config.exact:
        unknowns = large[0] * classes
        said.append(
            f"Exact fits beyond n = {config.exact:,}: with {classes} outputs, n = {large[0]:,} needs kernels of {unknowns:,} "
            f"× {unknowns:,}, {8 * unknowns**2 / 1e9:.2g} GB each, made and factorized many times."
        )
    elif large:
        said.append("Exact fits were not requested.")
    return said
