"""From a network to its tangent features, at one set of parameters or averaged along a path.

It records the calls of layers, reads the autograd graph, makes the blocks and checks them against autograd. It imports
from features, linalg and runtime.
"""

from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.capture.path_average import AverageFeatures, average_features

__all__ = [
    "AverageFeatures",
    "average_features",
    "tangent_features",
]
