"""Average tangent features along the straight path between parameters, with the error of the identity they satisfy."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adaptive_tangents.capture.batches import Batch, samples, take
from adaptive_tangents.capture.capture import Capture
from adaptive_tangents.capture.lease import LOCK
from adaptive_tangents.capture.network import OutputFn, Selection, overlay
from adaptive_tangents.capture.state_names import Params
from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.features.blocks import Block, sum_blocks
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.runtime.memory import limit_for, require_memory
from adaptive_tangents.runtime.progress import Asked, Progress, shown

Buffers = Literal["same", "path"]
_STAYS = 0.02  # relative change of an error that doubling the nodes twice leaves as it is


@dataclass(frozen=True, repr=False, eq=False)
class AverageFeatures(TangentFeatures):
    """Average features φ̄ of a path, used like any TangentFeatures.

    The quadrature nodes are positions of a block, or they are summed where that takes less memory.

    Attributes:
        n, c: number of samples and of outputs.
        blocks: the features of each parameter block, by name.
        parameters: name and shape of each parameter, in the order of ``model.named_parameters()``.
        limit: bytes that ``dense`` and ``kernel`` may use; None is half of what is free.
        error: ‖f₁ − f₀ − φ̄(θ₁ − θ₀) − g‖ / ‖f₁ − f₀‖; it says nothing about φ̄ in other directions than θ₁ − θ₀.
        nodes: the number of quadrature nodes.
        change: f₁ − f₀ (n, c).
        buffer_change: g (n, c), the part of the change that the buffers made; None if they did not move.
    """

    error: float = math.nan
    nodes: int = 0
    change: Tensor | None = None
    buffer_change: Tensor | None = None

    @property
    def error_db(self) -> float:
        """The identity's signal-to-error ratio in dB, −20·log₁₀(error): larger is better."""
        return math.inf if self.error == 0 else -20 * math.log10(self.error)


def average_features(
    model: nn.Module,
    start: Params,
    end: Params,
    x: Batch,
    *,
    tol: float = 1e-3,
    nodes: int | None = None,
    max_nodes: int = 256,
    wrt: Selection | None = None,
    output_fn: OutputFn | None = None,
    memory_limit: int | None = None,
    buffers: Buffers = "same",
    progress: Asked = None,
) -> AverageFeatures:
    r"""φ̄(x) = ∫₀¹ ∂f/∂θ(x; θ₀ + s(θ₁ − θ₀)) ds, for which f(x;θ₁) − f(x;θ₀) = φ̄(x)(θ₁ − θ₀) exactly.

    The integral is computed by Gauss-Legendre quadrature. ReLU networks converge slowly: their features jump along the
    path. ``tol`` and ``error`` certify this identity alone: φ̄ along θ₁ − θ₀, no other direction. Features of parameters that
    stand still, and kernels of φ̄, may need more nodes; compare those of twice the ``nodes``. If buffers b move with the
    parameters, then f₁ − f₀ = φ̄(θ₁ − θ₀) + g, and g = ∫₀¹ ∂f/∂b (b₁ − b₀) ds is the part of the change that the buffers
    made, ``buffer_change``. It is computed by forward mode at each node, or by central differences if an operation has no
    forward mode.

    Args:
        model: the network f; it is left as it was.
        start: the state dict θ₀, in any form that ``params`` of ``tangent_features`` may have.
        end: the state dict θ₁, likewise.
        x: samples first, (n, ...): a tensor, or a tuple, list, dict or dataclass of tensors, flags and None.
        tol: nodes are doubled until the relative residual of the identity is at most this; if it is larger at
            ``max_nodes``, or stays while nodes double twice, the result comes with a TangentWarning.
        nodes: a fixed number of quadrature nodes; None doubles them from 4.
        max_nodes: the most quadrature nodes.
        wrt: the parameters θ: a name pattern, a parameter, or several of these; None is all that require a gradient. The
            others must not change along the path.
        output_fn: picks a tensor (n, c) from what the model returns; None takes that itself, or its `logits`.
        memory_limit: bytes that may be used; None is half of what is free.
        buffers: "same" refuses floating buffers that differ between the ends (a batch norm's running statistics, for
            example); "path" moves them along the path with the parameters. Integer buffers stay as at the start.
        progress: called with the number of nodes and the fraction of them that is done; it starts again where nodes are
            doubled. True shows a bar.

    Raises:
        TangentError: when the state dicts do not fit, nothing changes between them, or memory would exceed the limit.

    Source: LeJeune & Alemohammad, CPAL 2024, §4.

    >>> import torch, adaptive_tangents as at
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> start = {k: v.clone() for k, v in model.state_dict().items()}
    >>> end = {k: v + 0.1 for k, v in start.items()}
    >>> av = at.average_features(model, start, end, torch.randn(5, 3))
    >>> av.error <= 1e-3
    True
    """
    with shown(progress) as told:
        found, doubt = unwarned(
            model, start, end, x, tol=tol, nodes=nodes, max_nodes=max_nodes, wrt=wrt, output_fn=output_fn,
            memory_limit=memory_limit, buffers=buffers, progress=told,
        )  # fmt: skip
    if doubt:
        warnings.warn(doubt, TangentWarning, stacklevel=2)
    return found


