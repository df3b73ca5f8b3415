"""`inspect`: what training did to a user's own network, measured between two checkpoints, and its page. No file is read."""

from adaptive_tangents.inspection.problem import InspectConfig
from adaptive_tangents.inspection.run import run

__all__ = ["InspectConfig", "run"]
