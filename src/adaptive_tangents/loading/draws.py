"""Which samples are read and measured: the first of a random order of all there are, those held out in proportion."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sampled(count: int, held_out: Tensor | None, order: Tensor, share: float | None = None) -> Tensor:
    """The first ``count`` samples of a random order.

    Those held out are among them in proportion, and at least a quarter of each kind, if there are as many. ``share`` is their
    proportion where only some of the samples were read.

    >>> sampled(4, torch.tensor([False] * 9 + [True]), torch.arange(10))
    tensor([0, 1, 2, 9])
    """
    if held_out is None:
        return order[:count].sort().values
    mask = held_out.to(order.device)[order]
    seen, unseen = order[~mask], order[mask]
    quarter = -(-count // 4)
    share = len(unseen) / len(order) if share is None else share
    wanted = min(max(round(count * share), quarter), count - quarter)
    few = min(len(unseen), max(wanted, count - len(seen)))
    return torch.cat([seen[: count - few], unseen[:few]]).sort().values


def drawn(sizes: Sequence[int], most: int | None, seed: int) -> list[list[int] | None]:
    """Which samples of each source to read if at most ``most`` are wanted of all, in order; None is all of them.

    The second source's are held out. With fewer wanted, some of these are drawn, whether or not the others were read.

    >>> drawn([3, 2], 10, 0), [len(rows) for rows in drawn([90, 10], 8, 0)]
    ([None, None], [6, 2])
    """
    total = sum(sizes)
    if most is None or total <= most:
        return [None] * len(sizes)
    ends = torch.tensor(sizes, device="cpu").cumsum(0).tolist()
    held = None if len(sizes) < 2 else torch.arange(total, device="cpu") >= ends[0]
    chosen = sampled(most, held, shuffled(total, seed)).tolist()
    starts = [end - size for end, size in zip(ends, sizes, strict=True)]
    return [[k - start for k in chosen if start <= k < end] for start, end in zip(starts, ends, strict=True)]


def shuffled(total: int, seed: int) -> Tensor:
    """A random order of so many samples."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed), device="cpu")
