"""Labels as files hold them, numbers or names, become class numbers of the network or real targets."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading.words import listed_names

_WHOLE = re.compile(r"[+-]?\d+")
_REAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_UNNAMED = re.compile(r"LABEL_\d+")
_LARGEST = 2**63 - 1
_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Column:
    """The labels of one source: their values, None where one is missing, and how the source names its own classes."""

    source: str
    name: str
    values: Sequence[Any]
    where: Callable[[int], str]
    classes: tuple[str, ...] | None = None


def plain_number(value: Any) -> int | float | None:
    """A number, or text that is one, as int or float; else None."""
    if isinstance(value, str):
        text = value.strip()
        if _WHOLE.fullmatch(text) and len(text) < 400:
            return int(text)
        return float(text) if _REAL.fullmatch(text) else None
    if isinstance(value, bool):
        return int(value)
    return value if isinstance(value, int | float) else None


def missing(value: Any) -> bool:
    """Whether a value stands for none: None, NaN, or text without a letter."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    return next((words for kind, words in _KINDS.items() if type(value) is kind), f"of type {type(value).__name__}")


def numbered(
    columns: Sequence[Column], classes: tuple[str, ...] | None, call: str, *, amounts: bool = False
) -> tuple[list[Tensor], tuple[str, ...] | None, list[str]]:
    """The labels of several sources as class numbers or real targets, the names of the classes, and notes on the reading.

    ``classes`` are the network's. Names are matched exactly, then without regard to capitals. Without the network's, a
    source's own order counts, else names are sorted. With ``amounts``, the network is for regression: all numbers are real.
    """
    for column in columns:
        _check_kinds(column, call)
    values = [value for column in columns for value in column.values]
    if amounts:
        return _amounts(columns, call)
    own = next((column.classes for column in columns if column.classes), None)
    if isinstance(values[0], list):
        return [_rows(column, call) for column in columns], classes or own, []
    numbers = [plain_number(value) for value in values]
    by_name = _matched(values, classes) if classes else None
    if None not in numbers and any(len(found) > 1 for found in _places(values, classes or ()).values()):
        by_name = None  # names that are numbers, and not one class each
    if any(number is None for number in numbers) or by_name is not None:
        return _named(columns, classes, own, call)
    if own and classes and own != classes:
        renamed = [_renamed(column, call) for column in columns]
        if _matched([value for column in renamed for value in column.values], classes) is not None:
            return _named(renamed, classes, own, call)
    found, notes = _amounts_or_numbers(columns, classes or own, call)
    return found, classes or own, notes


def _amounts(columns: Sequence[Column], call: str) -> tuple[list[Tensor], None, list[str]]:
    """Numbers, whole or not, as real targets."""
    if any(isinstance(value, list) for column in columns for value in column.values):
        return [_rows(column, call).double() for column in columns], None, []
    numbers = [[plain_number(value) for value in column.values] for column in columns]
    for column, row in zip(columns, numbers, strict=True):
        if None in row:
            k = row.index(None)
            raise TangentError(
                f"{call}: the label {column.values[k]!r} at {column.where(k)} of {column.source} is no number, and the "
                "network is for regression (its configuration's problem_type); give numbers"
            )
    whole = all(isinstance(value, int) for row in numbers for value in row)
    note = f"The network is for regression, so the numbers in {columns[0].name!r} are real targets."
    return [torch.tensor(row, dtype=torch.float64, device="cpu") for row in numbers], None, [note] if whole else []


def several_whole(columns: Sequence[Column]) -> bool:
    """Whether labels are more than two whole numbers, which are amounts if the network has one output."""
    values = {plain_number(value) for column in columns for value in column.values if not isinstance(value, list)}
    return len(values) > 2 and all(isinstance(value, int) for value in values)


