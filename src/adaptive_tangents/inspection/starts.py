"""How blocks start: as a new layer's weights, at zero, or without a kernel; a ratio to such a start says nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from adaptive_tangents.features.blocks import Block

NEW, ZERO, NO_KERNEL = "new", "zero", "no kernel"
_DEVIATIONS = (0.02, 0.01)  # of the normal weights that transformers' heads begin with
_SURE = 5.0  # standard errors
_FEW = 64  # weights, below which normal ones are not told from others


def start_of(block: Block, weights: Tensor, numbers: Mapping[str, Any], blocks: int) -> str | None:
    """How a block starts: without a kernel, with weights of zero, with a new layer's weights, or None of these.

    Args:
        block: the block, of any samples.
        weights: its weights (o, i) at the start.
        numbers: its shares of the trace.
        blocks: how many blocks there are.
    """
    if without_kernel(numbers["trace_share"], blocks):
        return NO_KERNEL
    if min(weights.shape) < 2 and "lora_" not in block.name:
        return None  # biases and norms begin at 0 and 1 in every network
    columns = [slot for slot in block.slots if len(slot.shape) == 1 and slot.width == 1 and slot.column > 0]
    bias = weights[:, columns[0].column] if columns else None
    matrix = weights if bias is None else weights[:, : columns[0].column]
    if not matrix.any():
        return ZERO
    return NEW if looks_new(matrix, bias) else None


def without_kernel(share: Mapping[str, float | None], parts: int) -> bool:
    """Whether a part's kernel is nearly nothing at the start, and is no longer at the end.

    It is if it starts below a fiftieth of the mean part, and its share of the trace is more than 20 times that at the end.
    """
    first, last = share["initial"], share["final"]
    return first is not None and last is not None and first < 0.02 / parts and last > 20 * first


def grew(row: Mapping[str, Any], parts: int) -> float | None:
    """How many times a part's kernel grew; None if it started from nearly nothing, so that no ratio means anything."""
    growth: float | None = row["growth"]["final"]
    return None if without_kernel(row["trace_share"], parts) else growth


def looks_new(matrix: Tensor, bias: Tensor | None) -> bool:
    """Whether weights (o, i) and a bias (o,) look as if drawn for a new layer, and not trained.

    They do if the bias is zero throughout, if they are uniform up to 1/√i as PyTorch's own, or, without a bias, if they are
    normal with the deviation that transformers' heads have.

    >>> import torch
    >>> looks_new(torch.nn.Linear(64, 8).weight.detach(), None)
    True
    """
    if bias is not None and not bias.any():
        return True
    values = matrix.double().flatten()
    count, width = values.numel(), matrix.shape[1]
    scale = float(values.square().mean().sqrt())
    bound = width**-0.5
    if bias is None or float(bias.abs().max()) <= bound * (1 + 1e-3):
        uniform = abs(scale * (3 * width) ** 0.5 - 1) <= _SURE * (0.2 / count) ** 0.5 + 1e-3
        if uniform and bound * (1 - 20 / count) <= float(values.abs().max()) <= bound * (1 + 1e-3):
            return True
    if bias is not None or count < _FEW or scale == 0:
        return False
    tails = float(values.div(scale).pow(4).mean())
    normal = abs(tails - 3) <= _SURE * (24 / count) ** 0.5 and abs(float(values.mean())) <= _SURE * scale / count**0.5
    return normal and any(abs(scale / each - 1) <= _SURE * (0.5 / count) ** 0.5 + 1e-3 for each in _DEVIATIONS)


def new_head(kind: str, starts: Sequence[str | None], others: Sequence[str | None]) -> bool:
    """Whether a layer is a new head: all its matrices start as new ones, and most others of the network do not.

    Args:
        kind: the layer's kind.
        starts: how its matrices start.
        others: how those of all other layers start, adapters left out.
    """
    return (
        kind == "head" and bool(starts) and all(start in (NEW, ZERO) for start in starts) and not from_scratch(others)
    )


def from_scratch(starts: Sequence[str | None]) -> bool:
    """Whether most of a network's matrices start as new ones, so that it starts from scratch.

    >>> from_scratch(["new", "new", None])
    True
    """
    return bool(starts) and 2 * sum(start == NEW for start in starts) > len(starts)
