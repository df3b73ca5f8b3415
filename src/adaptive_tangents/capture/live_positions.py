"""Positions that no output depends on are left out of a layer's signals: of a language model's head, all but the last token.

A position is live if the gradient of some output is not zero there. Each sample keeps as many positions as the sample
with the most live ones, so positions may differ from sample to sample.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from adaptive_tangents.runtime.memory import empty

_WORTH = 2  # gradients with at least one live position in so many stay whole


@dataclass
class LiveGradients:
    """The gradients (n, *positions, o) of several outputs at one place, kept where they are not zero."""

    shape: tuple[int, ...]
    places: list[Bool[Tensor, "n t"]] = field(default_factory=list)
    values: list[Float[Tensor, "_rows o"]] = field(default_factory=list)

    def add(self, gradient: Tensor) -> None:
        """The gradient of the next output."""
        rows = gradient.flatten(1, -2)
        live = (rows != 0).any(-1)
        self.places.append(live)
        self.values.append(rows[live])

    @property
    def few(self) -> bool:
        """Whether few positions are live so far."""
        live = torch.stack(self.places).any(0)
        return _WORTH * int(live.sum(1).max()) <= live.shape[1]

    def joined(self) -> tuple[Float[Tensor, "c n *rest"], Int[Tensor, "n s"] | None]:
        """The gradients of all outputs: at the live positions (c, n, s, o), with their indices, or whole with None."""
        live = torch.stack(self.places).any(0)
        (n, t), c, few = live.shape, len(self.places), self.few
        index = _first(live) if few else torch.arange(t, device=live.device).expand(n, t)
        place = live.cumsum(1) - 1 if few else index
        made = empty((n, index.shape[1], c, self.shape[-1]), self.values[0]).zero_()
        for j, own in enumerate(self.places):
            rows, columns = own.nonzero(as_tuple=True)
            made[rows, place[rows, columns], j] = self.values[j]
            self.values[j] = self.values[j][:0]
        gradients = made.movedim(2, 0)
        return (gradients, index) if few else (gradients.reshape(c, *self.shape), None)


def _first(live: Bool[Tensor, "n t"]) -> Int[Tensor, "n s"]:
    """The live positions of each sample in order, then others."""
    most = max(1, int(live.sum(1).max()))
    return live.byte().argsort(dim=1, descending=True, stable=True)[:, :most]


def at_positions(x: Tensor, index: Int[Tensor, "n s"], positions: int) -> Tensor:
    """A layer's inputs (n, *positions, ...) with so many dimensions of positions, at some of them for each sample."""
    flat = x.reshape(len(x), -1, *x.shape[1 + positions :])
    return flat[torch.arange(len(x), device=x.device)[:, None], index]
