"""What users bring: networks, checkpoints and data, from files or Python. No pickle is loaded, nothing downloaded."""

from adaptive_tangents.loading.checkpoints import find_checkpoints, load_checkpoint
from adaptive_tangents.loading.data import Data, fit_data
from adaptive_tangents.loading.images import ImageForm, image_form
from adaptive_tangents.loading.models import check_runs, load_model
from adaptive_tangents.loading.outputs import output_of, pick
from adaptive_tangents.loading.reduced import inner
from adaptive_tangents.loading.series import Series, as_state, open_series
from adaptive_tangents.loading.sources import as_data, load_data
from adaptive_tangents.loading.texts import Tokenizer, load_tokenizer

__all__ = [
    "Data",
    "ImageForm",
    "Series",
    "Tokenizer",
    "as_data",
    "as_state",
    "check_runs",
    "find_checkpoints",
    "fit_data",
    "image_form",
    "inner",
    "load_checkpoint",
    "load_data",
    "load_model",
    "load_tokenizer",
    "open_series",
    "output_of",
    "pick",
]
