"""The adaptive model as a module: f(x; θ₀) + φ(x)Mᵀθ, for any optimizer.

``TangentModule`` holds θ and the factors of M as parameters, and exchanges them with the fits of ``solvers``. Forward mode
and lookups that torch lacks are in ``forward_mode``; what each structure trains is in ``trained_transforms``.
"""

from adaptive_tangents.nn.tangent_module import TangentModule

__all__ = [
    "TangentModule",
]
