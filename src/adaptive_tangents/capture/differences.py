"""The gradient held against the function: central differences of one sample's outputs along a random direction.

Blocks are compared with autograd everywhere else. This catches what autograd itself does not see: a detached value, a
straight-through estimator, a norm taken as constant.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from adaptive_tangents.capture.batches import Batch, cast, cast_tensor
from adaptive_tangents.capture.derivatives import mixed
from adaptive_tangents.capture.network import Network
from adaptive_tangents.checks import listed
from adaptive_tangents.errors import TangentWarning

_WIDE = 2_000_000  # parameters; above this, a copy of all of them in float64 takes longer than it tells
_STEPS: Mapping[torch.dtype | None, tuple[float, ...]] = {
    torch.float64: (1e-6, 1e-7, 1e-5),
    torch.float32: (1e-3, 3e-4, 3e-3),
}
_ALLOWED: Mapping[torch.dtype | None, float] = {torch.float64: 1e-4, torch.float32: 3e-2}


def check_derivative(net: Network, x: Batch, gradients: Mapping[str, Tensor | None]) -> None:
    """Warn where ``gradients``, of the combination ``mixed`` of one sample's outputs, are not the slopes of the function.

    A step is judged only where others agree with it, so that a kink or a rounding error accuses nobody.
    """
    along = {name: _direction(net.parameters[name], k) for k, name in enumerate(gradients)}
    slopes = {
        name: 0.0 if gradient is None else float((gradient.to_dense() * along[name]).sum(dtype=torch.float64))
        for name, gradient in gradients.items()
    }
    if _agree(net, x, along, slopes) is not False:
        return
    wrong = [name for name in along if _agree(net, x, {name: along[name]}, slopes) is False]
    if wrong:
        warnings.warn(
            f"{net.call}: the outputs do not change with {listed(wrong)} as autograd's gradient says, so the gradient is "
            "not their derivative (a detached value, rounding, a straight-through estimator); features are the gradient",
            TangentWarning,
            stacklevel=2,
        )


def _direction(value: Tensor, seed: int) -> Tensor:
    """Random signs for rows and columns, times the size of the parameter's entries."""
    generator = torch.Generator().manual_seed(seed)
    rows = value.shape[0] if value.ndim else 1
    columns = value.numel() // rows
    signs = [1.0 - 2.0 * torch.randint(2, (size,), generator=generator).to(value) for size in (rows, columns)]
    size = torch.linalg.vector_norm(value) / value.numel() ** 0.5
    size = torch.where(size > 0, size, torch.as_tensor(columns**-0.5).to(value))
    return (size * signs[0][:, None] * signs[1]).reshape(value.shape)


def _agree(net: Network, x: Batch, along: Mapping[str, Tensor], slopes: Mapping[str, float]) -> bool | None:
    """Whether the outputs' slope along a direction is the gradient's; None where differences do not tell."""
    parts = [slopes[name] for name in along]
    dtype = torch.float64 if sum(value.numel() for value in net.parameters.values()) <= _WIDE else None
    found: list[float] = []
    for k in range(len(_STEPS[torch.float64])):
        slope, dtype = _slope(net, x, along, k, dtype)
        size = max(sum(part**2 for part in parts) ** 0.5, abs(slope))
        if not abs(slope) < math.inf or abs(slope - sum(parts)) <= _ALLOWED[dtype] * size:
            return True
        found.append(slope)
    return False if max(found) - min(found) <= _ALLOWED[dtype] * size else None


def _slope(
    net: Network, x: Batch, along: Mapping[str, Tensor], k: int, dtype: torch.dtype | None
) -> tuple[float, torch.dtype]:
    """The central difference of the combined outputs, in ``dtype`` where the model can run in it, and the dtype."""
    own = max((net.parameters[name].dtype for name in along), key=lambda dtype: torch.finfo(dtype).eps)
    if dtype == torch.float64 != own:
        wide = replace(net, buffers={name: _wider(b) for name, b in net.buffers.items()})
        values = {name: _wider(value) for name, value in net.parameters.items()}
        with suppress(Exception):  # some tensor of the model has its dtype written in
            sides = [wide(cast(x, dtype), moved) for moved in _moved(values, along, _STEPS[dtype][k])]
            return _difference(sides, _STEPS[dtype][k]), dtype
    dtype = own if own in _STEPS else torch.float32
    sides = [replace(net, parameters=moved)(x, {}) for moved in _moved(net.parameters, along, _STEPS[dtype][k])]
    return _difference(sides, _STEPS[dtype][k]), dtype


def _wider(value: Tensor) -> Tensor:
    return cast_tensor(value, torch.float64)


def _moved(values: Mapping[str, Tensor], along: Mapping[str, Tensor], step: float) -> Iterator[dict[str, Tensor]]:
    """The parameters a step forward and a step back."""
    for signed in (step, -step):
        yield {**values, **{name: values[name] + signed * way.to(values[name]) for name, way in along.items()}}


def _difference(sides: list[Tensor], step: float) -> float:
    forward, back = (float(mixed(out.detach()).sum(dtype=torch.float64)) for out in sides)
    return (forward - back) / (2 * step)
