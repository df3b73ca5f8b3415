"""What every experiment needs around its measurements: the clock, versions, and the flat list of its numbers."""

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

Progress = Callable[[str, float], None]


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
