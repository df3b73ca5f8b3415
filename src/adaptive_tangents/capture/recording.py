"""Passes of models that take derivatives inside forward, and the bytes that autograd keeps of a pass."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adaptive_tangents.errors import TangentError

_Made = TypeVar("_Made")
# What fails in a model that expects a graph: autograd itself, an assertion, an attribute of a grad_fn or gradient not there.
_WITHOUT_A_GRAPH = (RuntimeError, AssertionError, AttributeError, TypeError)


def recorded_if_needed(run: Callable[[bool], Any]) -> Any:
    """``run(False)``; if it fails, ``run(True)``: once more as in training, with gradients on and of all parameters.

    A model may take derivatives in its forward pass, or hook a tensor's gradient. Both fail without a graph. The result has
    no graph if gradients are off outside.
    """
    outside = torch.is_grad_enabled()
    try:
        out = run(False)
    except TangentError:
        raise
    except _WITHOUT_A_GRAPH:
        with torch.enable_grad():
            out = run(True)
    return out if outside else _apart(out)


def needing_gradients(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values that ask for gradients, those that did not as leaves of their own."""
    return {
        name: _apart(v).requires_grad_() if _differentiable(v) and not v.requires_grad else v
        for name, v in values.items()
    }


def _apart(value: Any) -> Any:
    """A tensor without its graph; unlike detach, this keeps derivatives in forward mode."""
    if not isinstance(value, Tensor):
        return value
    tangent = forward_ad.unpack_dual(value).tangent  # type: ignore[no-untyped-call]
    return value.detach() if tangent is None else forward_ad.make_dual(value.detach(), tangent)  # type: ignore[no-untyped-call]


def _differentiable(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def with_even_gradient(normalize: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A normalization whose backward pass gets gradients in the plain order; of one sample, torch misreads another order."""

    def normalized(*arguments: Any, **options: Any) -> Tensor:
        out = normalize(*arguments, **options)
        if len(out) == 1 and out.requires_grad:
            out.register_hook(lambda signal: signal.contiguous())  # type: ignore[no-untyped-call]
        return out

    return normalized


def bytes_kept(run: Callable[[], _Made], own: set[int]) -> tuple[_Made, int]:
    """A result, and the bytes that autograd keeps for it beside the storages ``own``.

    Transforms of torch.func refuse to run while saved tensors are watched; for them it is the bytes of all results.
    """
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> tuple[Tensor, int]:
        # Tensors inside a functional transform have no storage to ask for.
        with suppress(RuntimeError):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        # Returning the tensor itself would close a cycle through its own graph.
        return tensor.detach(), tensor._version

    def kept(noted: tuple[Tensor, int]) -> Tensor:
        if noted[0]._version != noted[1]:
            raise RuntimeError("a saved tensor was modified by an in-place operation")
        return noted[0]

    try:
        with torch.autograd.graph.saved_tensors_hooks(note, kept):
            made = run()
        return made, sum(size for place, size in held.items() if place not in own)
    except RuntimeError:
        with _Results() as results:
            made = run()
        return made, results.bytes


class _Results(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of every operation's results, except views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if not any(result.alias_info for result in function._schema.returns):
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out
