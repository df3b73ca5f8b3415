"""Batches: a tensor, or a tuple or dict of tensors, samples first; checked before any work."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptive_tangents.checks import check_finite, listed
from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.summands import Index

Batch = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]


def tensors(x: Batch) -> list[Tensor]:
    """The tensors of a batch."""
    return [x] if isinstance(x, Tensor) else list(x.values() if isinstance(x, Mapping) else x)


def samples(x: Batch) -> int:
    """Number of samples of a batch, n."""
    return tensors(x)[0].shape[0]


def take(x: Batch, index: Index | None) -> Any:
    """Some samples of a batch, in the same kind of container; None copies all of them."""
    if isinstance(x, Tensor):
        return x.clone() if index is None else x[index]
    if isinstance(x, Mapping):
        return {name: take(tensor, index) for name, tensor in x.items()}
    return tuple(take(tensor, index) for tensor in x)


def cast(x: Batch, dtype: torch.dtype) -> Any:
    """A batch with its floating tensors in ``dtype``."""
    if isinstance(x, Tensor):
        return x.to(dtype) if x.is_floating_point() else x
    if isinstance(x, Mapping):
        return {name: cast(tensor, dtype) for name, tensor in x.items()}
    return tuple(cast(tensor, dtype) for tensor in x)


def check_batch(call: str, x: Any, parameters: Mapping[str, Tensor]) -> None:
    """Raise TangentError unless ``x`` is a batch of finite samples on the device and of the dtype of the parameters."""
    if not isinstance(x, Tensor | tuple | Mapping) or not all(isinstance(t, Tensor) for t in tensors(x)):
        raise TangentError(f"{call}: x is a tensor, or a tuple or dict of tensors, got {type(x).__name__}")
    if any(t.is_nested or t.layout != torch.strided for t in tensors(x)):
        raise TangentError(f"{call}: a tensor of x is nested or sparse; pad it, or make it dense with .to_dense()")
    if not tensors(x) or any(t.ndim == 0 for t in tensors(x)):
        raise TangentError(f"{call}: every tensor of x has the samples as its first dimension; got a scalar or nothing")
    counts = {t.shape[0] for t in tensors(x)}
    if len(counts) > 1:
        raise TangentError(f"{call}: the tensors of x hold different numbers of samples: {sorted(counts)}")
    if counts == {0}:
        raise TangentError(f"{call}: x holds no samples")
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
    check_finite(call, "the input", tensors(x))
