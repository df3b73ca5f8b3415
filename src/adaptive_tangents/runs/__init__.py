"""What a run keeps: results and arrays in a folder, parts as checkpoints, and the seconds of each stage.

This wing also runs several studies in parallel, and summarizes many.
"""

from adaptive_tangents.runs.parallel import side_by_side
from adaptive_tangents.runs.record import Clock, RunResult
from adaptive_tangents.runs.results import load_results, write_results
from adaptive_tangents.runs.summary import collect
from adaptive_tangents.runs.units import StoredUnits, Units

__all__ = [
    "Clock",
    "RunResult",
    "StoredUnits",
    "Units",
    "collect",
    "load_results",
    "side_by_side",
    "write_results",
]
