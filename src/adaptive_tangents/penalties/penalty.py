"""Penalties ω on the singular values of a transform, their composition ⊕, and the penalty ω̃ each induces on coefficients.

Where ω∘exp is convex, everything follows from the *pull* u(z) = z·ω′(z)/2 and its inverse, the *gain* z(u). Parts that share
one value have the same u (the multiplier of Π z_j = z), so ⊕ multiplies gains. At the minimizer of ω(z) + v²/z² this u is the
*level* v²/z², so ω̃(v) = Σ_j ω_j(z_j(u)) + u where u·Π z_j(u)² = v². A user's ω may have ω∘exp not convex; then all valleys
of ω(z) + v²/z² are searched for its z, and the other parts are solved for at each candidate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.penalties.checks import Function, check_function, check_strength
from adaptive_tangents.penalties.scalar_search import increasing_root
from adaptive_tangents.penalties.shared_minimum import (
    HALF,
    LARGEST,
    joint_dual,
    least_sum,
    least_value,
    limit_elasticity,
    minimizers,
    shared_pull,
    to_identity,
    total,
    total_cost,
)


class Penalty:
    """A penalty λω(z) on a singular value z ≥ 1 of a transform, from a function; the base class of all penalties.

    All quantities are found numerically, values to a relative 1e-10. Where ω∘exp is not convex, each further penalty in a
    composition makes it about a thousand times slower.

    Args:
        function: ω, elementwise on tensors of any shape. ω(1) = 0; ω does not decrease and grows without bound. It may have
            kinks and jumps, be infinite from some z on, and leave several valleys in ω(z) + v²/z².
        strength: λ > 0, the factor of the penalty.
        derivative: ω′, elementwise; None uses autograd.

    Raises:
        TangentError: when λ is not positive and finite, or the function is not such an ω.

    Source: LeJeune & Alemohammad, CPAL 2024, §3 (any ω).

    >>> cubic = Penalty(lambda z: (z - 1) ** 3, strength=2.0)
    >>> cubic.induced().minimizer(torch.tensor([24**0.5]))  # 3λ(z − 1)²z³ = 2v²
    tensor([2.])
    """

    def __init__(self, function: Function, *, strength: float = 1.0, derivative: Function | None = None) -> None:
        check_strength(type(self).__name__, strength)
        check_function(function, derivative)
        self.function, self.strength, self.derivative = function, strength, derivative

    strength: float

    def __repr__(self) -> str:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return f"Penalty({name}, strength={self.strength:g})"

    def value(self, z: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """ω(z), λ included.

        Args:
            z: singular values of the transform, at least 1, any shape.
        """
        return self.strength * self.function(z)

    def pull(self, z: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The pull u = z·ω′(z)/2, infinite where ω is.

        Args:
            z: singular values of the transform, at least 1, any shape.
        """
        if self.derivative is not None:
            slope = self.strength * self.derivative(z)
        else:
            with torch.enable_grad():
                at = z.detach().requires_grad_()
                total = self.value(at)
                slope = torch.zeros_like(z)
                if total.requires_grad:
                    slope = torch.autograd.grad(torch.where(total.isfinite(), total, 0.0).sum(), at)[0]
        return torch.where(self.value(z.detach()).isfinite(), z * slope / 2, torch.inf)

    def log_gain(self, u: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The inverse of the pull, log z(u).

        Args:
            u: levels, ≥ 0, any shape.

        Raises:
            TangentError: when a level does not determine z.
        """
        if not self.shares_level:
            raise TangentError(
                f"{self}: ω∘exp is not strictly convex, so a level does not determine z; "
                "use induced().minimizer(v) or shares(penalties, v)"
            )
        points, pulls = (t.to(u.device) for t in self._table)
        index = torch.searchsorted(pulls.cummax(0).values, u.double().contiguous(), right=True).clamp(
            1, len(points) - 1
        )
        wanted = u.double()
        found = increasing_root(lambda x: self.pull(x.exp()) / wanted - 1, points[index - 1], points[index])
        return torch.where(u > 0, to_identity(found), 0.0).to(u.dtype)

    def excess(self, u: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The excess z(u) − 1, accurate where z is close to 1; raises as ``log_gain`` does.

        Args:
            u: levels, ≥ 0, any shape.
        """
        return torch.expm1(self.log_gain(u))

    def elasticity(self, u: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The elasticity d log z / d log u at the level u.

        Args:
            u: levels, ≥ 0, any shape.
        """
        x = self.log_gain(u)
        kinked = (self.pull(x.exp()) / u - 1).abs() > 1e-6  # u lies between the slopes at a kink: z stays
        return torch.where(kinked, 0.0, self.steepness(x))

    def steepness(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The elasticity d log z / d log u at log z = x, by a central difference.

        Args:
            x: log z ≥ 0, any shape.
        """
        step = 1e-5 * x.clamp(1e-6, 1.0)
        low = (x - step).clamp_min(0)
        rise = self.pull((x + step).exp()).log() - self.pull(low.exp()).log()
        return (x + step - low) / rise

    def dual(self, s: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """ω̃*(s) = sup over z ≥ 1 of s²z²/4 − ω(z), infinite where ω grows too slowly.

        Args:
            s: singular values of dual matrices, ≥ 0, any shape.
        """
        return joint_dual(self.parts, s.detach().double().flatten()).reshape(s.shape).to(s.dtype)

    @property
    def parts(self) -> tuple["Penalty", ...]:
        """The penalties this one is composed of."""
        return (self,)

    @property
    def limit_elasticity(self) -> float | None:
        """The supremum of the elasticity, if known in closed form and approached as u grows; else None."""
        return None

    @property
    def shares_level(self) -> bool:
        """Whether a level u determines z: ω∘exp is strictly convex (tested at 3,000 points)."""
        return self._strictly_convex

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        points = torch.logspace(-6, math.log10(LARGEST), 3000, dtype=torch.float64, device="cpu")
        points = torch.cat([points.new_zeros(1), points])
        return points, self.pull(points.exp())

    @cached_property
    def _strictly_convex(self) -> bool:
        points, pulls = self._table
        # Where the pull barely rises, a level determines no digit of z: count that as straight.
        rise = pulls[1:] - pulls[:-1] * (1 + 1e-6 * points.diff())
        noise = 1e-12 * pulls[:-1].nan_to_num(posinf=0.0)
        straight = ~(pulls[1:].isinf() | (rise >= -noise))
        # A derivative misses a jump, so the values must rise as the pulls predict.
        values = self.value(points.exp())
        most = 2 * pulls[1:] * points.diff() * (1 + 1e-6) + 1e-9 * values[1:].abs()
        jumps = values[1:].isfinite() & (values.diff() > most)
        return not bool((straight | jumps).any())

    def compose(self, *others: "Penalty") -> "Composition":
        """(ω₁ ⊕ ω₂)(z) = min over 1 ≤ a ≤ z of ω₁(a) + ω₂(z/a): several transforms acting on one value.

        Args:
            others: the penalties to compose this one with.

        >>> from adaptive_tangents.penalties import Quadratic
        >>> Quadratic(1.0).compose(Quadratic(1.0)).value(torch.tensor([4.0]))
        tensor([2.])
        """
        return Composition((self, *others))

    def induced(self) -> "Induced":
        """ω̃(v) = min over z ≥ 1 of ω(z) + v²/z², with its derivatives, minimizer, dual and proximal operator."""
        return Induced(self)


@dataclass(frozen=True, init=False)
class Composition(Penalty):
    """ω₁ ⊕ ... ⊕ ω_k, the least that k transforms together pay for one value z = Π z_j; k equal ones pay k·ω(z^{1/k}).

    This is the infimal convolution of the ω_j∘exp.

    Args:
        penalties: one or more penalties; compositions among them are flattened into their parts.

    Raises:
        TangentError: when there are no penalties, or something else is among them.

    Source: LeJeune & Alemohammad, CPAL 2024, §3.

    >>> from adaptive_tangents.penalties import NoAdaptation, Quadratic
    >>> Composition((Quadratic(1.0), NoAdaptation())).value(torch.tensor([3.0]))
    tensor([4.])
    """

    penalties: tuple[Penalty, ...]

    def __init__(self, penalties: Sequence[Any]) -> None:
        wrong = [p for p in penalties if not isinstance(p, Penalty)]
        if wrong or not penalties:
            raise TangentError(
                f"compose: give one or more penalties, got {wrong[0]!r}; "
                "wrap a function of your own as Penalty(function)" if wrong else "compose: give one or more penalties"
            )  # fmt: skip
        object.__setattr__(self, "penalties", tuple(penalties))

    def __repr__(self) -> str:
        return " ⊕ ".join(map(repr, self.parts))

    @property
    def parts(self) -> tuple[Penalty, ...]:
        return tuple(part for penalty in self.penalties for part in penalty.parts)

    @property
    def limit_elasticity(self) -> float | None:
        return limit_elasticity(self.parts)

    @property
    def shares_level(self) -> bool:
        return all(part.shares_level for part in self.parts)

    def value(self, z: Tensor) -> Tensor:
        x = z.detach().double().flatten().log().clamp_min(0)
        return least_value(self.parts, x).reshape(z.shape).to(z.dtype)

    def pull(self, z: Tensor) -> Tensor:
        x = z.detach().double().flatten().log().clamp_min(0)
        if self.shares_level:
            return shared_pull(self.parts, x).reshape(z.shape).to(z.dtype)
        shares = torch.stack(least_sum(self.parts, x))
        pulls = torch.stack([part.pull(share.exp()) for part, share in zip(self.parts, shares, strict=True)])
        # The part with the largest share is interior (it could grow or shrink), so its pull is the multiplier.
        return pulls.gather(0, shares.argmax(0, keepdim=True))[0].reshape(z.shape).to(z.dtype)

    def log_gain(self, u: Tensor) -> Tensor:
        return total([part.log_gain(u) for part in self.parts])

    def elasticity(self, u: Tensor) -> Tensor:
        return total([part.elasticity(u) for part in self.parts])


@dataclass(frozen=True)
class Induced:
    """The penalty on coefficients that a penalty on transforms induces, ω̃(v) = min over z ≥ 1 of ω(z) + v²/z², v ≥ 0.

    Methods compute in float64 and return v's dtype, without autograd: the gradient is ``derivative``. Where several z are
    best, one is taken.

    Args:
        penalty: ω, which may be a composition.

    Raises:
        TangentError: by every method, when v is negative or not finite.

    Source: LeJeune & Alemohammad, CPAL 2024, §3.

    >>> from adaptive_tangents.penalties import Quadratic
    >>> Quadratic(1.0).induced().value(torch.tensor([0.0, 1e-3]))
    tensor([0.0000e+00, 1.0000e-06])
    """

    penalty: Penalty

    def level(self, v: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The level u = v²/z(v)².

        Args:
            v: singular values of the coefficients, ≥ 0, any shape.
        """
        log_z = total(minimizers(self.penalty.parts, _checked(v)))
        return ((v.detach().double().flatten() * torch.exp(-log_z)) ** 2).reshape(v.shape).to(v.dtype)

    def value(self, v: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """ω̃(v).

        Args:
            v: singular values of the coefficients, ≥ 0, any shape.
        """
        parts, flat = self.penalty.parts, _checked(v)
        return total_cost(parts, minimizers(parts, flat), flat, torch.zeros_like(flat)).reshape(v.shape).to(v.dtype)

    def derivative(self, v: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """ω̃′(v) = 2v/z(v)².

        Args:
            v: singular values of the coefficients, ≥ 0, any shape.
        """
        log_z = total(minimizers(self.penalty.parts, flat := _checked(v)))
        return (2 * flat * torch.exp(-2 * log_z)).reshape(v.shape).to(v.dtype)

    def second_derivative(self, v: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """ω̃″(v) = 2/z² · (1 − 2e)/(1 + 2e), e = Σ_j d log z_j/d log u at the level of v; one-sided at a kink.

        Args:
            v: singular values of the coefficients, ≥ 0, any shape.
        """
        parts, flat = self.penalty.parts, _checked(v)
        return bend_at(parts, flat, minimizers(parts, flat)).reshape(v.shape).to(v.dtype)

    def minimizer(self, v: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """z(v), the best singular value of the transform.

        Args:
            v: singular values of the coefficients, ≥ 0, any shape.
        """
        return torch.exp(total(minimizers(self.penalty.parts, _checked(v)))).reshape(v.shape).to(v.dtype)

    def dual(self, s: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """ω̃*(s) = sup over v of sv − ω̃(v), infinite where the penalty gives no bound.

        Args:
            s: singular values of dual matrices, ≥ 0, any shape.
        """
        return self.penalty.dual(s)

    def proximal(self, v: Float[Tensor, "*s"], step: float) -> Float[Tensor, "*s"]:
        """The global argmin over w ≥ 0 of (w − v)²/(2·step) + ω̃(w).

        It is v·z²/(z² + 2·step), where z minimizes ω(z) + v²/(z² + 2·step).

        Args:
            v: where to take the proximal step, ≥ 0, any shape.
            step: the step size, positive.

        Raises:
            TangentError: when the step is not positive and finite.

        >>> from adaptive_tangents.penalties import NoAdaptation
        >>> NoAdaptation().induced().proximal(torch.tensor([3.0]), step=0.5)
        tensor([1.5000])
        """
        if not 0 < step < math.inf:
            raise TangentError(f"proximal: the step is positive and finite, got {step}")
        flat = _checked(v)
        shift = torch.full_like(flat, 2 * step)
        log_z = total(minimizers(self.penalty.parts, flat, shift))
        return (flat / (1 + shift * torch.exp(-2 * log_z))).reshape(v.shape).to(v.dtype)

    @cached_property
    def is_convex(self) -> bool:
        """Whether ω̃ is convex: d log z/d log u ≤ ½; for a user's ω, whether ω̃′ never falls on a grid of v."""
        limit = self.penalty.limit_elasticity
        if limit is not None:
            return limit <= HALF
        scales = [part.strength**0.5 for part in self.penalty.parts]
        v = torch.logspace(
            math.log10(min(scales)) - 5, math.log10(max(scales)) + 5, 241, dtype=torch.float64, device="cpu"
        )
        slopes = self.derivative(v)
        return bool((slopes.diff() >= -1e-9 * slopes[:-1]).all())

    @property
    def convexity(self) -> str:
        """Why ω̃ is convex or not, in words."""
        limit = self.penalty.limit_elasticity
        if limit is None:
            return f"ω̃′ {'never falls' if self.is_convex else 'falls somewhere'} along a grid of v around √λ"
        return f"d log z/d log u rises to {limit:g}, {'not above' if self.is_convex else 'above'} ½, as u grows"


def shares(penalties: Sequence[Penalty], v: Float[Tensor, "*s"]) -> tuple[Float[Tensor, "*s"], ...]:
    """The excess z_j − 1 of each penalty at the minimum of Σ ω_j(z_j) + v²/Π z_j²: how several sides share v.

    Equal penalties may have unequal shares: where ω∘exp is not convex, one side may take all.

    Args:
        penalties: ω_j, one for each side.
        v: singular values of the coefficients, ≥ 0, any shape.

    >>> from adaptive_tangents.penalties import NoAdaptation, Quadratic
    >>> shares((Quadratic(2.0), NoAdaptation()), torch.tensor([4.0]))
    (tensor([1.]), tensor([0.]))
    """
    logs = iter(minimizers(Composition(penalties).parts, _checked(v)))
    sums = [total([next(logs) for _ in penalty.parts]) for penalty in penalties]
    return tuple(torch.expm1(x).reshape(v.shape).to(v.dtype) for x in sums)


def bend_at(
    parts: Sequence[Penalty], v: Float[Tensor, " m"], logs: Sequence[Float[Tensor, " m"]]
) -> Float[Tensor, " m"]:
    """ω̃″(v), where each part's log z_j at v is known."""
    u = (v * torch.exp(-total(logs))) ** 2
    elasticities = []
    for part, x in zip(parts, logs, strict=True):
        if part.shares_level:
            elasticities.append(torch.where(u > 0, part.elasticity(u), 0.0))
        else:
            elasticities.append(torch.where(x > 0, part.steepness(x), 0.0))
    e = total(elasticities)
    ratio = torch.where(e.isinf(), -1.0, (1 - 2 * e) / (1 + 2 * e))
    return 2 * torch.exp(-2 * total(logs)) * ratio


def _checked(v: Tensor) -> Tensor:
    """The values v, flat and in float64."""
    flat = v.detach().double().flatten()
    if not bool(((flat >= 0) & flat.isfinite()).all()):
        raise TangentError("induced: v is a singular value, so 0 or more and finite; give v.abs()")
    return flat
