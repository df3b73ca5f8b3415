"""Data sets of Hugging Face's `datasets`: a folder on disk, or one in memory."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading.columns import from_table, of_some
from adaptive_tangents.loading.images import ImageForm, stacked
from adaptive_tangents.loading.samples import Opened, Samples
from adaptive_tangents.loading.tables import Table
from adaptive_tangents.loading.words import listed_names, optional, told

_FILES = ("state.json", "dataset_dict.json", "dataset_info.json")


def is_dataset_folder(path: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return any((path / name).is_file() for name in _FILES)


def is_dataset(thing: Any) -> bool:
    """Whether an object is a data set, or several splits of one."""
    module = sys.modules.get("datasets")
    return module is not None and isinstance(
        thing, module.Dataset | module.DatasetDict | module.IterableDataset | module.IterableDatasetDict
    )


def load_dataset_folder(path: Path, call: str) -> Any:
    """The data set in a folder. Raises TangentError if it cannot be read or holds several splits."""
    datasets = optional("datasets", f"reading {path}", call)
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # a broken folder can make its reader raise anything
        raise TangentError(
            f"{call}: {path} is no data set that can be read ({told(error)}); save it again with save_to_disk"
        ) from error
    _check_one(found, str(path), call, str(path / next(iter(found), "train")) if isinstance(found, dict) else "")
    return found


def _check_one(found: Any, source: str, call: str, remedy: str) -> None:
    if isinstance(found, dict):
        raise TangentError(
            f"{call}: {source} holds the splits {listed_names(found)}; give one of them, such as {remedy}"
        )


def open_dataset(
    found: Any, call: str, source: str = "the data set", *, text: str | None = None, label: str | None = None,
    form: ImageForm | None = None, most: int | None = None, seed: int = 0,
) -> Opened:  # fmt: skip
    """The samples of a data set: as a table, or its images. Of a stream, ``most`` are read."""
    datasets = sys.modules["datasets"]
    _check_one(found, source, call, f"data[{next(iter(found))!r}]" if isinstance(found, dict) and found else "")
    if not hasattr(found, "__len__"):
        if most is None:
            raise TangentError(f"{call}: {source} is a stream without an end; say how many samples to take with most=")
        records = list(found.take(most))
        found = datasets.Dataset.from_list(records, features=found.features)
    if not len(found):
        raise TangentError(f"{call}: {source} holds no samples")
    plain = found.with_format(None)

    def read(rows: list[int] | None) -> Samples:
        return _chosen(plain, rows, call, source, text=text, label=label, form=form, seed=seed)

    return Opened(len(plain), read)


def _chosen(
    found: Any, rows: list[int] | None, call: str, source: str, *, text: str | None, label: str | None,
    form: ImageForm | None, seed: int,
) -> Samples:  # fmt: skip
    """Some of the samples, with the labels of all; None is all of them."""
    datasets = sys.modules["datasets"]
    chosen = found if rows is None else found.select(rows)
    classes = {
        name: tuple(kind.names) for name, kind in found.features.items() if isinstance(kind, datasets.ClassLabel)
    }
    pictured = [name for name, kind in found.features.items() if isinstance(kind, datasets.Image)]
    columns: dict[str, Sequence[Any]] = {n: list(chosen[n]) for n in chosen.column_names if n not in pictured}
    table = Table(source, columns, lambda k: f"row {k if rows is None else rows[k]}", classes)
    if pictured and not any(isinstance(v, str) for n in columns for v in columns[n][:1] if text == n):
        made = _pictures(table, list(chosen[pictured[0]]), pictured[0], call, label, form or ImageForm())
    else:
        made = from_table(table, call, text=text, label=label)
    if rows is None:
        return made
    whole = Table(source, {} if made.labels is None else {made.column: list(found[made.column])})
    return of_some(made, whole, rows, len(found), seed)


def _pictures(
    table: Table,
    images: Sequence[Any],
    name: str,
    call: str,
    label: str | None,
    form: ImageForm,
) -> Samples:
    names = [f"{name!r} of {table.where(k)}" for k in range(len(images))]
    x, said = stacked(images, names, table.source, call, form)
    stand_in = Table(table.source, {**table.columns, "text": ["-"] * len(images)}, table.where, table.classes)
    made = from_table(stand_in, call, text="text", label=label)
    note = f"Images are the column {name!r} of {table.source}, labels the column {made.column!r}."
    return Samples(
        table.source, x=x, labels=made.labels, classes=made.classes, column=made.column, where=table.where,
        notes=(note, *said),
    )  # fmt: skip
