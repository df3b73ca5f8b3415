"""Average tangent features along the straight path between parameters, with the error of the identity they obey."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_tangents.blocks import Block, sum_blocks
from adaptive_tangents.capture import Capture
from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.features import TangentFeatures
from adaptive_tangents.inputs import Batch, Output, Selection, overlay, samples
from adaptive_tangents.memory import memory_limit as limit_in_force
from adaptive_tangents.memory import require_memory


@dataclass(frozen=True, repr=False)
class AverageFeatures(TangentFeatures):
    """Average features φ̄ of a path; quadrature nodes are positions of each block, so all of TangentFeatures holds.

    ``error`` is ‖f₁ − f₀ − φ̄(θ₁ − θ₀)‖ / ‖f₁ − f₀‖, ``nodes`` the number of quadrature nodes, ``change`` f₁ − f₀ (n, c).
    """

    error: float = math.nan
    nodes: int = 0
    change: Tensor | None = None

    @property
    def error_db(self) -> float:
        """The identity's signal-to-error ratio in dB, −20·log₁₀(error): larger is better."""
        return math.inf if self.error == 0 else -20 * math.log10(self.error)


def average_features(
    model: nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    x: Batch,
    *,
    tol: float = 1e-3,
    nodes: int | None = None,
    max_nodes: int = 256,
    wrt: Selection | None = None,
    output: Output | None = None,
    memory_limit: int | None = None,
) -> AverageFeatures:
    r"""φ̄(x) = ∫₀¹ ∂f/∂θ(x; θ₀ + s(θ₁ − θ₀)) ds, for which f(x;θ₁) − f(x;θ₀) = φ̄(x)(θ₁ − θ₀) exactly.

    ``start`` and ``end`` are state dicts θ₀ and θ₁. Gauss-Legendre nodes are doubled until the relative residual of the
    identity is at most ``tol`` (ReLU networks converge slowly: their features jump along the path), or fixed by ``nodes``.
    A tolerance not met at ``max_nodes`` gives a TangentWarning and the average at that many. Parameters that ``wrt`` leaves
    out must not change along the path. Source: LeJeune & Alemohammad, CPAL 2024, §4.

    Raises TangentError where the state dicts do not fit, nothing changes between them, or memory would not suffice.

    >>> import torch, adaptive_tangents as at
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> start = {k: v.clone() for k, v in model.state_dict().items()}
    >>> end = {k: v + 0.1 for k, v in start.items()}
    >>> av = at.average_features(model, start, end, torch.randn(5, 3))
    >>> av.error <= 1e-3
    True
    """
    call = "average_features"
    if not tol > 0:
        raise TangentError(f"{call}: tol is a positive number, got {tol}")
    if (nodes is not None and nodes < 1) or max_nodes < 1:
        raise TangentError(f"{call}: nodes is a positive number, got {max_nodes if nodes is None else nodes}")
    first = Capture(call, model, x, start, wrt, output, memory_limit)
    theta1, _ = overlay(call, model, end)
    names = first.network.selected
    moved = [k for k, p in first.network.parameters.items() if k not in names and not torch.equal(p, theta1[k])]
    if moved:
        raise TangentError(
            f"{call}: {', '.join(moved[:4])} change along the path but wrt leaves them out, so the identity cannot hold; "
            "widen wrt, or give both ends the same values there"
        )
    _check_buffers(call, model, start, end)
    change = (first.outputs(x, theta1) - first.outputs(x, first.network.parameters)).double()
    scale = float(change.norm())
    if scale == 0:
        raise TangentError(
            f"{call}: the network's outputs are the same at start and end; there is no change to average"
        )
    delta = torch.cat([(theta1[name] - first.network.parameters[name]).flatten() for name in names])
    count = nodes or min(4, max_nodes)
    while True:
        made = _average(call, first, theta1, x, count)
        error = float((change - made.matvec(delta).double()).norm()) / scale
        if nodes is not None or error <= tol or count >= max_nodes:
            break
        count = min(2 * count, max_nodes)
    if nodes is None and error > tol:
        warnings.warn(
            f"{call}: the path identity holds to {error:.2e} at {count} nodes, not to tol = {tol:g}; "
            "raise max_nodes or tol",
            TangentWarning,
            stacklevel=2,
        )
    return AverageFeatures(
        made.n, made.c, made.blocks, made.parameters, made.limit, error=error, nodes=count, change=change
    )


def _average(call: str, first: Capture, theta1: Mapping[str, Tensor], x: Batch, count: int) -> TangentFeatures:
    points, weights = np.polynomial.legendre.leggauss(count)
    limit = limit_in_force(first.requested, first.probe.device)
    require_memory(
        call, 2 * samples(x) * (first.probe.held_bytes(count) + first.probe.whole_bytes), limit,
        remedy=f"take fewer samples, narrow wrt, or lower max_nodes (now at {count} nodes)",
    )  # fmt: skip
    theta0 = first.network.parameters
    collected: dict[str, list[Block]] = {}
    for s, w in zip((points + 1) / 2, weights / 2, strict=True):
        between = {name: torch.lerp(theta0[name], theta1[name], float(s)) for name in theta0}
        features = first.at(between).features(x)
        for name, block in features.blocks.items():
            weighted, kept = block.compact(copies=count).scaled(float(w)), collected.setdefault(name, [])
            if weighted.dense is not None and kept:
                # Materialised features add up at once; only factors are kept for every node.
                weighted = sum_blocks([kept.pop(), weighted])
            kept.append(weighted)
    blocks = {name: sum_blocks(parts) for name, parts in collected.items()}
    return TangentFeatures(features.n, features.c, blocks, features.parameters, first.requested)


def _check_buffers(call: str, model: nn.Module, start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        if not torch.equal(start.get(name, buffer), end.get(name, buffer)) and buffer.is_floating_point():
            raise TangentError(
                f"{call}: buffer {name!r} differs between start and end, so the outputs change by more than the parameters "
                "do; give both ends the same buffers (a batch norm's running statistics, say)"
            )
