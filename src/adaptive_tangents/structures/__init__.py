"""Structures 𝓜: which transforms there are, the best one for given coefficients, and the penalty Ω̃ it induces."""

from adaptive_tangents.structures.base import BlockSolution, BlockStructure, Fixed, Full, Solution, Structure
from adaptive_tangents.structures.grouped import Columns, Diagonal, LayerScale, Rows
from adaptive_tangents.structures.mixed import Mixed
from adaptive_tangents.structures.modes import Modes
from adaptive_tangents.structures.spectral import Left, Right, TwoSided

__all__ = [
    "BlockSolution",
    "BlockStructure",
    "Columns",
    "Diagonal",
    "Fixed",
    "Full",
    "LayerScale",
    "Left",
    "Mixed",
    "Modes",
    "Right",
    "Rows",
    "Solution",
    "Structure",
    "TwoSided",
]
