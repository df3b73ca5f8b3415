"""Networks, checkpoints, data and outputs as the command line asks for them."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from adaptive_tangents.commands.console import console
from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading import (
    Data,
    Series,
    check_runs,
    fit_data,
    image_form,
    load_data,
    load_tokenizer,
    open_series,
    output_of,
)
from adaptive_tangents.loading.hugging_face import is_regression, places_of
from adaptive_tangents.loading.texts import check_length


@dataclass(frozen=True)
class Reading:
    """The options of data and output."""

    text: str | None = None
    label: str | None = None
    held_out: Path | None = None
    output: str | None = None
    max_length: int | None = None
    tokenizer: Path | None = None
    image_size: str | None = None
    normalize: str | None = None


def opened(call: str, **options: Any) -> Series:
    """The network and its checkpoints, without the warnings of libraries on what is none of the user's concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        return open_series(call, **options)


def read_data(
    path: Path, series: Series, call: str, asked: Reading, *, most: int | None = None, seed: int = 0, show: bool = True
) -> tuple[nn.Module, Data]:  # fmt: skip
    """The network whose output is measured, and the samples in its form; ``show`` prints how the file was read.

    ``most`` is the most samples to read of all files, drawn with ``seed``.
    """
    tokenizer = series.tokenizer
    if asked.tokenizer is not None:
        places = places_of(series.model)
        check_length(asked.max_length, places, call)
        tokenizer = load_tokenizer(asked.tokenizer, call, places)
    loaded = load_data(
        path, call, held_out=asked.held_out, text=asked.text, label=asked.label,
        tokenizer=tokenizer, classes=None if series.causal else series.classes, max_length=asked.max_length,
        amounts=is_regression(series.model),
        images=image_form(call, size=asked.image_size, normalize=asked.normalize, beside=series.folders),
        most=most, seed=seed,
    )  # fmt: skip
    loaded = fit_data(loaded, series.model, call)
    check_runs(series.model, loaded, path, call)
    network, loaded = output_of(asked.output, series.model, loaded, call, causal=series.causal or None)
    for note in loaded.notes if show else ():
        console.print(note, soft_wrap=True, highlight=False, markup=False)
    return network, loaded


def check_trained(loaded: Data, call: str) -> None:
    """Raise TangentError for samples that training does not learn from, and for losses, where targets are needed."""
    if loaded.loss:
        raise TangentError(
            f"{call}: a loss has no targets that training moves it to; give --output last-token with labels, or a network "
            "whose outputs have targets"
        )