def unwarned(
    model: nn.Module, start: Params, end: Params, x: Batch, *,
    tol: float = 1e-3, nodes: int | None = None, max_nodes: int = 256, wrt: Selection | None = None,
    output_fn: OutputFn | None = None, memory_limit: int | None = None, buffers: Buffers = "same",
    progress: Progress | None = None, call: str = "average_features",
) -> tuple[AverageFeatures, str]:  # fmt: skip
    """``average_features``, with its warning as words, for callers that expect it; empty if the identity holds.

    ``call`` is the one that errors name.
    """
    doubt = ""
    if not tol > 0:
        raise TangentError(f"{call}: tol is a positive number, got {tol}")
    if (nodes is not None and nodes < 1) or max_nodes < 1:
        raise TangentError(f"{call}: nodes is a positive number, got {max_nodes if nodes is None else nodes}")
    if buffers not in ("same", "path"):
        raise TangentError(f"{call}: buffers is 'same' or 'path', got {buffers!r}")
    first = Capture(call, model, x, start, wrt, output_fn, memory_limit, whole=True)
    with LOCK:
        theta1, buffers1 = overlay(call, model, end)
    names = first.network.selected
    moved = [k for k, p in first.network.parameters.items() if k not in names and not torch.equal(p, theta1[k])]
    if moved:
        left, remedy = "wrt leaves them out", "widen wrt"
        if wrt is None:
            left = "require no gradient (requires_grad=False) and are left out"
            remedy = "set requires_grad=True, let wrt be '*', which takes all parameters"
        raise TangentError(
            f"{call}: {', '.join(moved[:4])} change along the path but {left}, so the identity cannot hold; {remedy}, or "
            "give both ends the same values there"
        )
    shift = _moved_buffers(call, first.network.buffers, buffers1, refuse=buffers == "same")
    first.forget()
    after = first.at(theta1, {**first.network.buffers, **{k: buffers1[k] for k in shift}})
    change = (after.outputs(x, {}) - first.outputs(x, {})).double()
    scale = float(change.norm())
    if scale == 0:
        raise TangentError(
            f"{call}: the network's outputs are the same at start and end; there is no change to average"
        )
    delta = torch.cat([(theta1[name] - first.network.parameters[name]).flatten() for name in names])
    count, errors = nodes or min(4, max_nodes), list[float]()
    while True:

        def averaged(count: int = count) -> tuple[TangentFeatures, Tensor | None]:
            return _average(call, first, after, shift, x, count, progress)

        # One loan for all nodes, unless the user's own function runs in between.
        made, moved_by = first.network.lend(averaged) if progress is None else averaged()
        rest = change - made.matvec(delta).double()
        error = float((rest if moved_by is None else rest - moved_by).norm()) / scale
        errors.append(error)
        stays = len(errors) > 2 and max(errors[-3:]) - min(errors[-3:]) < _STAYS * error
        if nodes is not None or error <= tol or count >= max_nodes or stays:
            break
        count = min(2 * count, max_nodes)
    if nodes is None and error > tol:
        remedy = (
            "and more nodes do not change that: along the path, the outputs do not change as the features say; look for "
            "detached values, straight-through estimators or jumps in the model"
        )
        doubt = f"{call}: the path identity holds to {error:.2e} at {count} nodes, not to tol = {tol:g}" + (
            f", {remedy}" if stays else "; raise max_nodes or tol"
        )
    found = AverageFeatures(
        made.n, made.c, made.blocks, made.parameters, made.limit,
        error=error, nodes=count, change=change, buffer_change=moved_by,
    )  # fmt: skip
    return found, doubt


