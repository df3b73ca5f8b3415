"""Sketches: unbiased random projections of features that are too large to hold, with standard errors.

It makes sketches and sketched kernels, and keeps sketched features on disk. It imports from capture, features, linalg and
runtime.
"""

from adaptive_tangents.sketching.jackknife import SketchedMeasure
from adaptive_tangents.sketching.sketch_files import append_sketch, load_sketch, save_sketch
from adaptive_tangents.sketching.sketches import (
    Sketch,
    SketchedFeatures,
    SketchedKernel,
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
