"""Batches: tensors, alone or in containers with flags among them, samples first; checked before any work.

A model is called as ``model(x)``, ``model(*x)`` for a tuple or list, or ``model(**x)`` for a mapping. Flags and None reach
it unchanged; only tensors are indexed.
"""

import copy
import dataclasses
import inspect
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader

from adaptive_tangents.checks import check_finite, listed
from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.summands import Index


@runtime_checkable
class Record(Protocol):
    """An instance of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Batch = Tensor | Sequence[Any] | Mapping[str, Any] | Record
"""A tensor with samples first, or a tuple, list, mapping (such as BatchEncoding) or dataclass of these, of flags and None.

Containers may hold containers. Every tensor has the samples first.
"""

_FLAGS = (type(None), str, numbers.Number, Enum, torch.dtype, torch.device)


def tensors(x: Any) -> list[Tensor]:
    """The tensors of a batch."""
    return [leaf for _, leaf in _leaves(x) if isinstance(leaf, Tensor)]


def samples(x: Batch) -> int:
    """Number of samples of a batch, n."""
    return tensors(x)[0].shape[0]


def mapped(x: Any, function: Callable[[Tensor], Any]) -> Any:
    """A batch with a function of each tensor in its place, in containers of the same kind."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, list):
        return [mapped(part, function) for part in x]
    if isinstance(x, tuple):
        parts = [mapped(part, function) for part in x]
        return x._make(parts) if hasattr(x, "_make") else tuple(parts)
    if isinstance(x, Mapping):
        held = {name: mapped(part, function) for name, part in x.items()}
        if type(x) is dict:
            return held
        made: Any = copy.copy(x)
        for name, part in held.items():
            made[name] = part
        return made
    if isinstance(x, Record) and not isinstance(x, type):
        made = copy.copy(x)
        for field in dataclasses.fields(x):
            object.__setattr__(made, field.name, mapped(getattr(x, field.name), function))
        return made
    return x


def take(x: Any, index: Index | None) -> Any:
    """Some samples of a batch, in the same kind of container; None copies all of them."""
    return mapped(x, lambda tensor: tensor.clone() if index is None else tensor[index])


def cast(x: Any, dtype: torch.dtype) -> Any:
    """A batch, or a state dict, with its floating tensors in ``dtype``."""
    return mapped(x, lambda tensor: cast_tensor(tensor, dtype))


def cast_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating tensor in ``dtype``, a complex one in the complex dtype to match, others as they are."""
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def refilled(x: Batch, values: Sequence[Any]) -> Any:
    """A batch with other values for its tensors, in the order of `tensors`."""
    following = iter(values)
    return mapped(x, lambda _: next(following))


def arguments(model: nn.Module, x: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments with which a model takes a batch.

    A named tuple is one argument if the model takes one and not as many as the tuple has fields.
    """
    if isinstance(x, Mapping):
        return (), dict(x)
    if isinstance(x, Tensor) or not isinstance(x, tuple | list):
        return (x,), {}
    spread = not hasattr(x, "_make") or len(x) == 1 or _binds(model, tuple(x)) or not _binds(model, (x,))
    return (tuple(x) if spread else (x,)), {}


def _binds(model: nn.Module, given: tuple[Any, ...]) -> bool:
    try:
        inspect.signature(model.forward).bind(*given)
    except (TypeError, ValueError):
        return False
    return True


def described(x: Batch) -> str:
    """The shapes and dtypes of a batch, for error messages."""
    parts = [
        f"{place} {tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"
        for place, leaf in _leaves(x)
        if isinstance(leaf, Tensor)
    ]
    return listed(parts) or "x"


def _leaves(x: Any, place: str = "x") -> Iterator[tuple[str, Any]]:
    """What a batch holds that is no container, with its place, such as ``x['mask']``."""
    if isinstance(x, Tensor | PackedSequence):
        yield place, x
    elif isinstance(x, tuple) and hasattr(x, "_fields"):
        for name, part in zip(x._fields, x, strict=True):
            yield from _leaves(part, f"{place}.{name}")
    elif isinstance(x, tuple | list):
        for k, part in enumerate(x):
            yield from _leaves(part, f"{place}[{k}]")
    elif isinstance(x, Mapping):
        for name, part in x.items():
            yield from _leaves(part, f"{place}[{name!r}]")
    elif isinstance(x, Record) and not isinstance(x, type):
        for field in dataclasses.fields(x):
            yield from _leaves(getattr(x, field.name), f"{place}.{field.name}")
    else:
        yield place, x


