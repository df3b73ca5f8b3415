"""How several penalties share one value: the minimum over z_1, ..., z_k behind ω̃, ⊕, the dual and the proximal operator.

If every part's ω∘exp is strictly convex, all z_j follow from one level u, the root of one equation. For any other part, all
valleys are searched, and the remaining parts are solved for at each candidate. Tensors are flat, in float64, and hold log z.
A part is any penalty, seen through the protocol ``Part``.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from adaptive_tangents.penalties.scalar_search import convex_root, global_minimum, increasing_root

LARGEST = 345.0  # of log z: z² is finite in float64
HALF = 0.5 + 1e-12
_LARGEST_LEVEL = 640.0  # of log u
_SMALLEST = 1e-150  # smaller v underflow when squared
_CHUNK = 2048
_REACHED = 1e-11  # how closely the parts' log z must add up


@runtime_checkable
class Part(Protocol):
    """What this module needs of a penalty: see ``Penalty``."""

    @property
    def strength(self) -> float: ...
    @property
    def shares_level(self) -> bool: ...
    @property
    def limit_elasticity(self) -> float | None: ...
    def value(self, z: Tensor, /) -> Tensor: ...
    def pull(self, z: Tensor, /) -> Tensor: ...
    def log_gain(self, u: Tensor, /) -> Tensor: ...
    def elasticity(self, u: Tensor, /) -> Tensor: ...


def limit_elasticity(parts: Sequence[Part]) -> float | None:
    """The supremum of d log Πz_j / d log u, if all parts know theirs; else None."""
    # Known elasticities rise with u, so the supremum of the sum is the sum of the suprema.
    limits = [part.limit_elasticity for part in parts]
    return None if None in limits else sum(limit for limit in limits if limit is not None)


# ------------------------------------------------------------------------------------------- minima over z_1, ..., z_k


def total_cost(parts: Sequence[Part], logs: Sequence[Tensor], v: Tensor, shift: Tensor) -> Tensor:
    """Σ ω_j(z_j) + v²/(Π z_j² + shift) at log z_j."""
    x = total(list(logs))
    # (v/z)², not v²/z²: v² and z² may overflow.
    tail = (v * torch.exp(-x)) ** 2 / (1 + shift * torch.exp(-2 * x))
    return tail + total([part.value(log.exp()) for part, log in zip(parts, logs, strict=True)])


def minimizers(parts: Sequence[Part], v: Tensor, shift: Tensor | None = None) -> list[Tensor]:
    """The log z_j ≥ 0 of the global minimum of Σ ω_j(z_j) + v²/(Π z_j² + shift), one problem for each v (m,)."""
    own = next((k for k, part in enumerate(parts) if not part.shares_level), None)
    if own is None:
        moves = v > _SMALLEST
        positive = torch.where(moves, v, 1.0)
        if shift is None and len(set(parts)) == 1 and parts[0].limit_elasticity is None:
            return [torch.where(moves, _even(parts, positive), 0.0)] * len(parts)
        u = _level(parts, positive) if shift is None else _shifted_level(parts, positive, shift)
        return [torch.where(moves, part.log_gain(u), 0.0) for part in parts]
    shift = torch.zeros_like(v) if shift is None else shift
    chunks = [
        _nested(parts, own, *chunk) for chunk in zip(torch.split(v, _CHUNK), torch.split(shift, _CHUNK), strict=True)
    ]
    return [torch.cat(column) for column in zip(*chunks, strict=True)]


def _nested(parts: Sequence[Part], own: int, v: Tensor, shift: Tensor) -> list[Tensor]:
    """Search all valleys of one part's z; at each candidate solve for the other parts, with v/z and shift/z²."""
    part, rest = parts[own], [*parts[:own], *parts[own + 1 :]]

    def others(x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        seen = (v[:, None] * torch.exp(-x)).flatten()
        left = (shift[:, None] * torch.exp(-2 * x)).flatten()
        return seen, left, minimizers(rest, seen, left if bool(shift.any()) else None)

    def cost(x: Tensor) -> Tensor:
        if not rest:
            return part.value(x.exp()) + (v[:, None] * torch.exp(-x)) ** 2 / (1 + shift[:, None] * torch.exp(-2 * x))
        seen, left, logs = others(x)
        return part.value(x.exp()) + total_cost(rest, logs, seen, left).reshape(x.shape)

    def slope(x: Tensor) -> Tensor:
        whole = x + total(others(x)[2]).reshape(x.shape) if rest else x
        level = (v[:, None] * torch.exp(-whole) / (1 + shift[:, None] * torch.exp(-2 * whole))) ** 2
        return part.pull(x.exp()) - level

    low = torch.zeros_like(v)
    best = to_identity(global_minimum(cost, lambda x: part.value(x.exp()), low, low + LARGEST, slope))
    logs = others(best[:, None])[2] if rest else []
    return [*logs[:own], best, *logs[own:]]


def _even(parts: Sequence[Part], v: Tensor) -> Tensor:
    """The log z of each of k equal parts, whose pull is v²/z^{2k}, for v > 0: one root, not one within another."""
    zero, target = torch.zeros_like(v), 2 * v.log()

    def error(x: Tensor) -> Tensor:
        return parts[0].pull(x.exp()).clamp_min(0).log() + 2 * len(parts) * x - target

    return to_identity(increasing_root(error, zero, zero + LARGEST))


def _sum_of(parts: Sequence[Part], u: Tensor, quantity: str) -> Tensor:
    """A quantity at the level u, summed over the parts; equal parts are evaluated once."""
    return total([count * getattr(part, quantity)(u) for part, count in Counter(parts).items()])


def _log_gain(parts: Sequence[Part], u: Tensor) -> Tensor:
    return _sum_of(parts, u, "log_gain")


def to_identity(x: Tensor) -> Tensor:
    """The log z of a search, 0 where it is rounding: for a steep ω, ω(1 + 1e-16) far exceeds v² = 1e-24."""
    return torch.where(x > 1e-15, x, 0.0)


def _level(parts: Sequence[Part], v: Tensor) -> Tensor:
    """The u with u·Π z_j(u)² = v², for v > 0."""
    target = 2 * v.log()
    # Either u ≤ λ_j, or z_j ≤ v/√λ_j and u is at most the pull there. v² alone can be far too high where z grows
    # fast: log z(v²) may be 1e30.
    above = v**2
    for part in parts:
        most = (v / part.strength**0.5).clamp_min(1) * (1 + 1e-9)  # past a kink exactly there
        above = torch.minimum(above, part.pull(most).clamp_min(part.strength))
    high = above.log()

    def error(y: Tensor) -> Tensor:
        return y + 2 * _log_gain(parts, y.exp()) - target

    if limit_elasticity(parts) is not None:  # elasticities rise, so the error is convex in y
        return convex_root(error, lambda y: 1 + 2 * _sum_of(parts, y.exp(), "elasticity"), high).exp()
    return increasing_root(error, target - 2 * _log_gain(parts, above), high).exp()


def _shifted_level(parts: Sequence[Part], v: Tensor, shift: Tensor) -> Tensor:
    """The u = (w/z)² of the global minimum with v²/(z² + shift) instead of v²/z², w = v·z²/(z² + shift), for v > 0."""

    def error(y: Tensor) -> Tensor:
        x = _log_gain(parts, y.exp())
        v_, shift_ = (t.reshape(-1, *[1] * (y.ndim - 1)) for t in (v, shift))
        return y + 2 * x + 2 * torch.log1p(shift_ * torch.exp(-2 * x)) - 2 * v_.log()

    low, high = _level(parts, v / (1 + shift)).log(), _level(parts, v).log()
    limit = limit_elasticity(parts)
    if limit is not None and limit <= HALF:
        return increasing_root(error, low, high).exp()
    best, found = torch.full_like(v, torch.inf), low
    for left, right in _rising_brackets(error, low, high):
        y = increasing_root(error, left, right)
        value = total_cost(parts, [part.log_gain(y.exp()) for part in parts], v, shift)
        best, found = torch.minimum(best, value), torch.where(value < best, y, found)
    return found.exp()


def _rising_brackets(error: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Intervals where the error turns positive: first the first of every problem, then the second, and so on.

    Each holds a local minimum of the cost. A problem with fewer intervals than others gets an arbitrary one.
    """
    grid = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, 257, dtype=low.dtype, device=low.device)
    positive = error(grid) > 0
    positive[:, 0], positive[:, -1] = False, True
    rises = ~positive[:, :-1] & positive[:, 1:]
    for k in range(1, int(rises.sum(1).max()) + 1):
        place = (rises.cumsum(1) >= k).int().argmax(1, keepdim=True)
        yield grid.gather(1, place)[:, 0], grid.gather(1, place + 1)[:, 0]


# ------------------------------------------------------------------------------------------------- compositions of one z


def shared_pull(parts: Sequence[Part], x: Tensor) -> Tensor:
    """The level u at which Σ log z_j(u) = x; infinite where no level reaches x."""
    low = torch.stack([part.pull((x / len(parts)).exp()) for part in parts]).amin(0)
    high = torch.stack([part.pull(x.exp()) for part in parts]).amin(0).clamp_max(math.exp(_LARGEST_LEVEL))
    low = torch.minimum(low, high)
    reached = _log_gain(parts, high) >= x - _REACHED * (1 + x)
    tiny = torch.finfo(x.dtype).tiny
    y = increasing_root(
        lambda y: _log_gain(parts, y.exp()) - x,
        low.clamp_min(tiny).log(), high.clamp_min(tiny).log(),
    )  # fmt: skip
    return torch.where(high > 0, torch.where(reached, y.exp(), torch.inf), 0.0)


def least_sum(parts: Sequence[Part], x: Tensor) -> list[Tensor]:
    """The log z_j ≥ 0 with the least Σ ω_j(z_j) subject to Σ log z_j = x."""
    own = next((k for k, part in enumerate(parts) if not part.shares_level), None)
    if own is None:
        if len(parts) == 1:
            return [x]
        return [part.log_gain(shared_pull(parts, x).clamp_max(math.exp(_LARGEST_LEVEL))) for part in parts]
    part, rest = parts[own], [*parts[:own], *parts[own + 1 :]]
    if not rest:
        return [x]
    best = torch.cat([_least_share(part, rest, piece) for piece in torch.split(x, _CHUNK)])
    logs = least_sum(rest, x - best)
    return [*logs[:own], best, *logs[own:]]


def least_value(parts: Sequence[Part], x: Tensor) -> Tensor:
    """(ω₁ ⊕ ... ⊕ ω_k)(eˣ), infinite where the parts cannot reach x together."""
    logs = least_sum(parts, x)
    paid = total([part.value(log.exp()) for part, log in zip(parts, logs, strict=True)])
    return torch.where(total(logs) >= x - _REACHED * (1 + x), paid, torch.inf)


def _least_share(part: Part, rest: Sequence[Part], x: Tensor) -> Tensor:
    def cost(y: Tensor) -> Tensor:
        return part.value(y.exp()) + least_value(rest, (x[:, None] - y).clamp_min(0).flatten()).reshape(y.shape)

    return global_minimum(cost, lambda y: part.value(y.exp()), torch.zeros_like(x), x)


# ------------------------------------------------------------------------------------------------------------------ duals


def joint_dual(parts: Sequence[Part], s: Tensor) -> Tensor:
    """The supremum over z_1, ..., z_k of s²Π z_j²/4 − Σ ω_j(z_j), for s (m,)."""
    own = next((k for k, part in enumerate(parts) if part.limit_elasticity is None), None)
    if own is None:
        return _closed_dual(parts, s)
    part, rest = parts[own], [*parts[:own], *parts[own + 1 :]]

    return torch.cat([_nested_dual(part, rest, piece) for piece in torch.split(s, _CHUNK)])


def _nested_dual(part: Part, rest: Sequence[Part], s: Tensor) -> Tensor:
    def cost(x: Tensor) -> Tensor:
        paid, seen = part.value(x.exp()), s[:, None] * x.exp()
        gained = joint_dual(rest, seen.flatten()).reshape(x.shape) if rest else seen**2 / 4
        return torch.where(paid.isinf(), torch.inf, paid - gained)

    bounded = (cost(s.new_tensor([0.5, 0.6, 0.7]).expand(len(s), 3) * LARGEST) >= 0).all(1)
    found = torch.full_like(s, torch.inf)
    if bool(bounded.any()):
        s = s[bounded]
        # The supremum lies before the last point where the gain exceeds the cost.
        points = torch.linspace(0, LARGEST, 2049, dtype=s.dtype, device=s.device).expand(len(s), 2049)
        last = ((cost(points) < 0) * torch.arange(2049, device=s.device)).amax(1)
        high = points[0][(last + 1).clamp_max(2048)]
        best = global_minimum(cost, lambda x: torch.full_like(x, -torch.inf), torch.zeros_like(s), high)
        found[bounded] = 0.0 - cost(best[:, None])[:, 0]
    return found


def _closed_dual(parts: Sequence[Part], s: Tensor) -> Tensor:
    """If elasticities never exceed ½, u/Π z_j² = s²/4 has at most one root; without one the dual is infinite."""
    limit = limit_elasticity(parts)
    if limit is None or limit > HALF:
        return no_bound(s)
    target = 2 * torch.where(s > 0, s / 2, 1.0).log()
    high = torch.full_like(s, _LARGEST_LEVEL)

    def error(y: Tensor) -> Tensor:
        return y - 2 * _log_gain(parts, y.exp()) - target

    finite = error(high) > 0
    u = increasing_root(error, target.clamp_max(_LARGEST_LEVEL), high).exp()
    value = u - total([part.value(part.log_gain(u).exp()) for part in parts])
    return torch.where(s > 0, torch.where(finite, value, torch.inf), 0.0)


def no_bound(s: Tensor) -> Tensor:
    """The dual of a penalty that grows more slowly than z²: 0 at 0, infinite elsewhere."""
    return torch.where(s == 0, 0.0, torch.inf).to(s.dtype)


def total(values: Sequence[Tensor]) -> Tensor:
    """The sum of one or more tensors."""
    first, *rest = values
    for value in rest:
        first = first + value
    return first
