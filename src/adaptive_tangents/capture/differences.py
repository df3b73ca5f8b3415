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

from adaptive_tangents.capture.batches import Batch, cast, cast_tensor, take
from adaptive_tangents.capture.derivatives import mixed, saved_copies, signs
from adaptive_tangents.capture.graph import Graph, read_graph
from adaptive_tangents.capture.held_nodes import held_nodes
from adaptive_tangents.capture.network import Network
from adaptive_tangents.capture.passes import Forward
from adaptive_tangents.checks import listed
from adaptive_tangents.errors import TangentWarning
from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.summands import SampleMap, sum_tensors
from adaptive_tangents.linalg.hadamard import Row

_WIDE = 100_000  # parameters; above this, float64 is for what float32 makes suspect
_STEPS: Mapping[torch.dtype, tuple[float, ...]] = {
    torch.float64: (1e-6, 1e-7, 1e-5),
    torch.float32: (1e-3, 3e-4, 3e-3),
}
_SHORT, _LONG = 1e-6, 3e-3
_KINKS = {
    "Abs", "Clamp", "ClampMax", "ClampMin", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyRelu", "MaxPool2DWithIndices",
    "PreluKernel", "Relu", "Threshold",
}  # fmt: skip
_NEARBY = 0.03
_FEW = 16  # samples
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
    if not check_state(net, out):
        return
    found = _gradients(net, x, out, leaves)
    net.check_returned()
    _check_derivative(net, x, found, least=lambda: graph_of(out).dtype)


def check_state(net: Network, out: Tensor) -> bool:
    """Raise TangentError if the model wrote to parameters or used what an earlier call left; whether ``out`` is of use."""
    net.check_unwritten(thoroughly=True)
    if not out.requires_grad or not bool(torch.isfinite(out).all()):
        return False
    if net.holds_derived:
        net.check_fresh(graph_of(out).parents)
    return True


def graph_of(out: Tensor) -> Graph:
    """The graph of outputs, during a loan."""
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
    net = nearby(net)
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


def nearby(net: Network) -> Network:
    """The network with each parameter moved at random, by more than the steps of differences."""
    generator = torch.Generator().manual_seed(0)

    def moved(value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=generator, device="cpu").to(value)
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
    return _entry_size(value, float(torch.linalg.vector_norm(value)))


def _entry_size(value: Tensor, norm: float) -> float:
    columns = value.numel() // (value.shape[0] if value.ndim else 1)
    return norm / math.sqrt(value.numel()) if norm else 1 / math.sqrt(columns)


def _agree(net: Network, x: Batch, along: Mapping[str, _Direction]) -> bool:
    """Whether the outputs' slope along a direction is the gradient's, or differences do not tell."""
    small = sum(value.numel() for value in net.parameters.values()) <= _WIDE
    return any(_agree_in(net, x, along, wide=wide) for wide in ([True] if small else [False, True]))


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


