"""Samples as a source holds them, texts and names included, and how several sources become one batch of tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptive_tangents.capture.batches import Batch, described, refilled, samples, tensors
from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading.data import Data
from adaptive_tangents.loading.labels import Column, numbered, several_whole
from adaptive_tangents.loading.texts import Tokenizer, tokenized


@dataclass(frozen=True)
class Samples:
    """Inputs as tensors ``x`` or as ``texts`` (with ``seconds`` if they are pairs), and labels as ``y`` or as values.

    ``classes`` are the names that the source itself gives its labels, ``where`` says where its k-th sample is in it, and
    ``notes`` are sentences on what was taken for what. ``shown`` are texts that x was made of before. If only some samples
    were read, ``rows`` are their numbers and ``total`` is how many there are; with ``labels_of_all``, ``labels`` are of all,
    so that their names do not depend on the draw. ``leading`` says that the source gave its first samples, in its own order.
    """

    source: str
    x: Batch | None = None
    texts: tuple[str, ...] | None = None
    seconds: tuple[str, ...] | None = None
    y: Tensor | None = None
    labels: tuple[Any, ...] | None = None
    classes: tuple[str, ...] | None = None
    column: str = "label"
    where: Callable[[int], str] = "sample {}".format
    notes: tuple[str, ...] = ()
    shown: tuple[str, ...] | None = None
    rows: tuple[int, ...] | None = None
    total: int | None = None
    labels_of_all: bool = False
    leading: bool = False

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.texts) if self.texts is not None else samples(self.x)  # type: ignore[arg-type]

    @property
    def size(self) -> int:
        """Number of samples that the source has, read or not."""
        return self.n if self.total is None else self.total

    def place(self, k: int) -> str:
        """Where the k-th sample read is in the source."""
        return self.where(k if self.rows is None else self.rows[k])


@dataclass(frozen=True)
class Opened:
    """A source whose samples are not read yet: how many there are, and what reads those of some numbers; None is all."""

    n: int
    read: Callable[[list[int] | None], Samples]


def as_read(found: Samples) -> Opened:
    """A source that is read already, whole."""
    return Opened(found.n, lambda rows: found)


def drawn_note(source: str, n: int, most: int, seed: int) -> str:
    """The sentence for samples that were left out."""
    return f"Of {source}, {most} of the {n:,} samples were read, drawn with seed {seed}."


def joined(
    parts: Sequence[Samples],
    call: str,
    *,
    tokenizer: Tokenizer | None = None,
    classes: Sequence[str] | None = None,
    max_length: int | None = None,
    amounts: bool = False,
) -> Data:
    """One batch of all parts: the samples trained on first, then, if there is a second part, those held out."""
    for part in parts:
        if part.n == 0:
            raise TangentError(f"{call}: {_told(part, parts)} holds no samples; give some, or leave it out")
    xs, notes = _inputs(parts, call, tokenizer, max_length)
    y, names, told = _targets(parts, call, None if classes is None else tuple(classes), amounts)
    columns = _columns(parts)
    texts = [_shown(part) for part in parts]
    held = torch.repeat_interleave(
        torch.arange(len(parts), device="cpu") > 0, torch.tensor([part.n for part in parts], device="cpu")
    )
    said = [note for part in parts for note in part.notes] + notes + told
    if len(parts) > 1:
        said.insert(0, f"{parts[1].size:,} samples are held out ({parts[1].source}): training did not see them.")
    return Data(
        _together(xs, parts, call),
        y,
        names,
        texts=None if None in texts else tuple(text for each in texts if each for text in each),
        held_out=held if len(parts) > 1 else None,
        notes=tuple(dict.fromkeys(said)),
        rows=torch.cat([torch.as_tensor(range(p.n) if p.rows is None else p.rows, device="cpu") for p in parts]),
        sizes=tuple(part.size for part in parts),
        leading=any(part.leading for part in parts),
        whole_numbers=names is None and len(columns) == len(parts) and several_whole(columns),
    )


def _told(part: Samples, parts: Sequence[Samples]) -> str:
    """Its source, and of two that are called the same which one it is."""
    alike = len({each.source for each in parts}) < len(parts)
    return f"{part.source} (held out)" if alike and part is parts[-1] else part.source


def _place(part: Samples, k: int, parts: Sequence[Samples]) -> str:
    """Where a sample is, and of two sources in which."""
    return f"{part.place(k)} of {_told(part, parts)}"


def _shown(part: Samples) -> tuple[str, ...] | None:
    if part.texts is None or part.seconds is None:
        return part.texts or part.shown
    return tuple(f"{first} / {second}" for first, second in zip(part.texts, part.seconds, strict=True))


def _inputs(
    parts: Sequence[Samples], call: str, tokenizer: Tokenizer | None, max_length: int | None
) -> tuple[list[Batch], list[str]]:
    """Every part's tensors; texts of all parts are tokenized at once, so that they are padded alike."""
    written = [part for part in parts if part.texts is not None]
    if not written:
        return [part.x for part in parts if part.x is not None], []
    if tokenizer is None:
        raise TangentError(
            f"{call}: {written[0].source} holds texts, and nothing says how the network's tokens are made of them; give "
            "--tokenizer DIR (in Python tokenizer=), a folder with tokenizer.json, or tokens as integers in an .npz file"
        )
    if len({part.seconds is None for part in written}) > 1:
        raise TangentError(
            f"{call}: {parts[0].source} and {parts[1].source} must both hold one text a sample, or both two"
        )
    texts = [text for part in written for text in part.texts or ()]
    seconds = None if written[0].seconds is None else [text for part in written for text in part.seconds or ()]
    places = [(part, k) for part in written for k in range(part.n)]
    whole, notes = tokenized(tokenizer, texts, seconds, max_length, call, lambda k: _place(*places[k], parts))
    found: list[Batch] = []
    first = 0
    for part in parts:
        if part.texts is None:
            assert part.x is not None
            found.append(part.x)
        else:
            found.append({name: value[first : first + part.n] for name, value in whole.items()})
            first += part.n
    return found, notes


