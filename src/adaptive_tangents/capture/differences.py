"""The gradient held against the function: central differences of one sample's outputs along a random direction.

Features are compared with autograd everywhere else. This catches what autograd itself does not see: a detached value, a
straight-through estimator, a norm taken as constant.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from adaptive_tangents.capture.batches import Batch, cast, cast_tensor
from adaptive_tangents.capture.derivatives import mixed, saved_copies, signs
from adaptive_tangents.capture.graph import Graph, read_graph
from adaptive_tangents.capture.held_nodes import held_nodes
from adaptive_tangents.capture.network import Network
from adaptive_tangents.checks import listed
from adaptive_tangents.errors import TangentWarning

_WIDE = 100_000  # parameters; above this, float64 is for what float32 makes suspect
_STEPS: Mapping[torch.dtype, tuple[float, ...]] = {
    torch.float64: (1e-6, 1e-7, 1e-5),
    torch.float32: (1e-3, 3e-4, 3e-3),
}
_NEARBY = 0.03
_BEYOND = 5  # times the differences of several steps from each other, to be judged by them
_ALLOWED: Mapping[torch.dtype, float] = {torch.float64: 1e-4, torch.float32: 3e-2}


@dataclass(frozen=True)
class _Direction:
    """Signs of rows times signs of columns, by the size of the parameter's entries; and the slope that the gradient says."""

    rows: Tensor
    columns: Tensor
    size: float
    slope: float

    def moved(self, value: Tensor, step: float) -> Tensor:
        rows, columns = self.rows.to(value), self.columns.to(value)
        return torch.addr(value.reshape(len(rows), -1), rows, columns, alpha=step * self.size).view(value.shape)


def verify(net: Network, x: Batch, out: Tensor, leaves: Mapping[str, Tensor]) -> None:
    """During a loan, hold one sample's outputs (1, c), just computed, and their gradient against the function itself.

    Raises TangentError if the model wrote to its parameters or used what an earlier call left behind. Warns if autograd's
    gradient is not the derivative.
    """
    net.check_unwritten(thoroughly=True)
    if not out.requires_grad or not bool(torch.isfinite(out).all()):
        return
    if net.holds_derived:
        net.check_fresh(_graph_of(out).parents)
    found = _gradients(net, x, out, leaves)
    net.check_returned()
    _check_derivative(net, x, found, least=lambda: _graph_of(out).dtype)


def _graph_of(out: Tensor) -> Graph:
    with held_nodes() as nodes:
        return read_graph(out, {}, nodes)


