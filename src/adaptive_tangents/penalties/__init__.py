"""Penalties ω on a singular value of a transform, and the penalties ω̃ that they induce on coefficients."""

from adaptive_tangents.penalties.closed_forms import Absolute, LogSquared, NoAdaptation, Power, Quadratic
from adaptive_tangents.penalties.penalty import Composition, Induced, Penalty, shares

__all__ = [
    "Absolute",
    "Composition",
    "Induced",
    "LogSquared",
    "NoAdaptation",
    "Penalty",
    "Power",
    "Quadratic",
    "shares",
]
