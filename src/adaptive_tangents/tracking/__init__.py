"""Training watched while it runs.

A ``Tracker`` records the tangent kernel in any loop of training: its trace, its alignment with the labels and with what the
network has learned, how far it has turned, in all and by layer. It imports from kernels, measures, capture, loading and
reporting.
"""

from adaptive_tangents.tracking.budget import Cost
from adaptive_tangents.tracking.files import load_history
from adaptive_tangents.tracking.history import History
from adaptive_tangents.tracking.records import KernelNumbers, Record
from adaptive_tangents.tracking.tracker import Tracker

__all__ = [
    "Cost",
    "History",
    "KernelNumbers",
    "Record",
    "Tracker",
    "load_history",
]
