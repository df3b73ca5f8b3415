"""Penalties ω on the singular values of a transform, their composition ⊕, and the penalty ω̃ each induces on coefficients.

Everything follows from one scalar function of a penalty, its *pull* u(z) = z·ω′(z)/2, and the inverse, its *gain* z(u).
Where several penalties share one value, their parts have the same u (the multiplier of Π z_j = z), so ⊕ multiplies gains;
and at the minimiser of ω(z) + v²/z² that u equals v²/z², so ω̃(v) = Σ_j ω_j(z_j(u)) + u where u·Π z_j(u)² = v².
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.errors import TangentError

_NEWTON_STEPS = 100


class Penalty(ABC):
    """A penalty ω on a singular value z ≥ 1 of a transform: ω(1) = 0, nondecreasing, ω∘exp convex."""

    @abstractmethod
    def value(self, z: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """ω(z)."""

    @abstractmethod
    def pull(self, z: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The pull u = z·ω′(z)/2."""

    @abstractmethod
    def excess(self, u: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The excess z − 1 of the gain z(u), accurate where z is close to 1."""

    @abstractmethod
    def elasticity(self, u: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The elasticity d log z / d log u along the gain."""

    @abstractmethod
    def dual(self, s: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """ω̃*(s) = sup over z ≥ 1 of s²z²/4 − ω(z)."""

    @property
    def parts(self) -> tuple["Penalty", ...]:
        """The penalties this one is composed of."""
        return (self,)

    def compose(self, other: "Penalty") -> "Composition":
        """(ω₁ ⊕ ω₂)(z) = min over 1 ≤ a ≤ z of ω₁(a) + ω₂(z/a): two transforms acting on one value.

        >>> Quadratic(1.0).compose(Quadratic(1.0)).value(torch.tensor([4.0]))
        tensor([2.])
        """
        return Composition(self.parts + other.parts)

    def induced(self) -> "Induced":
        """ω̃(v) = min over z ≥ 1 of ω(z) + v²/z², with its derivative, minimiser and dual."""
        return Induced(self)


@dataclass(frozen=True)
class Quadratic(Penalty):
    """ω(z) = λ(z − 1)².

    The penalty it induces is convex and like Huber's: v² near 0, 2√λ·v for large v; its dual is λq/(1 − q), q = s²/(4λ).
    Raises TangentError unless λ is positive and finite. Source: LeJeune & Alemohammad, CPAL 2024, §3.

    >>> Quadratic(2.0).induced().minimizer(torch.tensor([4.0]))  # λ(z − 1)z³ = v²
    tensor([2.])
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        _check_strength(self)

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

    def dual(self, s: Tensor) -> Tensor:
        q = s**2 / (4 * self.strength)
        return torch.where(q < 1, self.strength * q / (1 - q), torch.inf)


@dataclass(frozen=True)
class Absolute(Penalty):
    """ω(z) = λ(z − 1).

    The penalty it induces is v² up to v² = λ/2, then 3(λ/2)^⅔ v^⅔ − λ: not convex, and without a dual bound.
    Raises TangentError unless λ is positive and finite. Source: LeJeune & Alemohammad, CPAL 2024, §3.

    >>> Absolute(2.0).induced().minimizer(torch.tensor([0.5, 8.0]))
    tensor([1., 4.])
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        _check_strength(self)

    def value(self, z: Tensor) -> Tensor:
        return self.strength * (z - 1)

    def pull(self, z: Tensor) -> Tensor:
        return self.strength * z / 2

    def excess(self, u: Tensor) -> Tensor:
        return (2 * u / self.strength - 1).clamp_min(0)

    def elasticity(self, u: Tensor) -> Tensor:
        return (2 * u > self.strength).to(u.dtype)

    def dual(self, s: Tensor) -> Tensor:
        return _no_bound(s)


@dataclass(frozen=True)
class Composition(Penalty):
    """ω₁ ⊕ ... ⊕ ω_k, the least that k ≥ 2 transforms together pay for one value z = Π z_j; k equal ones pay k·ω(z^{1/k})."""

    penalties: tuple[Penalty, ...]

    @property
    def parts(self) -> tuple[Penalty, ...]:
        return self.penalties

    def value(self, z: Tensor) -> Tensor:
        u = self.pull(z)
        return _total([part.value(1 + part.excess(u)) for part in self.penalties])

    def pull(self, z: Tensor) -> Tensor:
        # One part alone would need at most its own pull at z, and every part can only help: start there, from above.
        above = torch.stack([part.pull(z) for part in self.penalties]).amin(0)
        return _solve(self, z.log(), above, own=0.0, gain=1.0)

    def excess(self, u: Tensor) -> Tensor:
        return torch.expm1(_total([torch.log1p(part.excess(u)) for part in self.penalties]))

    def elasticity(self, u: Tensor) -> Tensor:
        return _total([part.elasticity(u) for part in self.penalties])

    def dual(self, s: Tensor) -> Tensor:
        return _no_bound(s)


@dataclass(frozen=True)
class Induced:
    """The penalty on coefficients that a penalty on transforms induces, ω̃(v) = min over z ≥ 1 of ω(z) + v²/z², v ≥ 0.

    >>> Quadratic(1.0).induced().value(torch.tensor([0.0, 1e-3]))
    tensor([0.0000e+00, 1.0000e-06])
    """

    penalty: Penalty

    def level(self, v: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The common u = v²/z(v)², from which every other quantity follows."""
        return _solve(self.penalty, 2 * v.log(), v**2, own=1.0, gain=2.0)

    def value(self, v: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """ω̃(v)."""
        u = self.level(v)
        return u + _total([part.value(1 + part.excess(u)) for part in self.penalty.parts])

    def derivative(self, v: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """ω̃′(v) = 2v/z(v)²."""
        return 2 * v / self.minimizer(v) ** 2

    def minimizer(self, v: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """z(v), the singular value of the transform."""
        return 1 + self.penalty.excess(self.level(v))

    def dual(self, s: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """ω̃*(s), infinite where the penalty gives no bound."""
        return self.penalty.dual(s)


def _solve(penalty: Penalty, target: Tensor, above: Tensor, *, own: float, gain: float) -> Tensor:
    """The u ≤ above with own·log u + gain·log z(u) = target: Newton in log u, kept within the bracket found so far."""
    # log z is a convex function of log u for the penalties here, so that a start above the root falls to it without ever
    # leaving the bracket; a user's own penalty may be of another shape, or overflow at the start.
    high = above.log()
    low, position = torch.full_like(high, -torch.inf), high
    for _ in range(_NEWTON_STEPS):
        u = position.exp()
        error = own * position + gain * torch.log1p(penalty.excess(u)) - target
        high, low = torch.where(error > 0, position, high), torch.where(error <= 0, position, low)
        newton = torch.where(error == 0, position, position - error / (own + gain * penalty.elasticity(u)))
        middle = torch.where(low.isinf(), high - 2 - high.abs(), (low + high) / 2)
        following = torch.where((newton >= low) & (newton <= high) & newton.isfinite(), newton, middle)
        step, position = (following - position).abs(), following
        if not bool((step > 4 * torch.finfo(u.dtype).eps * (1 + position.abs())).any()):
            break
    return torch.where(above > 0, position.exp(), 0.0)


def _total(values: list[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _no_bound(s: Tensor) -> Tensor:
    """The dual of a penalty that grows more slowly than z²: zero at 0 and infinite elsewhere."""
    return torch.where(s == 0, 0.0, torch.inf).to(s.dtype)


def _check_strength(penalty: Quadratic | Absolute) -> None:
    name = type(penalty).__name__
    if not 0 < penalty.strength < float("inf"):
        raise TangentError(
            f"{name}: the strength λ is positive and finite, got {penalty.strength}; use Fixed() for no adaptation"
        )
