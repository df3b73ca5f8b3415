"""Samples of torch's data sets and loaders: as many as are asked for, made by the loader's own collate function."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from adaptive_tangents.capture.batches import mapped, refilled, tensors
from adaptive_tangents.capture.process_state import random_state, set_random_state
from adaptive_tangents.checks import from_array
from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading.samples import Opened, Samples, as_read, drawn_note
from adaptive_tangents.loading.words import told

LABELS = ("labels", "label", "label_ids")


@contextmanager
def untouched(*holders: Any) -> Iterator[None]:
    """Within this context, random numbers may be drawn: all generators of the process, and those given, are put back."""
    generators = [g for holder in holders if isinstance(g := getattr(holder, "generator", None), torch.Generator)]
    before, states = random_state(), [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        set_random_state(before)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def open_stream(found: Any, call: str, *, most: int | None = None, seed: int = 0) -> Opened:
    """The samples of a Dataset or DataLoader; the random numbers of the process are as before.

    A Dataset's samples are drawn, as ``seed`` says; a DataLoader's are its first, in its own order, as are those of a stream
    without an end, of which ``most`` are read. Samples are (x, y), x alone, or mappings with labels. Raises TangentError for
    such streams without ``most`` and for samples that do not form a batch.
    """
    if isinstance(found, DataLoader):
        return _open_loader(found, call, most)
    with untouched():
        if isinstance(found, IterableDataset):
            return as_read(split(_batch(_first(found, most, call), default_collate, call), call, "the data set"))
        n = len(found)

    def read(rows: list[int] | None) -> Samples:
        notes = () if rows is None else (drawn_note("the data set", n, len(rows), seed),)
        with untouched():
            batch = _batch(_items(found, range(n) if rows is None else rows), default_collate, call)
        made = split(batch, call, "the data set", notes)
        return made if rows is None else replace(made, rows=tuple(rows), total=n)

    return Opened(n, read)


def is_stream(thing: Any) -> bool:
    """Whether an object is a Dataset, or a DataLoader."""
    return isinstance(thing, Dataset | DataLoader)


def _open_loader(loader: DataLoader[Any], call: str, most: int | None) -> Opened:
    samplers = (
        loader.sampler,
        getattr(loader, "batch_sampler", None),
        getattr(loader.batch_sampler, "sampler", None),
    )
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        with untouched(loader, *samplers):
            return as_read(_streamed(loader, call, most))
    n = len(loader.dataset) if hasattr(loader.dataset, "__len__") else None

    def read(rows: list[int] | None) -> Samples:
        with untouched(loader, *samplers):
            return _first_of(loader, call, most if rows is None else len(rows), n)

    return as_read(read(None)) if n is None else Opened(n, read)


def _streamed(loader: DataLoader[Any], call: str, most: int | None) -> Samples:
    """The first samples of a loader that takes them from a stream, or one by one."""
    source = "the DataLoader"
    if isinstance(loader.dataset, IterableDataset):
        return split(_batch(_first(loader.dataset, most, call), loader.collate_fn, call), call, source)
    return split(_concatenated(_batches(loader, most), call, source, most), call, source)


def _first_of(loader: DataLoader[Any], call: str, most: int | None, n: int | None) -> Samples:
    """The first samples of a loader, collated at once, so that batches of several lengths are padded alike."""
    source = "the DataLoader"
    assert loader.batch_sampler is not None
    index = list(islice(chain.from_iterable(loader.batch_sampler), most))
    some = n is not None and len(index) < n
    notes = (f"Of {source}, the first {len(index)} of the {n:,} samples were read.",) if some else ()
    made = split(_batch(_items(loader.dataset, index), loader.collate_fn, call), call, source, notes)
    if n is None or made.n != len(index) or not all(isinstance(k, int) and 0 <= k < n for k in index):
        return made
    return replace(made, rows=tuple(index), total=n, leading=some)


def _first(found: Any, most: int | None, call: str) -> list[Any]:
    if most is None:
        raise TangentError(f"{call}: the data set is a stream without an end; say how many samples to take with most=")
    return list(islice(iter(found), most))


def _items(found: Any, index: Sequence[int]) -> list[Any]:
    if hasattr(found, "__getitems__"):
        return list(found.__getitems__(list(index)))
    return [found[k] for k in index]


def _batch(items: Sequence[Any], collate: Callable[[Any], Any], call: str) -> Any:
    if not items:
        raise TangentError(f"{call}: the data set holds no samples")
    try:
        return collate(list(items))
    except Exception as error:  # a user's function, or samples of several lengths
        raise TangentError(
            f"{call}: {len(items)} samples do not form a batch ({told(error)}); give a DataLoader whose collate_fn pads "
            "them, or tensors of one size"
        ) from error


def _batches(loader: DataLoader[Any], most: int | None) -> list[Any]:
    found, count = [], 0
    for batch in loader:
        alone = any(tensor.ndim == 0 for tensor in tensors(batch))  # single samples
        found.append(mapped(batch, lambda tensor: tensor[None]) if alone else batch)
        count += tensors(found[-1])[0].shape[0] if tensors(batch) else 1
        if most is not None and count >= most:
            break
    return found


def _concatenated(batches: Sequence[Any], call: str, source: str, most: int | None) -> Any:
    if not batches or not tensors(batches[0]):
        raise TangentError(f"{call}: {source} holds no samples")
    try:
        return refilled(batches[0], [torch.cat(parts)[:most] for parts in zip(*map(tensors, batches), strict=True)])
    except (RuntimeError, ValueError) as error:
        raise TangentError(
            f"{call}: the batches of {source} differ in shape ({told(error)}); pad them to one length"
        ) from error


def split(batch: Any, call: str, source: str, notes: tuple[str, ...] = ()) -> Samples:
    """A batch as inputs and labels: (x, y), a mapping with labels, or inputs alone."""
    if isinstance(batch, Mapping):
        held = dict(batch)
        y = next((held.pop(name) for name in LABELS if name in held), None)
        for name in LABELS:
            held.pop(name, None)
        x: Any = {name: value for name, value in held.items() if isinstance(value, Tensor)}
        if not x:
            raise TangentError(f"{call}: {source} gives no tensors beside labels; give inputs, too")
        left = [name for name in held if name not in x]
        notes = (*notes, f"Of {source}, {', '.join(left)} are no tensors and were left out.") if left else notes
        return _labeled(x, y, source, notes)
    if isinstance(batch, list | tuple):
        if len(batch) > 2:
            raise TangentError(
                f"{call}: {source} gives {len(batch)} things a sample, and nothing says which are labels; let it give pairs "
                "(x, y), or a dict with the names of the network's arguments and 'labels'"
            )
        return _labeled(batch[0], batch[1] if len(batch) == 2 else None, source, notes)
    return _labeled(batch, None, source, notes)


def _labeled(x: Any, y: Any, source: str, notes: tuple[str, ...]) -> Samples:
    """Labels as a tensor stay one; numbers and names in a list are read as those of a file."""
    if y is None:
        return Samples(source, x=x, notes=notes)
    if isinstance(y, np.ndarray) and y.dtype.kind in "OUS":
        y = y.tolist()
    if isinstance(y, Tensor | np.ndarray):
        target = y if isinstance(y, Tensor) else from_array(y)
        target = target.long() if target.dtype == torch.bool else target
        target = target[:, 0] if target.ndim == 2 and target.shape[1] == 1 else target
        return Samples(source, x=x, y=target, notes=notes)
    return Samples(source, x=x, labels=tuple(y), notes=notes)
