"""The adaptive model as a module: f(x; θ₀) + φ(x)Mᵀθ, for any optimizer."""

from adaptive_tangents.nn.tangent_module import TangentModule

__all__ = [
    "TangentModule",
]
