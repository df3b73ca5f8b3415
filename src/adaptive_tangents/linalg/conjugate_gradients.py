"""Preconditioned conjugate gradients, for several right sides at once."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

Solve = Callable[[Tensor], Tensor]
Progress = Callable[[int, float], None]  # called with the number of steps so far, and the residual or objective
_CG_TOLERANCE = 1e-12
_CG_STEPS = 2000


@dataclass(frozen=True)
class Iterated:
    """An approximate A⁻¹B, the largest relative residual of its columns, and the number of products it took."""

    solution: Float[Tensor, "k *m"] = field(repr=False)
    residual: float
    steps: int


def conjugate_gradients(apply: Solve, b: Float[Tensor, "k *m"], near: Solve) -> Float[Tensor, "k *m"]:
    """A⁻¹b to a relative residual of 1e-12, or as close as float64 allows; ``near`` approximates A⁻¹."""
    return iterate(apply, b, near).solution


def iterate(
    apply: Solve,
    b: Float[Tensor, "k *m"],
    near: Solve,
    *,
    tol: float = _CG_TOLERANCE,
    most: int = _CG_STEPS,
    start: Float[Tensor, "k *m"] | None = None,
    progress: Progress | None = None,
) -> Iterated:
    """Solve A x = b by conjugate gradients, all columns of b side by side; returns the best iterate of each column."""
    x = torch.zeros_like(b) if start is None else start.clone()
    residual = b.clone() if start is None else b - apply(x)
    size = b.norm(dim=0)
    direction = moved = near(residual)
    product = _inner(residual, moved)
    best, best_size, since, steps = x, residual.norm(dim=0), 0, 0
    while steps < most and bool((best_size > tol * size).any()) and since <= 100:
        steps += 1
        image = apply(direction)
        length = _ratio(product, _inner(direction, image))
        before, x, residual = residual, x + length * direction, residual - length * image
        left = residual.norm(dim=0)
        better = left < best_size
        since = 0 if bool(better.any()) else since + 1
        best, best_size = torch.where(better, x, best), torch.where(better, left, best_size)
        if progress is not None:
            progress(steps, float(_ratio(best_size, size).max()))
        moved = near(residual)
        # With the change of the residual, directions stay conjugate though ``near`` is less exact than the rest.
        ratio = _ratio(_inner(residual - before, moved), product)
        product = _inner(residual, moved)
        direction = moved + ratio * direction
    return Iterated(best, float(_ratio(best_size, size).max()), steps)


def _inner(x: Float[Tensor, "k *m"], y: Float[Tensor, "k *m"]) -> Float[Tensor, "*m"]:
    return (x * y).sum(0)


def _ratio(a: Float[Tensor, "*m"], b: Float[Tensor, "*m"]) -> Float[Tensor, "*m"]:
    """a/b, and zero where b is zero: a solved column stays where it is."""
    return torch.where(b != 0, a / b, 0.0)
