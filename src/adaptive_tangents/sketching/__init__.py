"""Sketches: features too large to hold, projected without bias, with standard errors."""

from adaptive_tangents.sketching.sketch_files import append_sketch, load_sketch, save_sketch
from adaptive_tangents.sketching.sketches import (
    Sketch,
    SketchedFeatures,
    SketchedKernel,
    SketchedMeasure,
    sketch_features,
)

__all__ = [
    "Sketch",
    "SketchedFeatures",
    "SketchedKernel",
    "SketchedMeasure",
    "append_sketch",
    "load_sketch",
    "save_sketch",
    "sketch_features",
]
