"""`inspect`: measure what training did to a user's network between two checkpoints, and make its page."""

from adaptive_tangents.inspection.kept import Kept, KeptInFolder
from adaptive_tangents.inspection.plan import Plan
from adaptive_tangents.inspection.problem import InspectConfig
from adaptive_tangents.inspection.run import run

__all__ = ["InspectConfig", "Kept", "KeptInFolder", "Plan", "run"]
