"""What every experiment needs around its measurements: what was asked, what is kept, the clock, and its results' form."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

Progress = Callable[[str, float], None]
Size = Literal["quick", "standard", "full"]
Tensors = Mapping[str, Tensor]
Verdict = Literal["holds", "holds in part", "does not hold"]


@dataclass(frozen=True)
class Asked:
    """What the command line asks of any experiment; None leaves a number to it. Each takes what it has a use for."""

    size: Size = "standard"
    data: str = "mnist5k"
    data_dir: str | None = None
    seed: int = 0
    seeds: int | None = None
    samples: int | None = None
    epochs: int | None = None


@dataclass(frozen=True)
class ExperimentResult:
    """Everything measured: ``results`` is what results.json holds, ``arrays`` what the figures need."""

    results: dict[str, Any]
    arrays: dict[str, np.ndarray]


class Units:
    """Parts of a run, each made once: here for this run only; one that stores them lets an interrupted run go on.

    A part is tensors that follow from the settings and the part's name alone, whatever was made before it.
    """

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The part, if it was made before."""
        return None

    def put(self, name: str, tensors: Tensors) -> None:
        """Keep a part."""

    def __call__(self, name: str, make: Callable[[], Tensors]) -> dict[str, Tensor]:
        """The part, made now if it was not before."""
        found = self.get(name)
        if found is None:
            found = dict(make())
            self.put(name, found)
        return found


class Clock:
    """Wall time of each stage, and progress as a share of the work expected."""

    def __init__(self, progress: Progress, total: float) -> None:
        self.progress, self.total, self.done = progress, total, 0.0
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, work: float) -> Iterator[Callable[[float], None]]:
        """Time one stage of so much work; gives a function that hears what fraction of it is done."""
        began = time.perf_counter()
        self.progress(name, self.done / self.total)
        yield lambda fraction: self.progress(name, (self.done + work * fraction) / self.total)
        self.done += work
        self.seconds[name] = time.perf_counter() - began


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    names = ("adaptive-tangents", "torch", "numpy", "scipy")
    return {name.replace("-", "_"): metadata.version(name) for name in names} | {"python": platform.python_version()}


def settings(config: Any) -> dict[str, Any]:
    """A config's fields as plain values, without the folder of the data: where files lie changes no number."""
    plain = asdict(config)
    plain.pop("data_dir", None)
    return dict(json.loads(json.dumps(plain)))


def heading(name: str, config: Mapping[str, Any], clock: Clock, device: str = "cpu") -> dict[str, Any]:
    """What results.json says of every run: settings, software, machine, seconds."""
    return {
        "experiment": name,
        "config": dict(config),
        "versions": versions(),
        "device": device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "wall_seconds": clock.seconds | {"total": time.perf_counter() - clock.started},
    }


def claim(
    text: str,
    verdict: bool | Verdict,
    *,
    refuted_by: str,
    evidence: str,
    published: str | None = None,
    why: str = "",
) -> dict[str, Any]:
    """A claim in words, what would refute it, what was published, what was measured, and whether it holds.

    >>> claim("1 < 2", 1 < 2, refuted_by="1 not below 2", evidence="1, 2")["verdict"]
    'holds'
    """
    if isinstance(verdict, bool):
        verdict = "holds" if verdict else "does not hold"
    return {
        "claim": text,
        "holds": verdict == "holds",
        "verdict": verdict,
        "evidence": evidence,
        "refuted_by": refuted_by,
        "published": published,
        "why": why,
    }


def spread(values: "list[float] | np.ndarray", form: str = ".2f") -> str:
    """Mean and standard deviation over seeds in words; one value alone is itself.

    >>> spread([0.1, 0.2, 0.3]), spread([0.1234])
    ('0.20 ± 0.10', '0.12')
    """
    values = np.asarray(values, dtype=float)
    mean = f"{values.mean():{form}}"
    text = mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):{form}}"
    return text.replace("-", "−")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    """Every number of a nested mapping under its path, joined by dots.

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


def rank_correlation(a: "list[float] | np.ndarray", b: "list[float] | np.ndarray") -> float:
    """Spearman's correlation, ties sharing their mean rank; NaN where one side is constant or fewer than two are given.

    >>> round(rank_correlation([1.0, 2.0, 3.0], [10.0, 1000.0, 20.0]), 6)
    0.5
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
