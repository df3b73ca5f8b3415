"""Tangent features φ(x) = ∂f/∂θ, block by block as Σ_t δ_t h_tᵀ.

It has the features and their blocks, the transforms that adapt them, and the contraction of features to kernels. It
imports from linalg and runtime.
"""

from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.features.transforms import (
    Entrywise,
    Joint,
    LowRank,
    Matrix,
    Modal,
    Scaled,
    Sides,
    Transform,
    Update,
    transform_matrices,
)

__all__ = [
    "Block",
    "Entrywise",
    "Joint",
    "LowRank",
    "Matrix",
    "Modal",
    "Scaled",
    "Sides",
    "TangentFeatures",
    "Transform",
    "Update",
    "transform_matrices",
]
