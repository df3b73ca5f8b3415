"""Which of the samples measured are held out, and which of them are shown."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

MOST, LEAST = 8, 4


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
