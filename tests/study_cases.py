"""Small studies: random images instead of digits, settings that take a second or two, and one shared run of each."""

import base64
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from adaptive_tangents.commands.report import PAGES
from adaptive_tangents.datasets.images import Dataset
from adaptive_tangents.experiments.exact_solvers.run import ExactSolversConfig
from adaptive_tangents.experiments.feature_change.networks import TRAINING, Training
from adaptive_tangents.experiments.feature_change.run import FeatureChangeConfig
from adaptive_tangents.experiments.forecast.run import ForecastConfig
from adaptive_tangents.experiments.hard_targets.run import HardTargetsConfig
from adaptive_tangents.experiments.kernel_alignment.run import KernelAlignmentConfig
from adaptive_tangents.experiments.lora_ranks.run import LoraRanksConfig
from adaptive_tangents.experiments.lora_ranks.texts import sentences
from adaptive_tangents.experiments.low_rank_targets.run import LowRankConfig
from adaptive_tangents.experiments.penalties.run import PenaltiesConfig
from adaptive_tangents.experiments.registry import STUDIES
from adaptive_tangents.experiments.sample_complexity.run import SampleComplexityConfig
from adaptive_tangents.experiments.spectra.kernels import KernelSpectraConfig
from adaptive_tangents.experiments.spectra.weights import WeightSpectraConfig
from adaptive_tangents.experiments.training import SGD
from adaptive_tangents.forecasting import forecast
from adaptive_tangents.measures.explain import explain
from adaptive_tangents.reporting import drawing
from adaptive_tangents.runs.record import RunResult
from adaptive_tangents.runs.units import Tensors, Units

SMALL: dict[str, Any] = {
    "kernel-alignment": KernelAlignmentConfig(
        seeds=2, width=12, training=SGD(epochs=3), kernel_samples=40, path_nodes=4, near=0.5, strengths=(10.0,),
        linearization_points=5,
    ),
    "hard-targets": HardTargetsConfig(
        seeds=1, width=12, training=SGD(epochs=3), kernel_samples=24, path_nodes=2, temperatures=(10.0, 0.5, 0.01)
    ),
    "feature-change": FeatureChangeConfig(
        networks=("mlp", "cnn"), width=8, training={kind: Training("adam", 0.01, 1) for kind in TRAINING}, samples=24,
        held_out=12, path_nodes=2, ridges=(0.1,), strengths=(10.0, 1.0), least_width=8, draws=20,
    ),
    "kernel-spectra": KernelSpectraConfig(seeds=2, width=12, training=SGD(epochs=3), kernel_samples=24, path_nodes=3),
    "weight-spectra": WeightSpectraConfig(
        seeds=2, samples=10, depth=3, width=20, epochs=2, batch_size=5, learning_rate=0.002, strengths=(0.1,)
    ),
    "penalties": PenaltiesConfig(),
    "exact-solvers": ExactSolversConfig(samples=30, width=24),
    "low-rank-targets": LowRankConfig(
        sizes=(20, 40), beyond=(60,), peers=("Network",), targets=("product", "square"), seeds=2, inputs=8, other_inputs=(4,),
        units=20, test_samples=100, product=3.0, square=3.0, epochs=6, patience=3,
    ),
    "sample-complexity": SampleComplexityConfig(
        datasets=("toy",), seeds=2, sizes=(12, 30), width=8, depth=3, patience=1, max_epochs=4, validation=20, test=40,
        exact=12,
    ),
    "forecast": ForecastConfig(
        seeds=1, networks=("mlp", "cnn"), temperatures=(), ways=(("adam", 0.01),), widths=(), width=8, image_width=8,
        epochs=3, digits=32, samples=20, kernel_samples=16, path_nodes=2, directions=2, least_width=4, strengths=(1.0,),
    ),
    "lora-ranks": LoraRanksConfig(
        encoder="tiny", packages=("stats", "linalg"), seeds=2, train=8, test=6, tokens=6, budgets=(1, 2), epochs=1, batch=8,
        rates=(0.01,), told=4,
    ),
}  # fmt: skip


