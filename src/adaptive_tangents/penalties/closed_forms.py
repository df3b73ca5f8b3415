"""Penalties with closed forms: each gives its pull, the inverse of it and its growth; ``penalty`` derives the rest."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.penalties.checks import check_strength
from adaptive_tangents.penalties.penalty import Composition, Induced, Penalty, shares
from adaptive_tangents.penalties.shared_minimum import no_bound

__all__ = [
    "Absolute", "Composition", "Induced", "LogSquared", "NoAdaptation", "Penalty", "Power", "Quadratic", "shares",
]  # fmt: skip

_NEWTON_STEPS = 100


class _Closed(Penalty):
    """A penalty with ω∘exp strictly convex (or kinked at 1) and an elasticity that rises to a known limit."""

    def log_gain(self, u: Tensor) -> Tensor:
        return torch.log1p(self.excess(u))

    @property
    def shares_level(self) -> bool:
        return True


@dataclass(frozen=True)
class Quadratic(_Closed):
    """ω(z) = λ(z − 1)².

    The induced penalty is convex and resembles Huber's: v² near 0, 2√λ·v for large v. Its dual is λq/(1 − q), q = s²/(4λ).

    Args:
        strength: λ > 0, the factor of the penalty.

    Raises:
        TangentError: when λ is not positive and finite.

    Source: LeJeune & Alemohammad, CPAL 2024, §3.

    >>> Quadratic(2.0).induced().minimizer(torch.tensor([4.0]))  # λ(z − 1)z³ = v²
    tensor([2.])
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        check_strength("Quadratic", self.strength)

    def value(self, z: Tensor) -> Tensor:
        return self.strength * (z - 1) ** 2

    def pull(self, z: Tensor) -> Tensor:
        return self.strength * (z - 1) * z

    def excess(self, u: Tensor) -> Tensor:
        ratio = u / self.strength
        return 2 * ratio / (1 + torch.sqrt(1 + 4 * ratio))

    def elasticity(self, u: Tensor) -> Tensor:
        excess = self.excess(u)
        return excess / (1 + 2 * excess)

    @property
    def limit_elasticity(self) -> float:
        return 0.5

    def dual(self, s: Tensor) -> Tensor:
        q = s**2 / (4 * self.strength)
        return torch.where(q < 1, self.strength * q / (1 - q), torch.inf)


