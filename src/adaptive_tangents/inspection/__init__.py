"""`inspect`: measure what training did to a user's network between two checkpoints, and make its page."""

from adaptive_tangents.inspection.api import inspect
from adaptive_tangents.inspection.comparison import Comparison, compare
from adaptive_tangents.inspection.kept import Kept, KeptInFolder
from adaptive_tangents.inspection.plan import Plan
from adaptive_tangents.inspection.problem import InspectConfig
from adaptive_tangents.inspection.results import Inspection, load_inspection
from adaptive_tangents.inspection.rows import Rows
from adaptive_tangents.inspection.run import run

__all__ = [
    "Comparison",
    "InspectConfig",
    "Inspection",
    "Kept",
    "KeptInFolder",
    "Plan",
    "Rows",
    "compare",
    "inspect",
    "load_inspection",
    "run",
]