# A picture of one pixel.
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def made_up_digits(
    name: str, *, data_dir: str | None = None, classes: Sequence[int] | None = None, side: int = 9
) -> Dataset:
    """As ``load_digits``: 120 images to train on and 30 to test, classes in turn, ``side`` pixels wide."""
    generator = torch.Generator().manual_seed(7)
    classes = range(10) if classes is None else classes

    def some(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.tensor(list(classes)).repeat(n)[:n]
        faces = torch.randint(0, 256, (10, side, side), generator=torch.Generator().manual_seed(8))
        noise = torch.randint(0, 256, (n, side, side), generator=generator)
        return ((faces[labels] + noise) // 2).to(torch.uint8), labels

    return Dataset("made up", *some(120), *some(30), "random images")


def as_vectors(images: Tensor) -> Tensor:
    """As ``normalize_digits``, of images of any size."""
    flat = images.flatten(1) / 255
    return nn.functional.normalize(flat - flat.mean(1, keepdim=True))


def toy(
    name: str = "toy", *, data_dir: str | None = None, train: int = 160, shape: tuple[int, ...] = (6, 6)
) -> Dataset:
    """As ``load_images``: three classes, each with a bright row of its own under noise."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(train + 60) % 3
    images = torch.randint(0, 160, (train + 60, *shape), generator=generator, dtype=torch.uint8)
    for k, label in enumerate(labels.tolist()):
        images[k, ..., label, :] += 60
    return Dataset(name, images[:train], labels[:train], images[train:], labels[train:], "Made up.")


sentences_read_once = cache(sentences)


@contextmanager
def made_up_data() -> Iterator[None]:
    """Run all studies on small made-up images, with explanations that need few rounds."""
    with pytest.MonkeyPatch.context() as patch, explained_in_rounds(1):
        for module in ("kernel_alignment.setup", "feature_change.run", "spectra.weights", "exact_solvers.run"):
            patch.setattr(f"adaptive_tangents.experiments.{module}.load_digits", made_up_digits)
            patch.setattr(f"adaptive_tangents.experiments.{module}.normalize_digits", as_vectors, raising=False)
        patch.setattr("adaptive_tangents.experiments.sample_complexity.run.load_images", toy)
        patch.setattr("adaptive_tangents.experiments.forecast.problems.load_images", partial(toy, shape=(8, 8)))
        patch.setattr("adaptive_tangents.experiments.forecast.run.forecast", partial(forecast, steps=1))
        patch.setattr("adaptive_tangents.experiments.lora_ranks.texts.sentences", sentences_read_once)
        # With only a strong ridge toward the identity, the fit takes a few rounds.
        patch.setattr("adaptive_tangents.experiments.hard_targets.run.explain", partial(explain, strengths=(10.0,)))
        yield


class Remembered(Units):
    """Parts in memory; ``left`` says how many may still be made before an interruption."""

    def __init__(self, parts: dict[str, dict[str, Tensor]] | None = None, left: int = 10**6) -> None:
        self.parts = {} if parts is None else dict(parts)
        self.left = left
        self.made: list[str] = []

    def get(self, name: str) -> dict[str, Tensor] | None:
        return self.parts.get(name)

    def put(self, name: str, tensors: Tensors) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.made.append(name)
        self.parts[name] = dict(tensors)


@dataclass(frozen=True)
class Run:
    """A small run of a study: its result, the parts it kept, and the progress it reported."""

    result: RunResult
    parts: dict[str, dict[str, Tensor]]
    fractions: list[float]


def each(names: Iterable[str]) -> list[Any]:
    """Studies as parameters. All tests of one study run in one process (``--dist loadgroup``), which runs it once."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]


@cache
def small_run(name: str) -> Run:
    """The one small run of a study in this process, never changed by a test."""
    units, fractions = Remembered(), list[float]()
    with made_up_data():
        result = STUDIES[name].run(SMALL[name], units=units, progress=lambda _, fraction: fractions.append(fraction))
    return Run(result, units.parts, fractions)


def assert_same(one: RunResult, other: RunResult, *, rel: float = 0.0) -> None:
    """Assert equal results and arrays, except for seconds; numbers within ``rel``."""

    def compare(a: Any, b: Any, where: str) -> None:
        if "seconds" in where:
            return
        if isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                compare(a[key], b[key], f"{where}.{key}")
        elif isinstance(a, list | tuple):
            assert len(a) == len(b), where
            for k, (x, y) in enumerate(zip(a, b, strict=True)):
                compare(x, y, f"{where}[{k}]")
        elif isinstance(a, float):
            assert a == pytest.approx(b, rel=rel, abs=0.0, nan_ok=True), where
        else:
            assert a == b, where

    compare(one.results, other.results, "results")
    assert one.arrays.keys() == other.arrays.keys()
    for key, array in one.arrays.items():
        np.testing.assert_allclose(array, other.arrays[key], rtol=rel, atol=0.0, err_msg=key)


@contextmanager
def explained_in_rounds(rounds: int) -> Iterator[None]:
    """Limit two-sided transforms to a few rounds; otherwise they take most of a small study's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("adaptive_tangents.measures.few_directions"), "ROUNDS", rounds)
        yield


@contextmanager
def plain_figures(experiment: str, *, but: str = "") -> Iterator[None]:
    """Replace a page's figures, all but one, by empty ones, for tests that do not depend on figures."""
    page = PAGES[experiment]()
    figures = {name: draw if name == but else lambda *_: Figure(figsize=(1, 1)) for name, draw in page.figures.items()}
    plain: Callable[[], Any] = lambda: replace(page, figures=figures)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PAGES, experiment, plain)
        yield


@contextmanager
def of_few_pixels() -> Iterator[None]:
    """Figures as they are, in few pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "_style", lambda style=drawing._style: {**style(), "savefig.dpi": 50})
        yield


@contextmanager
def in_outline() -> Iterator[None]:
    """Figures as they are, as shapes alone: without pixels, and with axes where they stand before they are laid out."""
    save = Figure.savefig

    def saved(figure: Figure, file: Any, **options: Any) -> None:
        if options["format"] == "png":
            file.write(PIXEL)
        else:
            save(figure, file, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", saved)
        patch.setattr(Figure, "get_layout_engine", lambda figure: None)
        yield


def ended(function: Callable[[], object]) -> int:
    """The status of a forked child that calls a function."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
