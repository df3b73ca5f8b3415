"""Tangent features φ(x) = ∂f/∂θ: blocks Σ_t δ_t h_tᵀ, their transforms, and their contraction to a kernel."""

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
    "transform_matrices",
]
