"""Structures in words that a reader of a forecast knows."""

from adaptive_tangents.runtime.told import few_digits
from adaptive_tangents.structures.base import Fixed, Structure


def structure_words(structure: Structure | str) -> str:
    """What a structure is called: kernel regression if nothing adapts, else its own name with few digits.

    >>> structure_words(Fixed()), structure_words("TwoSided(left=Quadratic(strength=0.012345678), right=None)")
    ('kernel regression', 'TwoSided(Quadratic(strength=0.01235))')
    """
    if str(structure) == str(Fixed()):
        return "kernel regression"
    return few_digits(structure).replace("left=", "").replace(", right=None", "")