def _average(
    call: str,
    first: Capture,
    after: Capture,
    shift: Mapping[str, Tensor],
    x: Batch,
    count: int,
    progress: Progress | None,
) -> tuple[TangentFeatures, Tensor | None]:
    """Features averaged over the nodes, and the change that the buffers made."""
    points, weights = np.polynomial.legendre.leggauss(count)
    limit = limit_for(first.requested, first.probe.device)
    theta0, theta1, buffers0 = first.network.parameters, after.network.parameters, first.network.buffers
    # All nodes side by side, one node, and a copy of one block; what is materialized is copied as it is added up.
    probe = first.probe
    a_sample = probe.held_bytes(count) + probe.held_bytes() + count * probe.largest_bytes + 2 * probe.whole_bytes
    require_memory(
        call, samples(x) * a_sample, limit,
        remedy=f"take fewer samples or outputs, narrow wrt, or lower max_nodes (now at {count} nodes)",
    )  # fmt: skip
    collected: dict[str, list[Block]] = {}
    by_buffers: Tensor | None = None
    for done, (s, w) in enumerate(zip((points + 1) / 2, weights / 2, strict=True), start=1):
        between = {name: torch.lerp(theta0[name], theta1[name], float(s)) for name in theta0}
        stats = {**buffers0, **{name: buffers0[name] + float(s) * step for name, step in shift.items()}}
        node = first.at(between, stats)
        features = node.features(x)
        left = dict(features.blocks)
        features = replace(features, blocks={})
        for name in list(left):
            block = left.pop(name)  # freed once it is weighted
            weighted, kept = block.compact(copies=count).scaled(float(w)), collected.setdefault(name, [])
            if weighted.dense is not None and kept:
                # Materialized features are added up at once; only factors are kept for every node.
                weighted = sum_blocks([kept.pop(), weighted])
            kept.append(weighted)
        if shift:
            part = float(w) * _buffer_derivative(node, shift, x)
            by_buffers = part if by_buffers is None else by_buffers + part
        if progress is not None:
            progress(f"{count} nodes", done / count)
    blocks = {name: sum_blocks(collected.pop(name)) for name in list(collected)}
    return TangentFeatures(features.n, features.c, blocks, features.parameters, first.requested), by_buffers


def _moved_buffers(
    call: str, start: Mapping[str, Tensor], end: Mapping[str, Tensor], *, refuse: bool
) -> dict[str, Tensor]:
    """b₁ − b₀ for the floating buffers that move."""
    real = {k: b for k, b in start.items() if b.is_floating_point() or b.is_complex()}
    moved = {k: end[k] - b for k, b in real.items() if not torch.equal(b, end[k])}
    if moved and refuse:
        raise TangentError(
            f"{call}: buffer {next(iter(moved))!r} differs between start and end, so the outputs change by more than the "
            "parameters do; give both ends the same buffers, such as a batch norm's running statistics, or move them along "
            "the path with buffers='path'"
        )
    return moved


class _PlainBatchNorm(TorchFunctionMode):
    """Batch norm in evaluation mode by its formula: torch's own silently drops the derivative by its running statistics."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in (torch.batch_norm, nn.functional.instance_norm, torch.instance_norm):
            raise NotImplementedError(function.__name__)
        return (_batch_norm if function is nn.functional.batch_norm else function)(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    shape = (1, -1, *[1] * (input.ndim - 2))
    scale = (running_var + eps).rsqrt() * (1 if weight is None else weight)
    out = (input - running_mean.view(shape)) * scale.view(shape)
    return out if bias is None else out + bias.view(shape)


def _buffer_derivative(node: Capture, shift: Mapping[str, Tensor], x: Batch) -> Tensor:
    """∂f/∂b (b₁ − b₀) at a node, for every sample and output (n, c)."""
    base = {name: node.network.buffers[name] for name in shift}

    def outputs(buffers: Mapping[str, Tensor]) -> Tensor:
        return replace(node.network, buffers={**node.network.buffers, **buffers})(take(x, None), {})

    def derivative() -> Tensor:
        with torch.no_grad():
            try:
                with _PlainBatchNorm():
                    found: Tensor = torch.func.jvp(outputs, (base,), (dict(shift),))[1]
                    return found.detach().double()
            except (RuntimeError, NotImplementedError):
                step = torch.finfo(next(iter(base.values())).dtype).eps ** (1 / 3)
                sides = [outputs({k: b + sign * step * shift[k] for k, b in base.items()}).double() for sign in (1, -1)]
                difference: Tensor = (sides[0] - sides[1]) / (2 * step)
                return difference

    return node.network.lend(derivative)
