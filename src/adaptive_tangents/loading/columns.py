"""Which columns of a table are the text, the labels and the features: by their names, or as asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading.labels import kind_of, missing, plain_number
from adaptive_tangents.loading.samples import Samples, drawn_note
from adaptive_tangents.loading.tables import Table
from adaptive_tangents.loading.words import listed_names

_PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("question", "passage"), ("text1", "text2"), ("text_a", "text_b"), ("query", "passage"), ("sentence_a", "sentence_b"),
)  # fmt: skip
_TEXTS = (
    "text", "sentence", "content", "review", "review_text", "reviewtext", "review_body", "tweet", "comment", "comment_text",
    "document", "article", "message", "utterance", "body", "headline", "description", "question", "prompt",
)  # fmt: skip
_LABELS = (
    "label", "labels", "y", "target", "targets", "class", "gold_label", "sentiment", "category", "rating", "stars", "score",
)  # fmt: skip
_INDEX = ("idx", "id", "index", "guid", "unnamed: 0", "column 1")
_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "decoder_input_ids", "special_tokens_mask")
_NO_NUMBER = ("na", "n/a", "nan", "null", "none", "-", "?")
NONE = "none"
"""As the name of a label column: there are no labels."""


@dataclass(frozen=True)
class _Columns:
    """What each column is taken for."""

    table: Table
    call: str

    def named(self, wanted: str, option: str) -> str:
        """The column that was asked for by name."""
        found = self._found(wanted)
        if found is None:
            raise TangentError(
                f"{self.call}: {self.table.source} has no column {wanted!r}; its columns are {self.listing()}: give one of "
                f"these as {option}"
            )
        return found

    def _found(self, wanted: str) -> str | None:
        if wanted in self.table.columns:
            return wanted
        alike = [name for name in self.table.columns if name.strip().casefold() == wanted.strip().casefold()]
        return alike[0] if len(alike) == 1 else None

    def among(self, names: Sequence[str]) -> str | None:
        return next((found for name in names if (found := self._found(name)) is not None), None)

    def listing(self) -> str:
        words = [f"{name} ({self.kind(name)})" for name in self.table.columns]
        header = " (its first line names them)" if self.table.source.lower().endswith((".csv", ".tsv")) else ""
        return listed_names(words, most=12) + header

    def kind(self, name: str) -> str:
        values = [value for value in self.table.columns[name] if not missing(value)]
        if values and all(isinstance(value, str) for value in values):
            values = [value for value in values if value.strip().casefold() not in _NO_NUMBER] or values
        if not values:
            return "empty"
        if all(plain_number(value) is not None for value in values):
            return "numbers"
        kinds = {kind_of(value) for value in values}
        return {"text": "text", "a list": "lists"}.get(next(iter(kinds)), "other") if len(kinds) == 1 else "mixed"

    def text(self, asked: str | None, label: str | None) -> tuple[str, ...]:
        """The text columns, one or two; none for a table of numbers."""
        if asked is not None:
            if self._found(asked) is not None or "," not in asked:
                return (self.named(asked, "--text"),)
            found = tuple(self.named(part, "--text") for part in asked.split(","))
            if len(found) > 2:
                raise TangentError(f"{self.call}: --text takes one column, or two separated by a comma; got {asked!r}")
            return found
        pairs = [(self._found(a), self._found(b)) for a, b in _PAIRS]
        pair = next(((a, b) for a, b in pairs if a and b and "text" in (self.kind(a), self.kind(b))), None)
        if pair is not None:
            return pair
        known = [own for name in _TEXTS if (own := self._found(name)) is not None and own != label]
        written = [name for name in known if self.kind(name) in ("text", "mixed", "other")]
        return (written[0],) if written else ()

    def label(self, asked: str | None) -> str | None:
        if asked is not None:
            return None if asked.casefold() == NONE and self._found(asked) is None else self.named(asked, "--label")
        return self.among(_LABELS)


def from_table(table: Table, call: str, *, text: str | None = None, label: str | None = None) -> Samples:
    """The samples of a table: texts, tokens or numeric features, and labels.

    Columns are found by their names or asked for by ``text`` (two for pairs, separated by a comma) and ``label`` ("none":
    there are no labels). Raises TangentError naming the columns there are if it stays open which is which.
    """
    columns = _Columns(table, call)
    target = columns.label(label)
    words = columns.text(text, target)
    if target is not None and target in words:
        raise TangentError(
            f"{call}: --text and --label are one column, {target!r}; its columns are {columns.listing()}"
        )
    if words:
        found = _texts(columns, words, target, label)
    elif "input_ids" in table.columns:
        found = _tokens(columns, target)
    else:
        found = _features(columns, target, label)
    labels = None if target is None else tuple(table.columns[target])
    named = None if target is None else table.classes.get(target)
    return Samples(
        table.source, x=found.x, texts=found.texts, seconds=found.seconds, labels=labels, classes=named,
        column=target or "label", where=table.where, notes=found.notes,
    )  # fmt: skip


def of_some(found: Samples, table: Table, rows: Sequence[int], total: int, seed: int) -> Samples:
    """Samples of some rows of a table, with the labels of all."""
    labels = None if found.labels is None else tuple(table.columns[found.column])
    note = drawn_note(table.source, total, len(rows), seed)
    return replace(
        found,
        labels=labels,
        rows=tuple(rows),
        total=total,
        labels_of_all=True,
        where=table.where,
        notes=(note, *found.notes),
    )


def _texts(columns: _Columns, words: tuple[str, ...], target: str | None, label: str | None) -> Samples:
    table, call = columns.table, columns.call
    others = [
        n for n in table.columns if n not in words and n.strip().casefold() not in _INDEX and columns.kind(n) != "empty"
    ]
    if target is None and label is None and others:
        raise TangentError(
            f"{call}: no column of {table.source} is named as labels are; its columns are {columns.listing()}: give one of "
            f"these as --label, or --label {NONE} for texts without labels"
        )
    held = [tuple(_checked_texts(columns, name)) for name in words]
    said = f"Texts are the column{'s' if len(words) > 1 else ''} {' and '.join(map(repr, words))} of {table.source}"
    note = f"{said}, {'without labels' if target is None else f'labels the column {target!r}'}."
    return Samples(table.source, texts=held[0], seconds=held[1] if len(held) > 1 else None, notes=(note,))


def _checked_texts(columns: _Columns, name: str) -> Sequence[str]:
    table = columns.table
    what = f"{columns.call}: the text {name!r} of {table.source}"
    values = table.columns[name]
    bad = [k for k, value in enumerate(values) if missing(value)]
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise TangentError(f"{what} is empty at {table.where(bad[0])}{more}; fill it in, or leave that sample out")
    for k, value in enumerate(values):
        if not isinstance(value, str):
            raise TangentError(
                f"{what} is {kind_of(value)} at {table.where(k)}; its columns are {columns.listing()}: give one of text as "
                "--text"
            )
    return values


def _tokens(columns: _Columns, target: str | None) -> Samples:
    """Columns that a tokenizer made before."""
    table, call = columns.table, columns.call
    names = [name for name in _TOKENS if name in table.columns and name != "special_tokens_mask"]
    x = {name: _stacked(columns, name, call) for name in names}
    return Samples(table.source, x=x, notes=(f"Tokens are the columns {', '.join(names)} of {table.source}.",))


def _stacked(columns: _Columns, name: str, call: str) -> Tensor:
    values = columns.table.columns[name]
    lengths = {len(value) if isinstance(value, Sequence) else -1 for value in values}
    if len(lengths) > 1:
        raise TangentError(
            f"{call}: {name!r} of {columns.table.source} holds {min(lengths)} to {max(lengths)} tokens a sample; pad them "
            "when they are made (padding='max_length'), give the texts as --text, or in Python a DataLoader whose collate_fn "
            "pads"
        )
    try:
        return torch.tensor(list(values), device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TangentError(
            f"{call}: {name!r} of {columns.table.source} holds other than numbers; give tokens"
        ) from error


def _features(columns: _Columns, target: str | None, label: str | None) -> Samples:
    """All numeric columns but the labels, (n, d)."""
    table, call = columns.table, columns.call
    index = [n for n in table.columns if n.strip().casefold() in _INDEX and n != target and _counts(table.columns[n])]
    others = [name for name in table.columns if name != target and name not in index]
    words = [name for name in others if columns.kind(name) not in ("numbers", "empty")]
    if words:
        verb = "is" if len(words) == 1 else "are"
        unknown = "texts or labels" if target is None else "texts"
        remedy = "labels as --label, and texts as --text" if target is None else "texts as --text"
        raise TangentError(
            f"{call}: no column of {table.source} is named as {unknown} are, and {listed_names(words)} {verb} not of "
            f"numbers; its columns are {columns.listing()}: give {remedy} (two, separated by a comma, for pairs), or a table "
            "of numbers alone"
        )
    if target is None and label is None:
        raise TangentError(
            f"{call}: no column of {table.source} is named as texts or labels are; its columns are {columns.listing()}: give "
            f"one of these as --label, or --label {NONE} if all are features"
        )
    if not others:
        raise TangentError(f"{call}: {table.source} has no column beside {target!r}; give inputs, too")
    rows = torch.tensor([_numbers(columns, name) for name in others], dtype=torch.float64, device="cpu").T.contiguous()
    note = (
        f"x holds the {len(others)} numeric column{'s' if len(others) > 1 else ''} {listed_names(others)} of {table.source}, "
        f"as they are there{f', without {listed_names(index)}' if index else ''}"
        + (f"; labels are the column {target!r}." if target is not None else "; there are no labels.")
    )
    return Samples(table.source, x=rows, notes=(note,))


def _counts(values: Sequence[Any]) -> bool:
    """Whether a column holds a different whole number, or text, in every row, as an index does."""
    numbers = [plain_number(value) for value in values]
    whole = all(isinstance(number, int) or number is None for number in numbers)
    return whole and len(set(map(str, values))) == len(values)


def _numbers(columns: _Columns, name: str) -> list[float]:
    found = []
    for k, value in enumerate(columns.table.columns[name]):
        number = None if missing(value) else plain_number(value)
        real = float("inf") if number is None or abs(number) > 1e300 else float(number)
        if real == float("inf"):
            raise TangentError(
                f"{columns.call}: {name!r} of {columns.table.source} is {value!r} at {columns.table.where(k)}, not a number "
                "that is finite; fill it in, or leave that sample or column out"
            )
        found.append(real)
    return found
