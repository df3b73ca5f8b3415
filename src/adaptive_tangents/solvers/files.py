"""Fits on disk: which classes they are made of, besides those of structures and transforms."""

from pathlib import Path
from typing import Any

from adaptive_tangents.capture.path_average import AverageFeatures
from adaptive_tangents.features.blocks import Block, Slot
from adaptive_tangents.features.summands import Dense, Flipped, Lookup, Outer, Shared, Weighted
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.sketching.sketches import Sketch, SketchedFeatures
from adaptive_tangents.structures.described import read_with_structure, write_with_structure

_FEATURES = (
    TangentFeatures, SketchedFeatures, AverageFeatures, Sketch, Block, Slot, Outer, Lookup, Flipped, Dense, Shared, Weighted,
)  # fmt: skip


def write_fit(path: Path, found: Any, kinds: tuple[type, ...], *, without_structure: bool) -> None:
    """Write a fit, an instance of one of ``kinds``; raises TangentError where that is not possible."""
    write_with_structure(path, "fit", found, (*kinds, *_FEATURES), without_structure=without_structure)


def read_fit(path: Path, kinds: tuple[type, ...]) -> Any:
    """The fit of a file; raises TangentError if it is none."""
    return read_with_structure("load_fit", path, "fit", kinds, _FEATURES, "fit.save")
