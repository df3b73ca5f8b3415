"""Argument checks that all wings share."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn import functional

from adaptive_tangents.errors import TangentError

Values = Shaped[Tensor, "..."] | Shaped[np.ndarray, "..."] | Sequence[Any]

OF_CLASSES = "and of class numbers y those of torch.nn.functional.one_hot(y)"


def from_array(array: np.ndarray[Any, Any]) -> Tensor:
    """An array as a tensor, which shares its memory where torch can: not if it is read-only, or has negative strides."""
    shared = array.flags.writeable and min(array.strides, default=0) >= 0
    return torch.from_numpy(array if shared else array.copy())


def as_tensor(call: str, what: str, values: object, device: torch.device) -> Tensor:
    """A tensor unchanged; an array or a list as a tensor on ``device``, a list's floats in float64."""
    if isinstance(values, Tensor):
        return values
    try:
        if isinstance(values, Sequence) and len(values) and all(isinstance(part, Tensor) for part in values):
            return torch.stack(list(values))
        array = np.asarray(values)
        return from_array(array).to(device)
    except (TypeError, ValueError, RuntimeError) as failure:
        raise TangentError(
            f"{call}: give {what} as a tensor, a NumPy array or a list of numbers, got {type(values).__name__}"
        ) from failure


def check_finite(call: str, what: str, values: Sequence[Tensor]) -> None:
    """Raise TangentError naming the first sample (first dimension) with a non-finite value."""
    for tensor in values:
        if tensor.is_floating_point() and tensor.numel():
            finite = torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all()
            if not bool(finite):
                bad = (~torch.isfinite(tensor)).flatten(1).any(1) if tensor.ndim > 1 else ~torch.isfinite(tensor)
                first = int(bad.nonzero()[0, 0])
                raise TangentError(
                    f"{call}: {what} of sample {first} is not finite; remove the sample or fix its values"
                )


def check_real(call: str, y: Tensor, wanted: str = "real residuals y − f(x;θ₀), e.g. r.double()") -> None:
    """Raise TangentError for targets that are no real numbers, such as class numbers."""
    if not y.is_floating_point():
        raise TangentError(f"{call}: targets are {y.dtype}; give {wanted}, {OF_CLASSES}")


def class_columns(call: str, y: Tensor, outputs: int | None) -> Tensor:
    """Targets in float64, class numbers (n,) one-hot; ``outputs`` is how many columns they must have, None is any.

    Real numbers are taken as they are. Integers are class numbers, never amounts, unless they are two of −1, 0 and 1; so are
    these where there is a column for each class.
    """
    if y.is_complex():
        raise TangentError(f"{call}: targets are {y.dtype}; give real ones, such as y.real")
    if y.is_floating_point() or y.ndim == 0:
        return y.detach().double()
    y = y.long()
    numbers = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    kinds, index = torch.unique(numbers, return_inverse=True)
    several = outputs is not None and outputs > 1 and numbers.ndim == 1
    if not several and len(kinds) <= 2 and set(kinds.tolist()) <= {-1, 0, 1}:
        return y.double()
    if numbers.ndim > 1 or outputs == 1 or len(kinds) == len(y) > 2:
        raise TangentError(
            f"{call}: targets are integers of {len(kinds)} values{_two(kinds)}, which are class numbers and no amounts; give "
            "amounts as real numbers, y.double(), and classes as columns, torch.nn.functional.one_hot(y)"
        )
    if not several:
        return functional.one_hot(index, len(kinds)).double()
    if int(kinds.min()) < 0 or int(kinds.max()) >= (outputs or 0):
        raise TangentError(
            f"{call}: targets are class numbers from {int(kinds.min())} to {int(kinds.max())} and there are {outputs} "
            "outputs; number the classes from 0, one output for each"
        )
    return functional.one_hot(numbers, outputs or 0).double()


def _two(kinds: Tensor) -> str:
    return f" ({', '.join(map(str, kinds.tolist()))})" if len(kinds) <= 2 else ""


def check_choice(call: str, name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise TangentError unless an option is one of those known."""
    if value not in known:
        raise TangentError(f"{call}: {name} is one of {', '.join(known)}, got {value!r}")


def listed(names: Iterable[str], *, most: int = 8) -> str:
    """The first ``most`` names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
