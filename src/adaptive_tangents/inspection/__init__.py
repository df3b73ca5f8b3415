"""`inspect`: what training did to a user's own network, measured between two checkpoints. No file is read or written."""

from adaptive_tangents.inspection.run import InspectConfig, InspectResult, run

__all__ = ["InspectConfig", "InspectResult", "run"]