def follows(
    net: Network, x: Batch, blocks: Mapping[str, Block], seen: Forward, index: Tensor, tolerance: float
) -> bool:
    """During a loan, whether some samples, at parameters moved a step, have the outputs that their features say.

    The first of ``index`` is evaluated by itself, and all of them together. If they have, features are derivatives, and the
    rest of the batch has had no influence of more than ``tolerance``. Otherwise this remains open; `verify` judges.
    """
    dtype = max((net.parameters[name].dtype for name in net.selected), key=lambda dtype: torch.finfo(dtype).eps)
    if dtype not in _STEPS:
        return False
    along, out = _sides(net, blocks), seen.out.detach()
    index = index.to(out.device)
    # Of few samples, selecting some in every block takes longer than it saves.
    taken, places = (SampleMap(), index) if len(out) <= _FEW else (SampleMap(index), slice(None))
    slopes = [
        sum_tensors([part.map(taken).coordinates(Row(rows), Row(columns)) for part in blocks[name].summands])
        for name, (rows, columns) in along.items()
    ]
    each = torch.stack(slopes)[:, places, :, 0].double()
    least, slope, there = float(mixed(each[:, 0]).norm()), each.sum(0), out[index].double()
    some, near = take(x, index), tolerance * float(out.abs().max())
    one = take(some, slice(0, 1))

    def agree(change: Tensor, rest: Tensor, dtype: torch.dtype) -> bool:
        """Whether a change of the first one's outputs, over the step, is the slope, and no ``rest`` of outputs is left."""
        off, size = mixed((change - slope[0])[None]), mixed(change[None])
        judged = abs(float(off)) <= _ALLOWED[dtype] * max(least, abs(float(size)))
        return judged and float(rest.abs().max()) <= near

    with torch.no_grad():
        small = sum(value.numel() for value in net.parameters.values()) <= _WIDE
        # A part in float32 makes short steps uncertain, and kinks long ones.
        kinks = not _KINKS.isdisjoint(seen.graph.operations)
        if dtype == torch.float64 or not (small or kinks):
            step, steps = _STEPS[dtype][0 if dtype == torch.float64 else 1], _steps(net, blocks, along)
            change = _moved_by(net, steps, step)(one, {})[0].double() - there[0]
            if agree(change / step, change - step * slope[0], dtype):
                if len(index) == 1:
                    return True
                rest = _moved_by(net, steps, -step)(some, {}).double() - there + step * slope
                return float(rest.abs().max()) <= near
        if dtype == torch.float64:
            return False
        with suppress(Exception):  # some tensor of the model has its dtype written in
            wide = replace(
                net,
                parameters={name: _wider(value) for name, value in net.parameters.items()},
                buffers={name: _wider(b) for name, b in net.buffers.items()},
            )
            steps = _steps(wide, blocks, along)
            for step in (_SHORT, _LONG) if kinks else (_LONG, _SHORT):
                ahead = _moved_by(wide, steps, step)(cast(one, torch.float64), {})[0].double()
                behind = _moved_by(wide, steps, -step)(cast(some, torch.float64), {}).double()
                rest = torch.cat(
                    [((ahead + behind[0]) / 2 - there[0])[None], behind[1:] - there[1:] + step * slope[1:]]
                )
                if agree((ahead - behind[0]) / (2 * step), rest, torch.float64 if small else torch.float32):
                    return True
    return False


def _sides(net: Network, blocks: Mapping[str, Block]) -> dict[str, tuple[Tensor, Tensor]]:
    """For each block a direction: signs of rows, and signs of columns by the size of their parameter's entries."""
    still, found = _padding(net), {}
    values = [net.parameters[name] for name in net.selected]
    norms = torch.stack(torch._foreach_norm(values)).tolist()
    sizes = {name: _entry_size(value, norm) for name, value, norm in zip(net.selected, values, norms, strict=True)}
    for name, block in blocks.items():
        rows, columns = (signs(size, side).to(torch.float64, copy=True) for side, size in enumerate(block.shape))
        for slot in block.slots:
            columns[slot.column : slot.column + slot.width] *= sizes[slot.parameter]
            if slot.parameter in still:
                (columns if slot.transposed else rows)[still[slot.parameter]] = 0
        found[name] = rows, columns
    return found


def _steps(net: Network, blocks: Mapping[str, Block], along: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The directions as tensors of the parameters' shapes."""
    steps = {}
    for name, (rows, columns) in along.items():
        for slot in blocks[name].slots:
            like = net.parameters[slot.parameter]
            made = torch.outer(rows.to(like), columns[slot.column : slot.column + slot.width].to(like))
            steps[slot.parameter] = (made.mT if slot.transposed else made).reshape(slot.shape)
    return steps


def _moved_by(net: Network, steps: Mapping[str, Tensor], step: float) -> Network:
    """The network a step along some directions."""
    values = [net.parameters[name] for name in steps]
    moved = torch._foreach_add(values, list(steps.values()), alpha=step)
    return replace(net, parameters={**net.parameters, **dict(zip(steps, moved, strict=True))})
