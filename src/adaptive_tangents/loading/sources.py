"""Data from whatever users have: files, folders, and objects in Python."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from adaptive_tangents.capture.batches import Batch, Record, mapped, tensors
from adaptive_tangents.checks import from_array
from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading.columns import from_table, of_some
from adaptive_tangents.loading.data import Data
from adaptive_tangents.loading.draws import drawn
from adaptive_tangents.loading.hugging_face_data import (
    is_dataset,
    is_dataset_folder,
    load_dataset_folder,
    open_dataset,
)
from adaptive_tangents.loading.images import ImageForm, is_image_folder, open_images
from adaptive_tangents.loading.npz import read_npz
from adaptive_tangents.loading.samples import Opened, Samples, as_read, joined
from adaptive_tangents.loading.streams import is_stream, open_stream, split
from adaptive_tangents.loading.tables import READERS, Table, from_frame, read_table
from adaptive_tangents.loading.texts import Tokenizer
from adaptive_tangents.loading.words import INSPECT, check_file, listed_names, told

_OTHERS = (
    ".txt",
    ".xlsx",
    ".xls",
    ".pkl",
    ".pickle",
    ".pt",
    ".pth",
    ".h5",
    ".hdf5",
    ".arrow",
    ".feather",
    ".gz",
    ".zip",
)
_TAKEN = ".npz, .csv, .tsv, .json, .jsonl, .parquet, a folder of images by class, or a folder of Hugging Face datasets"


def load_data(
    path: str | Path,
    call: str = INSPECT,
    *,
    held_out: str | Path | None = None,
    text: str | None = None,
    label: str | None = None,
    tokenizer: Tokenizer | None = None,
    classes: Sequence[str] | None = None,
    max_length: int | None = None,
    amounts: bool = False,
    images: ImageForm | None = None,
    most: int | None = None,
    seed: int = 0,
) -> Data:
    """The samples in a file or folder.

    Args:
        path: `.npz` (x, or x0, x1, …, or argument names; y; classes), a table (`.csv`, `.tsv`, `.json`, `.jsonl`,
            `.parquet`), a folder of images by class, or a folder that `datasets` saved.
        call: the call that errors name.
        held_out: a second one, of samples that training did not see; they follow the others, and ``Data.held_out`` marks
            them.
        text: the column of texts, two separated by a comma for pairs; None finds it by its name.
        label: the column of labels, "none" for no labels; None finds it by its name.
        tokenizer: takes a list of texts and gives a dict of tensors.
        classes: the network's names of its outputs; labels as text become its numbers.
        max_length: the most tokens of a text; None is the limit of the tokenizer or of the network, if it has one.
        amounts: whether the network is for regression, so that labels are real targets.
        images: size and normalization of images; None leaves their size, and scales them to 0…1.
        most: the most samples to read, drawn with ``seed`` from both in proportion, at least a quarter from each; None, and
            an `.npz` file, is read whole.
        seed: of that draw.

    Raises:
        TangentError: if nothing can be read, or it stays open which column is which, or labels do not fit the network.
    """
    return as_data(
        Path(path), call, held_out=None if held_out is None else Path(held_out), text=text, label=label, tokenizer=tokenizer,
        classes=classes, max_length=max_length, amounts=amounts, images=images, most=most, seed=seed,
    )  # fmt: skip


def as_data(
    thing: Any,
    call: str = INSPECT,
    *,
    held_out: Any = None,
    text: str | None = None,
    label: str | None = None,
    tokenizer: Tokenizer | None = None,
    classes: Sequence[str] | None = None,
    max_length: int | None = None,
    amounts: bool = False,
    images: ImageForm | None = None,
    most: int | None = None,
    seed: int = 0,
) -> Data:
    """The samples of what users have in Python; the arguments are those of `load_data`.

    Args:
        thing: a `Data`, a path, a pair (x, y), a batch x, a list of texts, a torch Dataset or DataLoader, a
            `datasets.Dataset`, or a pandas DataFrame. A mapping's "labels" or "label" become y.
        call: the call that errors name.
        held_out: another one, of samples that training did not see.
        text: as in `load_data`.
        label: as in `load_data`.
        tokenizer: as in `load_data`.
        classes: as in `load_data`.
        max_length: as in `load_data`.
        amounts: as in `load_data`.
        images: as in `load_data`.
        most: the most samples to take, of both in proportion, at least a quarter of each; an IterableDataset needs it, and
            what is in memory is taken whole.
        seed: of which samples are taken of those that can be indexed.

    Raises:
        TangentError: as `load_data`, and for things that are none of these.

    >>> import torch
    >>> as_data((torch.randn(4, 3), ["dog", "cat", "cat", "dog"])).y
    tensor([1, 0, 0, 1])
    """
    if isinstance(thing, Data) and held_out is None:
        return thing
    fewest = 1 if held_out is None else 2
    if most is not None and most < fewest:
        raise TangentError(f"{call}: most must be at least {fewest}, got {most}")
    given = [each for each in (thing, held_out) if each is not None]
    sources = list[Opened]()
    for each in given:
        with _readable(each, call):
            sources.append(_open(each, call, text=text, label=label, images=images, most=most, seed=seed))
    parts = list[Samples]()
    for each, source, rows in zip(given, sources, drawn([source.n for source in sources], most, seed), strict=True):
        with _readable(each, call):
            parts.append(source.read(rows))
    return joined(parts, call, tokenizer=tokenizer, classes=classes, max_length=max_length, amounts=amounts)


@contextmanager
def _readable(thing: Any, call: str) -> Iterator[None]:
    """Raise TangentError for a file that the system does not let us read."""
    try:
        yield
    except OSError as error:
        if not isinstance(thing, str | Path):
            raise
        raise TangentError(f"{call}: {thing} cannot be read ({told(error)}); check the file") from error


def _open(
    thing: Any, call: str, *, text: str | None, label: str | None, images: ImageForm | None, most: int | None, seed: int
) -> Opened:
    """What becomes samples, before they are drawn."""
    if isinstance(thing, Data):
        return as_read(_of_data(thing))
    if isinstance(thing, str | Path):
        return _stored(Path(thing), call, text=text, label=label, images=images, seed=seed)
    if is_dataset(thing):
        return open_dataset(thing, call, text=text, label=label, form=images, most=most, seed=seed)
    if is_stream(thing):
        return open_stream(thing, call, most=most, seed=seed)
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(thing, pandas.DataFrame):
        return _tabled(from_frame(thing), call, text, label, seed)
    return as_read(_in_memory(thing, call))


def _of_data(data: Data) -> Samples:
    rows = None if data.rows is None else tuple(data.rows.tolist())
    return Samples(
        "the data", x=data.x, y=data.y, classes=data.classes, notes=data.notes, shown=data.texts, rows=rows, total=data.size,
        leading=data.leading,
    )  # fmt: skip


def _stored(
    path: Path, call: str, *, text: str | None, label: str | None, images: ImageForm | None, seed: int
) -> Opened:
    """The samples in a file or a folder."""
    if os.path.isdir(path):
        if is_dataset_folder(path):
            found = load_dataset_folder(path, call)
            return open_dataset(found, call, str(path), text=text, label=label, form=images, seed=seed)
        return _folder(path, call, images, seed)
    if path.suffix.lower() in READERS:
        return _tabled(read_table(path, call), call, text, label, seed)
    _check_ending(path, call)
    return as_read(read_npz(path, call))


def _check_ending(path: Path, call: str) -> None:
    if path.suffix.lower() in _OTHERS:
        check_file(path, "data file", f"data are {_TAKEN}", call)
        raise TangentError(f"{call}: {path} ends in {path.suffix}; data are {_TAKEN}")


def _folder(path: Path, call: str, images: ImageForm | None, seed: int) -> Opened:
    if is_image_folder(path):
        return open_images(path, call, images, seed=seed)
    held = sorted(each.name for each in path.iterdir())
    files = [name for name in held if Path(name).suffix.lower() in (*READERS, ".npz")]
    inner = [name for name in held if (path / name).is_dir() and is_dataset_folder(path / name)]
    remedy = f"give one of them, such as {path / (files or inner)[0]}" if files or inner else f"data are {_TAKEN}"
    raise TangentError(
        f"{call}: the folder {path} holds {listed_names(held) or 'nothing'}, not data by itself; {remedy}"
    )


def _tabled(table: Table, call: str, text: str | None, label: str | None, seed: int) -> Opened:
    if not table.columns or not table.n:
        raise TangentError(f"{call}: {table.source} holds no samples")

    def read(rows: list[int] | None) -> Samples:
        found = from_table(table.take(rows), call, text=text, label=label)
        return found if rows is None else of_some(found, table, rows, table.n, seed)

    return Opened(table.n, read)


def _in_memory(thing: Any, call: str) -> Samples:
    """A batch, a pair of inputs and labels, or a list of texts."""
    source = "the data"
    if isinstance(thing, tuple) and len(thing) == 2 and not hasattr(thing, "_fields"):
        x, y = thing
        found = split((_inputs(x, call), y), call, source)
        labels = found.y if found.y is not None else found.labels
        made = Samples(source, texts=tuple(x), y=found.y, labels=found.labels) if _are_texts(x) else found
        if labels is not None and len(labels) != made.n:
            raise TangentError(f"{call}: x holds {made.n} samples and y {len(labels)}; give a label for every sample")
        return made
    if _are_texts(thing):
        return Samples(source, texts=tuple(thing))
    x = _inputs(thing, call)
    return split(x, call, source) if isinstance(x, Mapping) else Samples(source, x=x)


def _are_texts(x: Any) -> bool:
    return isinstance(x, list | tuple | np.ndarray) and len(x) > 0 and all(isinstance(each, str) for each in x)


def _inputs(x: Any, call: str) -> Batch:
    if _are_texts(x):
        return {}
    x = from_array(x) if isinstance(x, np.ndarray) and x.dtype.kind in "fiub" else x
    if isinstance(x, Mapping):
        x = {name: from_array(v) if isinstance(v, np.ndarray) else v for name, v in x.items()}
    if not isinstance(x, Tensor | Mapping | tuple | list | Record) or isinstance(x, type):
        raise TangentError(
            f"{call}: data are a path, a batch x, a pair (x, y), a torch Dataset or DataLoader, a datasets.Dataset or a "
            f"DataFrame; got {type(x).__name__}"
        )
    found: Batch = mapped(x, lambda tensor: tensor)
    if not tensors(found):
        raise TangentError(f"{call}: the data hold no samples")
    return found
