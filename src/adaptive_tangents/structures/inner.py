"""The scalar problem behind every structure: the minimum over gains, for many singular values or norms at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.penalties.penalty import Composition, Penalty, bend_at, shares


@dataclass(frozen=True)
class Inner:
    """The scalar inner minimum ω̃(v) = min over z_j ≥ 1 of Σ_j ω_j(z_j) + v²/Π z_j² at many v, solved once, on demand.

    ``whole`` is a problem that these values are a part of, from ``start`` on: it is solved for all of its parts at once.
    """

    penalties: tuple[Penalty, ...]
    values: Float[Tensor, "*s"]
    whole: "Inner | None" = None
    start: int = 0

    def _own(self, solved: Float[Tensor, " k"]) -> Float[Tensor, "*s"]:
        """These values' part of what the whole found."""
        return solved[self.start : self.start + self.values.numel()].reshape(self.values.shape)

    @cached_property
    def excess(self) -> tuple[Float[Tensor, "*s"], ...]:
        """The excess z_j − 1 of each penalty."""
        if self.whole is not None:
            return tuple(self._own(solved) for solved in self.whole.excess)
        return shares(self.penalties, self.values)

    @cached_property
    def gains(self) -> Float[Tensor, "*s"]:
        """The product z = Π z_j."""
        if self.whole is not None:
            return self._own(self.whole.gains)
        return torch.stack([1 + excess for excess in self.excess]).prod(0)

    @cached_property
    def _paid(self) -> Float[Tensor, "*s"]:
        """Σ_j ω_j(z_j) for each value."""
        if self.whole is not None:
            return self._own(self.whole._paid)
        pairs = zip(self.penalties, self.excess, strict=True)
        return torch.stack([penalty.value(1 + excess) for penalty, excess in pairs]).sum(0)

    @property
    def spent(self) -> float:
        """Σ ω_j(z_j)."""
        return float(self._paid.sum())

    @property
    def total(self) -> float:
        """Σ ω̃(v)."""
        return float(((self.values / self.gains) ** 2 + self._paid).sum())

    @cached_property
    def slope(self) -> Float[Tensor, "*s"]:
        """ω̃′(v)/v = 2/z², smooth through zero."""
        return 2 / self.gains**2

    @cached_property
    def bend(self) -> Float[Tensor, "*s"]:
        """ω̃″(v)."""
        if self.whole is not None:
            return self._own(self.whole.bend)
        if all(len(penalty.parts) == 1 for penalty in self.penalties):
            logs = [torch.log1p(excess).flatten() for excess in self.excess]
            return bend_at(self.penalties, self.values.flatten(), logs).reshape(self.values.shape)
        return Composition(self.penalties).induced().second_derivative(self.values)


def joint(penalties: tuple[Penalty, ...], values: Sequence[Float[Tensor, "*_s"]]) -> list[Inner]:
    """The scalar problems of several blocks with the same penalties, solved together."""
    whole = Inner(penalties, torch.cat([part.reshape(-1) for part in values]))
    found, start = [], 0
    for part in values:
        found.append(Inner(penalties, part, whole, start))
        start += part.numel()
    return found
