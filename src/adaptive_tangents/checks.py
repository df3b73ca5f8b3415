"""Argument checks that all wings share."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from adaptive_tangents.errors import TangentError

Values = Shaped[Tensor, "..."] | Shaped[np.ndarray, "..."] | Sequence[Any]


def as_tensor(call: str, what: str, values: object, device: torch.device) -> Tensor:
    """A tensor unchanged; an array or a list as a tensor on ``device``, a list's floats in float64."""
    if isinstance(values, Tensor):
        return values
    try:
        if isinstance(values, Sequence) and len(values) and all(isinstance(part, Tensor) for part in values):
            return torch.stack(list(values))
        array = np.asarray(values)
        return torch.from_numpy(array.copy() if min(array.strides, default=0) < 0 else array).to(device)
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


def check_choice(call: str, name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise TangentError unless an option is one of those known."""
    if value not in known:
        raise TangentError(f"{call}: {name} is one of {', '.join(known)}, got {value!r}")


def listed(names: Iterable[str], *, most: int = 8) -> str:
    """The first ``most`` names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