def _check_kinds(column: Column, call: str) -> None:
    """Raise TangentError for labels that are missing or of several kinds."""
    what = f"{call}: the label {column.name!r} of {column.source}"
    bad = [k for k, value in enumerate(column.values) if missing(value)]
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise TangentError(f"{what} is missing at {column.where(bad[0])}{more}; fill it in, or leave that sample out")
    kinds: dict[str, int] = {}
    for k, value in enumerate(column.values):
        kinds.setdefault(kind_of(value), k)
    if len(kinds) > 1:
        (one, first), (other, second), *_ = kinds.items()
        raise TangentError(
            f"{what} is {one} at {column.where(first)} ({column.values[first]!r}) and {other} at {column.where(second)} "
            f"({column.values[second]!r}); give labels of one kind"
        )
    odd = next(iter(kinds))
    if odd not in ("true or false", "a number", "text", "a list"):
        raise TangentError(f"{what} is {odd} at {column.where(0)}; labels are numbers or names")
    for k, value in enumerate(column.values):
        if isinstance(value, float) and math.isinf(value):
            raise TangentError(f"{what} is not finite at {column.where(k)}; correct it")


def _rows(column: Column, call: str) -> Tensor:
    """Several numbers a sample."""
    try:
        found = torch.tensor(list(column.values), device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TangentError(
            f"{call}: the label {column.name!r} of {column.source} holds lists of other than numbers, or of different "
            "lengths; give as many numbers for every sample"
        ) from error
    return found.long() if found.dtype == torch.bool else found


def _key(value: Any) -> str:
    return str(value).strip().casefold()


def _places(values: Sequence[Any], classes: Sequence[str]) -> dict[str, list[int]]:
    """Every value with the numbers of the classes of that name: exactly, or else without regard to capitals."""
    exact, folded = dict[str, list[int]](), dict[str, list[int]]()
    for k, name in enumerate(classes):
        exact.setdefault(name.strip(), []).append(k)
        folded.setdefault(_key(name), []).append(k)
    texts = sorted({str(value).strip() for value in values})
    return {text: exact.get(text) or folded.get(_key(text), []) for text in texts}


def _matched(values: Sequence[Any], classes: Sequence[str]) -> dict[str, int] | None:
    """Class numbers by name if every value is the name of a class; of several of that name the first."""
    places = _places(values, classes)
    return {text: found[0] for text, found in places.items()} if all(places.values()) else None


def _check_one_each(columns: Sequence[Column], names: Sequence[str], whose: str, call: str) -> None:
    """Raise TangentError for labels whose name several classes have."""
    for column in columns:
        several = {text: found for text, found in _places(column.values, names).items() if len(found) > 1}
        for k, value in enumerate(column.values if several else ()):
            found = several.get(str(value).strip())
            if found:
                raise TangentError(
                    f"{call}: the label {value!r} at {column.where(k)} of {column.source} names several of {whose} classes, "
                    f"{listed_names(map(str, found))}; give labels as class numbers, in a table or an .npz file"
                )


def _named(
    columns: Sequence[Column], classes: tuple[str, ...] | None, own: tuple[str, ...] | None, call: str
) -> tuple[list[Tensor], tuple[str, ...], list[str]]:
    """Labels by name."""
    values = [value for column in columns for value in column.values]
    notes: list[str] = []
    unnamed = bool(classes) and all(_UNNAMED.fullmatch(name) for name in classes or ())
    if classes and not unnamed:
        numbers = _matched(values, classes)
        if numbers is None:
            raise _unknown(columns, classes, call)
        _check_one_each(columns, classes, "the network's", call)
        if any(plain_number(text) not in (None, number) for text, number in numbers.items()):
            text, number = next((t, k) for t, k in numbers.items() if plain_number(t) != k)
            notes.append(
                f"Labels are taken by name: {text!r} is the network's class number {number}, as the model says."
            )
        names = classes
    elif classes and (found := _matched(values, classes)) is not None:
        numbers, names = found, classes
    else:
        kept = tuple(own) if own and _matched(values, own) is not None else _sorted_names(values, notes)
        if classes and len(kept) > len(classes):
            raise TangentError(
                f"{call}: {columns[0].source} has {len(kept)} labels ({listed_names(kept)}), but the network has "
                f"{len(classes)} outputs; give the data of its task, or the network of these"
            )
        order = "in the file's own order" if own and kept == tuple(own) else "in the order of the alphabet"
        listed = ", ".join(f"{k} is {name!r}" for k, name in enumerate(kept[:6])) + (", …" if len(kept) > 6 else "")
        notes.append(f"The network does not name its classes, so labels are numbered {order}: {listed}.")
        _check_one_each(columns, kept, "its own", call)
        numbers = _matched(values, kept) or {}
        names = kept + tuple((classes or ())[len(kept) :])
    return (
        [torch.tensor([numbers[str(v).strip()] for v in column.values], device="cpu") for column in columns],
        names,
        notes,
    )


def _sorted_names(values: Sequence[Any], notes: list[str]) -> tuple[str, ...]:
    """The names there are, sorted; those that differ only in capitals are one, in its most frequent spelling."""
    counts = Counter(str(value).strip() for value in values)
    spelled: dict[str, str] = {}
    for text, _ in counts.most_common():
        if spelled.setdefault(_key(text), text) != text:
            notes.append(f"Labels that differ only in capitals are one class: {text!r} is {spelled[_key(text)]!r}.")
    return tuple(sorted(spelled.values()))


def _unknown(columns: Sequence[Column], classes: tuple[str, ...], call: str) -> TangentError:
    places = _places([value for column in columns for value in column.values], classes)
    column, k, value = next(
        (column, k, value)
        for column in columns
        for k, value in enumerate(column.values)
        if not places[str(value).strip()]
    )
    return TangentError(
        f"{call}: the label {value!r} at {column.where(k)} of {column.source} is none of the network's classes, "
        f"{listed_names(classes)}; correct the label, or give the network that was trained on these"
    )


def _renamed(column: Column, call: str) -> Column:
    """Numbers of a source that names its classes, as names."""
    own = column.classes or ()
    numbers = [plain_number(value) for value in column.values]
    if not all(isinstance(k, int) and 0 <= k < len(own) for k in numbers):
        return column
    return Column(column.source, column.name, [own[k] for k in numbers if isinstance(k, int)], column.where, own)


def _amounts_or_numbers(
    columns: Sequence[Column], classes: tuple[str, ...] | None, call: str
) -> tuple[list[Tensor], list[str]]:
    """Integers as class numbers, floats as real targets."""
    columns = [
        Column(c.source, c.name, [plain_number(value) for value in c.values], c.where, c.classes) for c in columns
    ]
    values = [value for column in columns for value in column.values]
    name = columns[0].name
    if classes and len(classes) == 1:  # a network for regression
        note = f"The network has one output, so the numbers in {name!r} are real targets."
        whole = all(isinstance(value, int) for value in values)
        return [torch.tensor(c.values, dtype=torch.float64, device="cpu") for c in columns], [note] if whole else []
    notes = []
    if any(isinstance(value, float) for value in values):
        held = set(values)
        whole = all(float(value).is_integer() for value in held)
        if not (whole and (held == {0.0, 1.0} or (classes and all(0 <= v < len(classes) for v in held)))):
            return [torch.tensor(c.values, dtype=torch.float64, device="cpu") for c in columns], []
        few = ", ".join(map(str, sorted(held)[:3])) + (", …" if len(held) > 3 else "")
        notes = [f"{name!r} holds {few}, written as decimals: taken as class numbers."]
    for column in columns:
        for k, value in enumerate(column.values):
            if abs(value) > _LARGEST:
                raise TangentError(
                    f"{call}: the label {value} at {column.where(k)} of {column.source} is more than an int64; labels are "
                    "class numbers from 0"
                )
            if classes and not 0 <= value < len(classes):
                raise TangentError(
                    f"{call}: the label {value} at {column.where(k)} of {column.source} is no class of the network, which "
                    f"has {len(classes)}, numbered from 0 ({listed_names(classes)}); correct it, or leave that sample out"
                )
    return [torch.tensor([int(v) for v in c.values], device="cpu") for c in columns], notes
