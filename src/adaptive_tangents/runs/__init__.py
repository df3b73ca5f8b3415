"""What a run keeps: its results and arrays in a folder, its parts as checkpoints, its stages and their seconds.

Several runs side by side, the summary of many, and a user's own model, checkpoints and data from files are here too.
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
