"""For tests of what experiments do whatever their data: random images for digits, and parts of a run kept in memory."""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from adaptive_tangents.data import Dataset
from adaptive_tangents.reporting import report
from adaptive_tangents.reporting.drawing import grid
from adaptive_tangents.runs.units import Tensors, Units


def made_up_digits(name: str, *, data_dir: str | None = None, classes: Sequence[int] | None = None) -> Dataset:
    """As ``load_digits``: 120 images to train on and 30 to test, classes in turn."""
    generator = torch.Generator().manual_seed(7)
    classes = range(10) if classes is None else classes

    def some(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.tensor(list(classes)).repeat(n)[:n]
        faces = torch.randint(0, 256, (10, 28, 28), generator=torch.Generator().manual_seed(8))
        noise = torch.randint(0, 256, (n, 28, 28), generator=generator)
        return ((faces[labels] + noise) // 2).to(torch.uint8), labels

    return Dataset("made up", *some(120), *some(30), "random images")


@contextmanager
def explained_in_rounds(rounds: int) -> Iterator[None]:
    """Two-sided transforms after a few rounds of least squares, most of the time of a small experiment otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("adaptive_tangents.explain"), "_ROUNDS", rounds)
        yield


@contextmanager
def plain_figures(experiment: str, *, but: str) -> Iterator[None]:
    """A page whose figures but one are empty axes: what commands do with a page is no matter of what it shows."""
    page = report._PAGES[experiment]
    figures = {name: draw if name == but else lambda *_: grid(1, 1, 1.0)[0] for name, draw in page.figures.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(report._PAGES, experiment, replace(page, figures=figures))
        yield


class Remembered(Units):
    """Parts in memory; ``left`` says how many may still be made before an interruption."""

    def __init__(self, left: int = 10**6) -> None:
        self.parts: dict[str, dict[str, torch.Tensor]] = {}
        self.left = left

    def get(self, name: str) -> dict[str, torch.Tensor] | None:
        return self.parts.get(name)

    def put(self, name: str, tensors: Tensors) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.parts[name] = dict(tensors)
