"""Structures 𝓜: which transforms of the features are allowed, the best one for given coefficients, and the penalty Ω̃.

``Fixed`` allows none, ``Full`` any matrix. ``Left``, ``Right`` and ``TwoSided`` transform sides of a block; ``LayerScale``,
``Rows``, ``Columns`` and ``Diagonal`` scale groups of entries. ``Modes`` is for convolutions; ``Mixed`` chooses by name.
``Structure`` and ``BlockStructure`` are the base classes for your own.
"""

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
