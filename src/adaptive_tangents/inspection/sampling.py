"""Which samples are measured, if some of them are held out, and which of these are shown."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MOST, LEAST = 8, 4


def sampled(count: int, held_out: Tensor | None, order: Tensor) -> Tensor:
    """The first ``count`` samples of a random order.

    Those held out are among them in proportion, and at least a quarter of each kind, if there are as many.

    >>> sampled(4, torch.tensor([False] * 9 + [True]), torch.arange(10))
    tensor([0, 1, 2, 9])
    """
    if held_out is None:
        return order[:count].sort().values
    mask = held_out.to(order.device)[order]
    seen, unseen = order[~mask], order[mask]
    quarter = -(-count // 4)
    share = min(max(round(count * len(unseen) / len(order)), quarter), count - quarter)
    few = min(len(unseen), max(share, count - len(seen)))
    return torch.cat([seen[: count - few], unseen[:few]]).sort().values


def held_out_note(held_out: Tensor | None) -> list[str]:
    """The sentence on which of the samples measured are held out."""
    if held_out is None:
        return []
    count, n = int(held_out.sum()), len(held_out)
    return [
        f"{count} of the {n} samples measured are held out. Numbers are of all {n} together, but for those that say which."
    ]


def order_of(change: NDArray[Any]) -> tuple[list[int], list[int]]:
    """The samples whose outputs moved most, most first, and those that moved least, least last."""
    order = np.argsort(-np.linalg.norm(change.astype(float), axis=1), kind="stable").tolist()
    most = order[: min(MOST, (len(order) + 1) // 2)]
    return most, order[max(len(most), len(order) - LEAST) :]
