"""`inspect`: measure what training did to a user's network between two checkpoints, and make its page. Reads no files."""

from adaptive_tangents.inspection.problem import InspectConfig
from adaptive_tangents.inspection.run import run

__all__ = ["InspectConfig", "run"]
