"""Slow, dense references for features, written from the definitions alone.

Nothing here imports the package: a Jacobian is a loop of plain autograd over samples and outputs, and everything
else is numpy on that Jacobian.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import roots_legendre
from torch import Tensor, nn

Array = NDArray[np.float64]


def sample(x: Any, k: int) -> Any:
    """One sample of a batch, as a batch of its own that shares no memory with it."""
    if isinstance(x, Tensor):
        return x.detach()[k : k + 1].clone()
    if isinstance(x, Mapping):
        return {name: sample(tensor, k) for name, tensor in x.items()}
    return tuple(sample(tensor, k) for tensor in x)


def size(x: Any) -> int:
    """Samples of a batch."""
    return len(x) if isinstance(x, Tensor) else len(next(iter(x.values())) if isinstance(x, Mapping) else x[0])


def evaluate(model: nn.Module, x: Any, output_fn: Callable[[Any], Tensor] | None = None) -> Tensor:
    """f(x) sample by sample, (n, c)."""
    rows = []
    for k in range(size(x)):
        one = sample(x, k)
        out = model(**one) if isinstance(one, Mapping) else model(*(one if isinstance(one, tuple) else (one,)))
        rows.append((out if output_fn is None else output_fn(out))[0])
    return torch.stack(rows)


def jacobian(
    model: nn.Module,
    x: Any,
    *,
    output_fn: Callable[[Any], Tensor] | None = None,
    names: Sequence[str] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Array:
    """∂f/∂θ (n, c, p) of the named parameters (default: those that require a gradient), one backward pass per entry."""
    model = copy.deepcopy(model)
    if state is not None:
        model.load_state_dict(state)
    named = dict(model.named_parameters())
    chosen = [name for name, p in named.items() if (p.requires_grad if names is None else name in names)]
    for name, p in named.items():
        p.requires_grad_(name in chosen)
    rows = []
    for values in evaluate(model, x, output_fn):
        for value in values:
            found = [None] * len(chosen)
            if value.requires_grad:
                found = torch.autograd.grad(value, [named[k] for k in chosen], retain_graph=True, allow_unused=True)
            flat = [torch.zeros_like(named[k]) if g is None else g for k, g in zip(chosen, found, strict=True)]
            rows.append(torch.cat([g.flatten() for g in flat]).double().numpy())
    return np.stack(rows).reshape(size(x), -1, rows[0].size)


def kernel(a: Array, b: Array, outputs: str = "full") -> Array:
    """φφ′ᵀ: "full" (n, c, m, c), "trace" (n, m), "diagonal" (n, m, c)."""
    return np.einsum({"full": "kcp,ldp->kcld", "trace": "kcp,lcp->kl", "diagonal": "kcp,lcp->klc"}[outputs], a, b)


def columns(parameters: Mapping[str, tuple[int, ...]], name: str) -> slice:
    """A parameter's slice in the vector of all."""
    start = 0
    for other, shape in parameters.items():
        stop = start + math.prod(shape)
        if other == name:
            return slice(start, stop)
        start = stop
    raise KeyError(name)


def restricted(phi: Array, parameters: Mapping[str, tuple[int, ...]], names: Sequence[str]) -> Array:
    """The features of some of the parameters."""
    return np.concatenate([phi[..., columns(parameters, name)] for name in names], -1)


def sided(
    phi: Array,
    parameters: Mapping[str, tuple[int, ...]],
    names: Sequence[str],
    *,
    left: Array | None = None,
    right: Array | None = None,
    scale: float = 1.0,
    inputs_first: bool = False,
) -> Array:
    """φ with scale · M_L Φ M_Rᵀ in the block whose matrix has the named parameters as its columns, each (o, ...).

    ``inputs_first``: the first parameter is (i, ...) instead, the transpose of its columns.
    """
    phi = phi.copy()
    places = [columns(parameters, name) for name in names]
    parts = [
        phi[..., place].reshape(*phi.shape[:2], (parameters[k] or (1,))[0], -1)
        for k, place in zip(names, places, strict=True)
    ]
    if inputs_first:
        parts[0] = parts[0].swapaxes(2, 3)
    matrix = scale * np.concatenate(parts, 3)
    if left is not None:
        matrix = left @ matrix
    if right is not None:
        matrix = matrix @ right.T
    moved = np.split(matrix, np.cumsum([part.shape[3] for part in parts])[:-1], 3)
    if inputs_first:
        moved[0] = moved[0].swapaxes(2, 3)
    for place, part in zip(places, moved, strict=True):
        phi[..., place] = part.reshape(*phi.shape[:2], -1)
    return phi


def joint(phi: Array, direction: Array, gain: float) -> Array:
    """φM for M = I + (z − 1) b bᵀ, b a vector of p entries."""
    return phi + (gain - 1) * np.multiply.outer(phi @ direction, direction)


def average(
    model: nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    x: Any,
    *,
    nodes: int,
    names: Sequence[str] | None = None,
) -> Array:
    """Σ_q w_q ∂f/∂θ at Gauss-Legendre nodes of the segment from start to end, (n, c, p)."""
    points, weights = roots_legendre(nodes)
    total: Any = 0.0
    for s, w in zip((points + 1) / 2, weights / 2, strict=True):
        total = total + w * jacobian(model, x, names=names, state=between(start, end, s))
    return np.asarray(total)


def midpoints(
    model: nn.Module, start: Mapping[str, Tensor], end: Mapping[str, Tensor], x: Any, *, points: int
) -> Array:
    """The average features by the midpoint rule, which shares no node or weight with Gauss-Legendre."""
    made = [jacobian(model, x, state=between(start, end, (q + 0.5) / points)) for q in range(points)]
    return np.mean(made, 0)


def between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], s: float) -> dict[str, Tensor]:
    """θ₀ + s(θ₁ − θ₀); tensors that are not floating stay as at the start."""
    return {k: v + s * (end[k] - v) if v.is_floating_point() else v for k, v in start.items()}
