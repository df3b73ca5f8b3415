"""Data for a network and its checkpoints."""

import inspect
from pathlib import Path
from typing import Any

from adaptive_tangents.loading import Data, Series, load_data


def data_of(call: str, path: Path, series: Series, **options: Any) -> Data:
    """Samples from a file or folder, texts by the checkpoints' tokenizer and labels by the model's own names."""
    given = {"tokenizer": series.tokenizer, "classes": series.classes, **options}
    taken = inspect.signature(load_data).parameters
    return load_data(path, call, **{name: value for name, value in given.items() if name in taken})
