"""Checks of arguments that every wing shares."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from adaptive_tangents.errors import TangentError


def check_finite(call: str, what: str, values: Sequence[Tensor]) -> None:
    """Raise TangentError naming the first sample (first dimension) with a non-finite value."""
    for tensor in values:
        if tensor.is_floating_point() and tensor.numel():
            finite = torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all()
            if not bool(finite):
                bad = (~torch.isfinite(tensor)).flatten(1).any(1) if tensor.ndim > 1 else ~torch.isfinite(tensor)
                first = int(bad.nonzero()[0, 0])
                raise TangentError(
                    f"{call}: {what} of sample {first} is not finite; remove the sample or mend what made it so"
                )


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise TangentError for an option that is none of those known."""
    if value not in known:
        raise TangentError(f"fit: {name} is one of {', '.join(known)}, got {value!r}")


def listed(names: Iterable[str], *, most: int = 8) -> str:
    """The first names in words, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
