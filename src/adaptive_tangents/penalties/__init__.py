"""Penalties ω on a singular value of a transform, and the penalties ω̃ they induce on coefficients.

``Quadratic``, ``Absolute``, ``Power``, ``LogSquared`` and ``NoAdaptation`` have closed forms; ``Penalty`` takes any function.
``Composition`` (ω₁ ⊕ ω₂) is what several transforms acting on one value pay together. ``penalty.induced()`` gives ω̃, and
``shares`` says how penalties on several sides divide one value among them.
"""

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
