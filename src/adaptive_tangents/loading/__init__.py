"""What users bring: networks, checkpoints and data, from files or Python. No pickle is loaded, nothing downloaded."""

from adaptive_tangents.loading.checkpoints import find_checkpoints, load_checkpoint
from adaptive_tangents.loading.data import Data, fit_data, load_data
from adaptive_tangents.loading.models import check_runs, load_model
from adaptive_tangents.loading.outputs import pick
from adaptive_tangents.loading.series import Series, as_state, open_series

__all__ = [
    "Data",
    "Series",
    "as_state",
    "check_runs",
    "find_checkpoints",
    "fit_data",
    "load_checkpoint",
    "load_data",
    "load_model",
    "open_series",
    "pick",
]