@dataclass(frozen=True)
class Absolute(_Closed):
    """ω(z) = λ(z − 1).

    The induced penalty is v² up to v² = λ/2, then 3(λ/2)^⅔ v^⅔ − λ. It is not convex and gives no dual bound.

    Args:
        strength: λ > 0, the factor of the penalty.

    Raises:
        TangentError: when λ is not positive and finite.

    Source: LeJeune & Alemohammad, CPAL 2024, §3.

    >>> Absolute(2.0).induced().minimizer(torch.tensor([0.5, 8.0]))
    tensor([1., 4.])
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        check_strength("Absolute", self.strength)

    def value(self, z: Tensor) -> Tensor:
        return self.strength * (z - 1)

    def pull(self, z: Tensor) -> Tensor:
        return self.strength * z / 2

    def excess(self, u: Tensor) -> Tensor:
        return (2 * u / self.strength - 1).clamp_min(0)

    def elasticity(self, u: Tensor) -> Tensor:
        return (2 * u > self.strength).to(u.dtype)

    @property
    def limit_elasticity(self) -> float:
        return 1.0

    def dual(self, s: Tensor) -> Tensor:
        return no_bound(s)


@dataclass(frozen=True)
class Power(_Closed):
    """ω(z) = λ(z − 1)^q, q ≥ 1; ``Quadratic`` at q = 2, ``Absolute`` at q = 1.

    The induced penalty grows like v^{2q/(q+2)}. It is convex for q ≥ 2, and its dual is finite everywhere for q > 2.

    Args:
        q: the exponent, at least 1; below 1, ω∘exp is not convex.
        strength: λ > 0, the factor of the penalty.

    Raises:
        TangentError: when q is below 1 or not finite, or λ is not positive and finite.

    Source: LeJeune & Alemohammad, CPAL 2024, §3 (any ω).

    >>> Power(3.0, strength=2.0).induced().minimizer(torch.tensor([24**0.5]))  # qλ(z − 1)^{q−1}z³ = 2v²
    tensor([2.])
    """

    q: float
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_strength("Power", self.strength)
        if not 1 <= self.q < math.inf:
            raise TangentError(
                f"Power: q is finite and at least 1, got {self.q}; for a smaller one give "
                "Penalty(lambda z: (z - 1) ** q), which is solved numerically"
            )

    def value(self, z: Tensor) -> Tensor:
        return self.strength * (z - 1).clamp_min(0) ** self.q

    def pull(self, z: Tensor) -> Tensor:
        return self.strength * self.q / 2 * (z - 1).clamp_min(0) ** (self.q - 1) * z

    def excess(self, u: Tensor) -> Tensor:
        ratio = 2 * u / (self.strength * self.q)
        if self.q == 1:
            return (ratio - 1).clamp_min(0)
        # y = log(z − 1) solves (q − 1)y + log(1 + eʸ) = log ratio, convex and increasing: Newton descends to the root.
        target = torch.where(ratio > 0, ratio, 1.0).log()
        y = torch.minimum(target / (self.q - 1), target / self.q)
        for _ in range(_NEWTON_STEPS):
            error = (self.q - 1) * y + torch.nn.functional.softplus(y, threshold=40) - target
            step = error / (self.q - 1 + torch.sigmoid(y))
            y = y - step
            if not bool((step.abs() > torch.finfo(y.dtype).eps * (1 + y.abs())).any()):
                break
        return torch.where(ratio > 0, y.exp(), 0.0)

    def elasticity(self, u: Tensor) -> Tensor:
        excess = self.excess(u)
        return torch.where(excess > 0, excess / (self.q * excess + self.q - 1), 0.0)

    @property
    def limit_elasticity(self) -> float:
        return 1 / self.q

    def dual(self, s: Tensor) -> Tensor:
        return Quadratic(self.strength).dual(s) if self.q == 2 else super().dual(s)


@dataclass(frozen=True)
class LogSquared(_Closed):
    """ω(z) = λ(log z)², the same for z and 1/z.

    u = λ log z, so z(v) = exp(W/2) and ω̃(v) = λW²/4 + λW/2 with W = W(2v²/λ), Lambert's function. The induced penalty
    grows like (log v)², is not convex, and gives no dual bound.

    Args:
        strength: λ > 0, the factor of the penalty.

    Raises:
        TangentError: when λ is not positive and finite.

    Source: LeJeune & Alemohammad, CPAL 2024, §3 (any ω).

    >>> LogSquared(2.0).induced().minimizer(torch.tensor([math.e]))  # λ z² log z = v²
    tensor([2.1784])
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        check_strength("LogSquared", self.strength)

    def value(self, z: Tensor) -> Tensor:
        return self.strength * z.log() ** 2

    def pull(self, z: Tensor) -> Tensor:
        return self.strength * z.log()

    def log_gain(self, u: Tensor) -> Tensor:
        return u / self.strength

    def excess(self, u: Tensor) -> Tensor:
        return torch.expm1(u / self.strength)

    def elasticity(self, u: Tensor) -> Tensor:
        return u / self.strength

    @property
    def limit_elasticity(self) -> float:
        return math.inf

    def dual(self, s: Tensor) -> Tensor:
        return no_bound(s)


@dataclass(frozen=True)
class NoAdaptation(_Closed):
    """ω(z) = 0 at z = 1, infinite beyond: the side with this penalty is not transformed.

    ω̃(v) = v² with z(v) = 1, and the dual is s²/4, as for the fixed kernel. Composing with it changes nothing.

    Source: LeJeune & Alemohammad, CPAL 2024, §3.

    >>> NoAdaptation().induced().value(torch.tensor([3.0]))
    tensor([9.])
    """

    @property
    def strength(self) -> float:  # type: ignore[override]
        """1: this penalty has no strength, so v has no scale."""
        return 1.0

    def value(self, z: Tensor) -> Tensor:
        return torch.where(z <= 1, 0.0, torch.inf).to(z.dtype)

    def pull(self, z: Tensor) -> Tensor:
        return torch.where(z <= 1, 0.0, torch.inf).to(z.dtype)

    def excess(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u)

    def elasticity(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u)

    @property
    def limit_elasticity(self) -> float:
        return 0.0

    def dual(self, s: Tensor) -> Tensor:
        return s**2 / 4
