"""Networks, checkpoints and data, opened for a command."""

import inspect
import warnings
from pathlib import Path
from typing import Any

from adaptive_tangents.loading import Data, Series, load_data, open_series


def opened(call: str, **options: Any) -> Series:
    """The network and its checkpoints, without the warnings of libraries on what is none of the user's concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        return open_series(call, **options)


def data_of(call: str, path: Path, series: Series, **options: Any) -> Data:
    """Samples from a file or folder, texts by the checkpoints' tokenizer and labels by the model's own names."""
    given = {"tokenizer": series.tokenizer, "classes": series.classes, **options}
    taken = inspect.signature(load_data).parameters
    return load_data(path, call, **{name: value for name, value in given.items() if name in taken})
