"""Samples that influence each other: outputs of a batch beside those of its samples alone, at θ₀ and near it.

Near θ₀, as an influence may begin at zero there: behind a gate, or through a projection of zeros.
"""

from contextlib import suppress

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptive_tangents.capture.batches import Batch, samples, take
from adaptive_tangents.capture.differences import nearby
from adaptive_tangents.capture.network import Network
from adaptive_tangents.errors import TangentError


def check_interaction(
    net: Network, x: Batch, together: Float[Tensor, "n c"], first: Float[Tensor, " c"], least: torch.dtype
) -> None:
    """Raise TangentError if the first or the last sample has other outputs in the batch than alone.

    The last one too: a model that compares every sample with the first of its batch passes on the first. ``first`` are
    outputs of the first sample alone, and ``least`` is the least precise dtype of the network.
    """
    n = samples(x)
    if n == 1:
        return
    ends = take(x, slice(0, 1)), take(x, slice(n - 1, n))
    with torch.no_grad():
        _check_ends(net, together, first, net(ends[1], {})[0], least)
        moved, near = nearby(net), list[Tensor]()
        with suppress(Exception):  # a model may refuse other parameters
            near = [moved(part, {}) for part in (x, *ends)]
    if near and bool(torch.isfinite(near[0]).all()):
        _check_ends(net, near[0], near[1][0], near[2][0], least)


def _check_ends(net: Network, together: Tensor, first: Tensor, last: Tensor, least: torch.dtype) -> None:
    for k, alone in ((0, first), (len(together) - 1, last)):
        found = gap(together[k], alone, together)
        if not found <= allowed_gap(least):
            raise TangentError(
                f"{net.call}: the output of the {'last' if k else 'first'} sample is different in the batch "
                f"and alone (by {found:.1e} of the largest output), so samples of a batch influence each other or "
                "outputs are random; take out what mixes the batch, e.g. batch statistics or dropout"
            )


def check_part(
    net: Network, part: Float[Tensor, "k c"], index: Int[Tensor, " k"], out: Float[Tensor, "n c"], least: torch.dtype
) -> None:
    """Raise TangentError if some samples have other outputs in the whole batch than in a part of it."""
    found = gap(out[index], part, out)
    if found > allowed_gap(least):
        raise TangentError(
            f"{net.call}: outputs are different in the whole batch and in a part of it (by {found:.1e} of the largest "
            "output), so samples of a batch influence each other; take out what mixes the batch"
        )


def gap(one: Tensor, two: Tensor, all_outputs: Tensor) -> float:
    """The largest difference of some outputs, over the largest of all."""
    scale = max(float(all_outputs.abs().max()), torch.finfo(all_outputs.dtype).tiny)
    return float((one - two).abs().max()) / scale


def allowed_gap(dtype: torch.dtype) -> float:
    """The gap that rounding explains."""
    return float(30 * torch.finfo(dtype).eps ** 0.75)
