"""Which tensor of what a network returns is its output."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adaptive_tangents.errors import TangentError


def pick(out: Any, call: str = "inspect") -> Tensor:
    """The output tensor (n, c): what the network returns, its `logits`, or the first of several outputs."""
    if isinstance(out, Mapping) and "logits" in out:
        out = out["logits"]
    elif not isinstance(out, Tensor) and hasattr(out, "logits"):
        out = out.logits
    elif isinstance(out, tuple | list) and out:
        out = out[0]
    if not isinstance(out, Tensor):
        raise TangentError(
            f"{call}: the network returned {type(out).__name__}; write a factory whose network returns a tensor (n, c), or "
            "something with .logits"
        )
    rows: Tensor = out[:, None] if out.ndim == 1 else out
    if rows.ndim != 2:
        raise TangentError(
            f"{call}: the network's output has shape {tuple(out.shape)}, expected (n, c), one row per sample; write a "
            "factory whose network returns that, e.g. the output at one position"
        )
    return rows