def _gradients(net: Network, x: Batch, out: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Autograd's gradients of a random combination of all outputs, just computed."""

    def back(out: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(mixed(out).sum(), list(leaves.values()), retain_graph=True, allow_unused=True)

    try:
        found = back(out)
    except RuntimeError:  # something was overwritten
        with saved_copies():
            found = back(net(x, leaves))
    return dict(zip(leaves, found, strict=True))


def _check_derivative(
    net: Network, x: Batch, gradients: Mapping[str, Tensor | None], *, least: Callable[[], torch.dtype]
) -> None:
    """Warn where ``gradients`` of the combined outputs are not the slopes of the function.

    A step is judged only where others agree with it, so that a kink or a rounding error accuses nobody; nor is a network
    that computes something in less than float32, ``least``. What is wrong must be so nearby, too: a unit whose input is
    exactly zero sits on a kink, whatever the step.
    """
    if not all(net.parameters[name].dtype in _STEPS for name in gradients):
        return  # too coarse for differences
    still = _padding(net)
    along = {name: _direction(net.parameters[name], gradient, still.get(name)) for name, gradient in gradients.items()}
    if _agree(net, x, along) or least() not in _STEPS:
        return
    net = _nearby(net)
    leaves = net.leaves()
    gradients = _gradients(net, x, net(x, leaves), leaves)
    along = {name: _direction(net.parameters[name], gradient, still.get(name)) for name, gradient in gradients.items()}
    if _agree(net, x, along):
        return
    wrong = [name for name, way in along.items() if not _agree(net, x, {name: way})]
    if wrong:
        warnings.warn(
            f"{net.call}: the outputs do not change with {listed(wrong)} as autograd's gradient says, so the gradient is "
            "not their derivative (a detached value, rounding, a straight-through estimator); features are the gradient",
            TangentWarning,
            stacklevel=2,
        )


def _nearby(net: Network) -> Network:
    """The network with each parameter moved at random, by more than the steps of differences."""
    generator = torch.Generator().manual_seed(0)

    def moved(value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=generator).to(value)
        return torch.add(value, noise, alpha=_NEARBY * _size(value))

    return replace(net, parameters={**net.parameters, **{name: moved(net.parameters[name]) for name in net.selected}})


def _padding(net: Network) -> dict[str, int]:
    """The rows of tables that never learn, by what autograd calls their gradient."""
    rows = {
        id(module.weight): module.padding_idx
        for module in net.model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None
    }
    return {name: rows[id(p)] for name, p in net.model.named_parameters() if id(p) in rows}


def _direction(value: Tensor, gradient: Tensor | None, still: int | None) -> _Direction:
    rows = value.shape[0] if value.ndim else 1
    columns = value.numel() // rows
    s, r = (signs(size, side).to(value) for side, size in enumerate((rows, columns)))
    if still is not None:
        s = s.clone()
        s[still] = 0
    size = _size(value)
    slope = 0.0 if gradient is None else float(s @ (gradient.to_dense().reshape(rows, columns) @ r)) * size
    return _Direction(s, r, size, slope)


def _size(value: Tensor) -> float:
    """The size of a parameter's entries, or of those that it would have in training."""
    norm = float(torch.linalg.vector_norm(value))
    columns = value.numel() // (value.shape[0] if value.ndim else 1)
    return norm / math.sqrt(value.numel()) if norm else 1 / math.sqrt(columns)


def _agree(net: Network, x: Batch, along: Mapping[str, _Direction]) -> bool:
    """Whether the outputs' slope along a direction is the gradient's, or differences do not tell."""
    small = sum(value.numel() for value in net.parameters.values()) <= _WIDE
    return any(_agree_in(net, x, along, wide=wide) for wide in ([True, False] if small else [False, True]))


def _agree_in(net: Network, x: Batch, along: Mapping[str, _Direction], *, wide: bool) -> bool:
    """The same, in float64 if ``wide``; longer steps decide where a part in float32 makes short ones uncertain."""
    expected = sum(way.slope for way in along.values())
    least = math.hypot(*(way.slope for way in along.values()))
    for coarse in (False, True):
        found: list[float] = []
        for k in range(3):
            slope, dtype = _slope(net, x, along, k, wide=wide, coarse=coarse)
            size = max(least, abs(slope))
            if not abs(slope) < math.inf or abs(slope - expected) <= _ALLOWED[dtype] * size:
                return True
            found.append(slope)
        spread = max(found) - min(found)
        if min(abs(slope - expected) for slope in found) > _BEYOND * spread:
            return False
        if dtype == torch.float32:
            break
    return True


def _slope(
    net: Network, x: Batch, along: Mapping[str, _Direction], k: int, *, wide: bool, coarse: bool
) -> tuple[float, torch.dtype]:
    """The central difference of the combined outputs, in float64 where the model can run in it, and the steps' dtype."""
    dtype = max((net.parameters[name].dtype for name in along), key=lambda dtype: torch.finfo(dtype).eps)
    if wide and dtype != torch.float64:
        steps = torch.float32 if coarse else torch.float64
        step = _STEPS[steps][k]
        other = replace(net, buffers={name: _wider(b) for name, b in net.buffers.items()})
        values = {name: _wider(value) for name, value in net.parameters.items()}
        with suppress(Exception):  # some tensor of the model has its dtype written in
            sides = [other(cast(x, torch.float64), moved) for moved in _moved(values, along, step)]
            return _difference(sides, step), steps
    steps = torch.float32 if coarse else dtype
    step = _STEPS[steps][k]
    sides = [replace(net, parameters=moved)(x, {}) for moved in _moved(net.parameters, along, step)]
    return _difference(sides, step), steps


def _wider(value: Tensor) -> Tensor:
    return cast_tensor(value, torch.float64)


def _moved(values: Mapping[str, Tensor], along: Mapping[str, _Direction], step: float) -> Iterator[dict[str, Tensor]]:
    """The parameters a step forward and a step back."""
    for signed in (step, -step):
        yield {**values, **{name: way.moved(values[name], signed) for name, way in along.items()}}


def _difference(sides: list[Tensor], step: float) -> float:
    forward, back = (float(mixed(out.detach()).sum(dtype=torch.float64)) for out in sides)
    return (forward - back) / (2 * step)
