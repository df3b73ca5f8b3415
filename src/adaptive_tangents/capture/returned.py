"""Which tensor of what a model returns is its output, where no function says so."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adaptive_tangents.checks import listed


def found_output(out: Any) -> Any:
    """The `logits` in a mapping or an object, if they are a tensor; else what the model returned."""
    if isinstance(out, Tensor | tuple | list):
        return out
    logits = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    return logits if isinstance(logits, Tensor) else out


def held(out: Any) -> str:
    """The tensors in a mapping that a model returned, as the end of a sentence; empty for anything else."""
    shapes = (
        [f"{name} {tuple(value.shape)}" for name, value in out.items() if isinstance(value, Tensor)]
        if isinstance(out, Mapping)
        else []
    )
    return f"; it holds {listed(shapes)}" if shapes else ""