def _together(xs: Sequence[Batch], parts: Sequence[Samples], call: str) -> Batch:
    if len(xs) == 1:
        return xs[0]
    forms = [_form(x) for x in xs]
    if forms[0] != forms[1]:
        raise TangentError(
            f"{call}: the samples of {parts[0].source} ({described(xs[0])}) and those held out, of {parts[1].source} "
            f"({described(xs[1])}), are not of one form; give both in the same shape"
        )
    whole: Batch = refilled(xs[0], [torch.cat(pair) for pair in zip(*map(tensors, xs), strict=True)])
    return whole


def _form(x: Batch) -> Any:
    names = sorted(x) if isinstance(x, Mapping) else type(x).__name__
    ordered = [x[name] for name in names] if isinstance(x, Mapping) else tensors(x)
    return names, [(tuple(t.shape[1:]), t.dtype) for t in ordered]


def _columns(parts: Sequence[Samples]) -> list[Column]:
    """Labels that are values still."""
    return [
        Column(part.source, part.column, part.labels, part.where if part.labels_of_all else part.place, part.classes)
        for part in parts
        if part.labels is not None
    ]


def _targets(
    parts: Sequence[Samples], call: str, classes: tuple[str, ...] | None, amounts: bool
) -> tuple[Tensor | None, tuple[str, ...] | None, list[str]]:
    """Labels of all parts, numbered alike, and their names."""
    given = [part for part in parts if part.y is not None or part.labels is not None]
    named = next((part.classes for part in parts if part.classes is not None), None)
    if not given:
        return None, classes or named, []
    if len(given) < len(parts):
        without = next(part for part in parts if part.y is None and part.labels is None)
        raise TangentError(
            f"{call}: {_told(given[0], parts)} has labels and {_told(without, parts)} has none; give labels in both, or in "
            "neither"
        )
    raw = _columns(parts)
    known, notes = classes or named, list[str]()
    values = iter(list[Tensor]())
    if raw:
        # Names that go with numbers of another part are its classes, too.
        fixed = classes or (named if len(raw) < len(parts) else None)
        found, known, notes = numbered(raw, fixed, call, amounts=amounts)
        chosen = (part.rows if part.labels_of_all else None for part in parts if part.labels is not None)
        values = iter([y if rows is None else y[list(rows)] for y, rows in zip(found, chosen, strict=True)])
    ys = [part.y if part.y is not None else next(values) for part in parts]
    if amounts:
        known, ys = None, [y.double() for y in ys]
    _check_range(parts, ys, classes, call)
    if len({(y.is_floating_point(), tuple(y.shape[1:])) for y in ys}) > 1:
        raise TangentError(
            f"{call}: the labels of {parts[0].source} ({_kind(ys[0])}) and those of {parts[1].source} ({_kind(ys[1])}) "
            "are not of one kind; give both alike"
        )
    return torch.cat(ys), known, notes


def _kind(y: Tensor) -> str:
    return f"{tuple(y.shape)} {str(y.dtype).removeprefix('torch.')}"


def _check_range(parts: Sequence[Samples], ys: Sequence[Tensor], classes: tuple[str, ...] | None, call: str) -> None:
    """Class numbers in tensors must be among the network's classes."""
    for part, y in zip(parts, ys, strict=True):
        if classes is None or len(classes) < 2 or y.ndim != 1 or y.is_floating_point() or not len(y):
            continue
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= len(classes):
            bad = low if low < 0 else high
            raise TangentError(
                f"{call}: {part.source} holds the label {bad}, but the network has {len(classes)} classes, numbered from 0; "
                "correct the labels, or leave out samples without one"
            )
