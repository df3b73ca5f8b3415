"""A network becomes tangent features: its calls recorded, its graph read, its blocks made and checked."""

from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.capture.path_average import AverageFeatures, average_features

__all__ = [
    "AverageFeatures",
    "average_features",
    "tangent_features",
]
