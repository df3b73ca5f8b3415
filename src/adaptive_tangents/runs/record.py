"""The record of a run: progress, seconds per stage, settings, software versions, and the form of its results."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch

from adaptive_tangents._version import __version__
from adaptive_tangents.runtime.progress import Progress


@dataclass(frozen=True, eq=False)
class RunResult:
    """Everything measured: ``results`` goes into results.json, ``arrays`` is what the figures need."""

    results: dict[str, Any]
    arrays: dict[str, np.ndarray]


class Clock:
    """Wall time of each stage, and progress as a fraction of the expected work."""

    def __init__(self, progress: Progress, total: float) -> None:
        self.progress, self.total, self.done = progress, total, 0.0
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, work: float) -> Iterator[Callable[[float], None]]:
        """Time one stage of this much work; yields a function to call with the fraction done."""
        began = time.perf_counter()
        self.progress(name, self.done / self.total)
        yield lambda fraction: self.progress(name, (self.done + work * fraction) / self.total)
        self.done += work
        self.progress(name, self.done / self.total)
        self.seconds[name] = time.perf_counter() - began


def versions() -> dict[str, str]:
    """The versions of the software that made the numbers."""
    others = {name: metadata.version(name) for name in ("torch", "numpy", "scipy")}
    return {"adaptive_tangents": __version__} | others | {"python": platform.python_version()}


def settings(config: Any) -> dict[str, Any]:
    """A config's fields as plain values, without the data folder, which changes no number."""
    plain = asdict(config)
    plain.pop("data_dir", None)
    return dict(json.loads(json.dumps(plain)))


def heading(name: str, config: Mapping[str, Any], clock: Clock, device: str = "cpu") -> dict[str, Any]:
    """What results.json records for every run: settings, software, machine, seconds."""
    return {
        "experiment": name,
        "config": dict(config),
        "versions": versions(),
        "device": device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "wall_seconds": clock.seconds | {"total": time.perf_counter() - clock.started},
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    """Every number of a nested mapping, by its path joined with dots.

    >>> flatten({"sign": {"alignment": {"average": 0.3}, "reason": "words are left out"}})
    {'sign.alignment.average': 0.3}
    """
    flat: dict[str, float | None] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            flat[f"{prefix}{key}"] = float(value)
    return flat
