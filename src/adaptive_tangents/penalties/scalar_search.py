"""Roots and global minima of many scalar functions at once: each entry of a tensor is one problem."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Elementwise = Callable[[Tensor], Tensor]

_ROOT_STEPS = 200
_GRID = 513
_WINDOW_GRID = 65
_CANDIDATES = 4
_GOLDEN_STEPS = 60
_GOLDEN = (5**0.5 - 1) / 2


def increasing_root(error: Elementwise, low: Float[Tensor, "*s"], high: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """The x in [low, high] where a nondecreasing ``error`` changes sign, to rounding; an end of the interval if it does not.

    Chandrupatla's method (Advances in Engineering Software 28, 1997): inverse quadratic steps, with bisection as fallback.

    >>> increasing_root(lambda x: x**3 - 8, torch.zeros(1, dtype=torch.float64), torch.full((1,), 9.0, dtype=torch.float64))
    tensor([2.], dtype=torch.float64)
    """
    x1, x2 = low, high
    f1, f2 = error(x1), error(x2)
    below, above = f1 >= 0, f2 <= 0
    share = torch.full_like(low, 0.5)
    for _ in range(_ROOT_STEPS):
        x = x1 + share * (x2 - x1)
        f = error(x)
        same = (f > 0) == (f1 > 0)
        x3, f3 = torch.where(same, x1, x2), torch.where(same, f1, f2)
        x2, f2 = torch.where(same, x2, x1), torch.where(same, f2, f1)
        x1, f1 = x, f
        best = torch.where(f1.abs() < f2.abs(), x1, x2)
        least = torch.finfo(x.dtype).eps * (1 + best.abs()) / 2 / (x2 - x1).abs()
        done = (least > 0.5) | (f1 == 0) | below | above
        if bool(done.all()):
            break
        xi, phi = (x1 - x2) / (x3 - x2), (f1 - f2) / (f3 - f2)
        step = f1 / (f2 - f1) * f3 / (f2 - f3) + (x3 - x1) / (x2 - x1) * f1 / (f3 - f1) * f2 / (f3 - f2)
        trusted = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi) & step.isfinite()
        share = torch.where(trusted, step, 0.5).clamp(least, (1 - least).clamp_min(0.5))
        share = torch.where(done, 0.0, share)
    best = torch.where(f1.abs() <= f2.abs(), x1, x2)
    return torch.where(below, low, torch.where(above, high, best))


def convex_root(error: Elementwise, slope: Elementwise, high: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """The x ≤ high where an increasing convex ``error`` is 0: Newton's steps from above never overshoot.

    >>> convex_root(lambda x: x.exp() - 1, torch.exp, torch.ones(1, dtype=torch.float64)).abs() < 1e-15
    tensor([True])
    """
    x = high
    for _ in range(_ROOT_STEPS):
        step = error(x) / slope(x)
        x = x - step
        if not bool((step.abs() > 4 * torch.finfo(x.dtype).eps * (1 + x.abs())).any()):
            break
    return x


def global_minimum(
    cost: Elementwise,
    floor: Elementwise,
    low: Float[Tensor, " m"],
    high: Float[Tensor, " m"],
    slope: Elementwise | None = None,
) -> Float[Tensor, " m"]:
    """The minimizer of each ``cost`` over [low, high], which may have several valleys, kinks and jumps.

    All functions take (m, k) points. ``floor`` is a nondecreasing lower bound of the cost: the search window ends where it
    exceeds the best cost found. Golden section narrows the deepest valleys of a grid. ``slope`` (the cost's derivative, or
    anything of its sign) then gives the minimizer to rounding; costs alone give it to the square root of rounding.

    >>> zero, end = torch.zeros(1, dtype=torch.float64), torch.full((1,), 9.0, dtype=torch.float64)
    >>> global_minimum(lambda x: (x - 1).abs() * (x - 4).abs() + 0.1 * x, lambda x: 0.1 * x, zero, end).round(decimals=9)
    tensor([1.], dtype=torch.float64)
    """
    for _ in range(3):
        found = cost(_grid(low, high, _WINDOW_GRID)).amin(1, keepdim=True)
        high = _last_below(floor, found, low, high)
    points = _grid(low, high, _GRID)
    values = cost(points)
    padded = torch.nn.functional.pad(values, (1, 1), value=torch.inf)
    valley = (values <= padded[:, :-2]) & (values <= padded[:, 2:])
    chosen = torch.where(valley, values, torch.inf).topk(_CANDIDATES, largest=False).indices
    left = points.gather(1, (chosen - 1).clamp_min(0))
    right = points.gather(1, (chosen + 1).clamp_max(_GRID - 1))
    middle = _golden(cost, left, right)
    everything = torch.cat([points.gather(1, chosen), middle], 1)
    values = cost(everything)
    if slope is not None:
        exact = increasing_root(slope, left, right)
        # A root at the right end is none: the cost still falls there, up to a jump or the window's end.
        everything, at_exact = torch.cat([everything, exact], 1), torch.where(exact < right, cost(exact), torch.inf)
        # The slope's root is more exact than the costs can tell: prefer it in a tie.
        values = torch.cat([values, at_exact - 1e-14 * at_exact.abs().nan_to_num(posinf=0.0)], 1)
    best = values.nan_to_num(nan=torch.inf, neginf=-torch.inf).argmin(1, keepdim=True)
    return everything.gather(1, best)[:, 0]


def _grid(low: Tensor, high: Tensor, count: int) -> Tensor:
    return low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, count, dtype=low.dtype, device=low.device)


def _last_below(floor: Elementwise, level: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The last point with floor ≤ level, rounded up."""
    end = high
    for _ in range(60):
        middle = (low + high) / 2
        inside = (floor(middle[:, None]) <= level)[:, 0]
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return torch.where((floor(end[:, None]) <= level)[:, 0], end, high)


def _golden(cost: Elementwise, low: Tensor, high: Tensor) -> Tensor:
    start = low
    first, second = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_first, at_second = cost(first), cost(second)
    for _ in range(_GOLDEN_STEPS):
        left = at_first <= at_second
        low, high = torch.where(left, low, first), torch.where(left, second, high)
        kept, at_kept = torch.where(left, first, second), torch.where(left, at_first, at_second)
        fresh = torch.where(left, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        at_fresh = cost(fresh)
        first, second = torch.where(left, fresh, kept), torch.where(left, kept, fresh)
        at_first, at_second = torch.where(left, at_fresh, at_kept), torch.where(left, at_kept, at_fresh)
    # A few roundings to the left: at a jump that is the cheaper side, and later rounding must not cross it.
    return torch.maximum(low - 4e-15 * (1 + low.abs()), start)
