"""The samples that a callback measures: a batch as given, or drawn from a data set by the trainer's own collator."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, default_collate

from adaptive_tangents.capture.batches import Batch
from adaptive_tangents.capture.process_state import random_state, set_random_state
from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading.words import told
from adaptive_tangents.runtime.cleanup import ensured

LABELS = ("labels", "label", "label_ids")
Collate = Callable[[list[Any]], Any]


def samples_of(
    call: str, data: Any, y: Any, *, collate: Collate | None, count: int, seed: int, columns: frozenset[str] | None
) -> tuple[Batch, Any]:
    """A batch and its labels, from a batch, a data set or a loader.

    Up to ``count`` samples of a data set are drawn by ``seed``. ``columns`` are the names that a mapping's samples keep.
    """
    if isinstance(data, DataLoader):
        data, collate = data.dataset, data.collate_fn
    if _is_dataset(data):
        draws = random_state()  # samples may be augmented at random
        batch = ensured(
            lambda: _drawn(call, data, collate or default_collate, count, seed, columns),
            lambda: set_random_state(draws),
        )
    else:
        batch = data
    return _parted(batch, y, columns)


def columns_of(model: nn.Module) -> frozenset[str] | None:
    """The names of the arguments that a model takes, and of labels; None if it takes any."""
    arguments = inspect.signature(model.forward).parameters.values()
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in arguments):
        return None
    return frozenset({each.name for each in arguments} | set(LABELS))


def _is_dataset(data: Any) -> bool:
    if isinstance(data, Tensor | tuple | Mapping | nn.Module) or data is None:
        return False
    if isinstance(data, list):
        return bool(data) and not any(isinstance(each, Tensor) for each in data)
    return hasattr(data, "__getitem__") or isinstance(data, IterableDataset)


def _drawn(call: str, data: Any, collate: Collate, count: int, seed: int, columns: frozenset[str] | None) -> Any:
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise TangentError(
            f"{call}: {type(data).__name__} has no length, so samples cannot be drawn from it; give a batch x and labels y"
        )
    if not len(data):
        raise TangentError(f"{call}: the data set holds no samples; give one that does, or a batch x and labels y")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed), device="cpu")[:count].sort().values
    items = [_kept(data[int(k)], columns) for k in order]
    try:
        return collate(items)
    except Exception as error:
        raise TangentError(
            f"{call}: {len(items)} samples of the {type(data).__name__} do not make a batch ({told(error)}); give a batch x "
            "and labels y"
        ) from error


def _kept(item: Any, columns: frozenset[str] | None) -> Any:
    if columns is None or not isinstance(item, Mapping):
        return item
    return {name: value for name, value in item.items() if name in columns}


def _parted(batch: Any, y: Any, columns: frozenset[str] | None) -> tuple[Batch, Any]:
    """A batch without its labels, and these: (x, y), or a mapping with a name for them."""
    if isinstance(batch, Mapping):
        inputs = {name: value for name, value in _kept(batch, columns).items() if isinstance(value, Tensor)}
        held = [inputs.pop(name) for name in LABELS if name in inputs]
        return inputs, _one_a_sample(held[0]) if y is None and held else y
    if y is None and isinstance(batch, tuple | list) and len(batch) == 2 and not hasattr(batch, "_fields"):
        x, labels = batch
        return x, _one_a_sample(labels)
    return batch, y


def _one_a_sample(labels: Any) -> Any:
    """Labels, unless they are of every token of a sample."""
    tokens = isinstance(labels, Tensor) and labels.ndim > 1 and not labels.is_floating_point() and labels.shape[1] > 1
    return None if tokens else labels


def drawn_count(options: Mapping[str, Any], most: int) -> int:
    """How many samples of a data set a tracker may need."""
    wanted = options.get("samples")
    return wanted if isinstance(wanted, int) else most


def first_loader(loaders: Any) -> Any:
    """The one loader of a trainer, or None if it has none or several."""
    flat = getattr(loaders, "flattened", loaders)
    flat = flat[0] if isinstance(flat, Sequence) and len(flat) == 1 else flat
    return flat if isinstance(flat, DataLoader) else None