def _lists(x: Any, place: str = "x") -> Iterator[tuple[str, int]]:
    """Tuples and lists that hold no tensor, with their lengths."""
    if isinstance(x, tuple | list):
        if not tensors(x):
            yield place, len(x)
        else:
            for k, part in enumerate(x):
                yield from _lists(part, f"{place}[{k}]")
    elif isinstance(x, Mapping):
        for name, part in x.items():
            yield from _lists(part, f"{place}[{name!r}]")


def check_batch(call: str, x: Any, parameters: Mapping[str, Tensor]) -> None:
    """Raise TangentError unless ``x`` is a batch of finite samples on the device and of the dtype of the parameters."""
    check_form(call, x)
    _check_numbers(call, x)
    weight = next(iter(parameters.values()))
    for tensor in tensors(x):
        if tensor.device != weight.device:
            raise TangentError(
                f"{call}: x is on {tensor.device} and the model on {weight.device}; move one with .to(device)"
            )
    dtypes = {p.dtype for p in parameters.values()}
    floating = {t.dtype for t in tensors(x) if t.is_floating_point()}
    if floating and not floating & dtypes:
        raise TangentError(
            f"{call}: x is {listed(map(str, floating))} and the model {listed(map(str, dtypes))}; "
            "convert one with .to(dtype)"
        )
    check_finite(call, "the input", [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors(x)])


def check_form(call: str, x: Any) -> None:
    """Raise TangentError unless ``x`` holds tensors, flags and None in containers that can be indexed."""
    wanted = "x is a tensor, or a tuple, list, dict or dataclass of tensors, flags and None"
    if not isinstance(x, Tensor | tuple | list | Mapping | Record) or isinstance(x, type):
        raise TangentError(f"{call}: {wanted}, got {type(x).__name__}{_as_tensors(x)}")
    for place, leaf in _leaves(x):
        if not isinstance(leaf, Tensor) and not isinstance(leaf, _FLAGS):
            raise TangentError(f"{call}: {wanted}, but {place} is of type {type(leaf).__name__}{_as_tensors(leaf)}")
        if isinstance(leaf, Tensor) and (leaf.is_nested or leaf.layout != torch.strided or leaf.is_quantized):
            raise TangentError(
                f"{call}: a tensor of x is nested, sparse or quantized ({place}); pad it, or make it dense with "
                ".to_dense() or .dequantize()"
            )
    if isinstance(x, Mapping) and not all(isinstance(name, str) for name in x):
        raise TangentError(f"{call}: the keys of x are the names of the model's arguments, got {listed(map(repr, x))}")


def _as_tensors(value: Any) -> str:
    """What to do about a value that is no tensor."""
    if isinstance(value, np.ndarray):
        return "; convert it with torch.from_numpy"
    if isinstance(value, PackedSequence):
        return "; pass padded tensors, (n, steps, features)"
    if isinstance(value, DataLoader | Iterator):
        return "; pass one batch of it"
    return "; give the tensors that it holds"


def _check_numbers(call: str, x: Batch) -> None:
    """Raise TangentError unless all tensors hold the same number of samples, at least one."""
    found = tensors(x)
    if not found and any(True for _ in _leaves(x)):
        raise TangentError(
            f"{call}: x holds no tensors; convert its numbers to tensors, samples first (of a tokenizer, ask for "
            "return_tensors='pt')"
        )
    if not found or any(t.ndim == 0 for t in found):
        raise TangentError(f"{call}: every tensor of x has the samples as its first dimension; got a scalar or nothing")
    counts = {t.shape[0] for t in found}
    if len(counts) > 1:
        raise TangentError(
            f"{call}: the tensors of x hold different numbers of samples: {sorted(counts)} ({described(x)}); give every "
            "tensor the samples first, and those that all samples share as buffers of the model"
        )
    if counts == {0}:
        raise TangentError(f"{call}: x holds no samples")
    for place, length in _lists(x):
        if counts == {length} and length > 1:
            raise TangentError(
                f"{call}: {place} has as many entries as there are samples, and only tensors are divided among samples; make "
                "it a tensor, or leave it out"
            )
