"""What measures of kernels take: targets as columns of a moderate size, and checks of kernels."""

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.checks import as_tensor, check_finite, class_columns
from adaptive_tangents.errors import TangentError
from adaptive_tangents.kernels.derived_kernels import check_symmetric, largest, power_of_two
from adaptive_tangents.kernels.tiles import Tiled

Values = Tensor | np.ndarray

_SAFE_ROOT = 32  # targets from 2⁻³² to 2³²: K_y is of their squares
_ROUNDED = 8 * torch.finfo(torch.float64).eps  # what centering a constant leaves of it
_RESOLVED = 64  # units of rounding that what is left must have, to know its direction to some percent


def numbers(call: str, values: object) -> Tensor:
    """Finite real numbers in float64."""
    tensor = as_tensor(call, "the values", values, torch.device("cpu")).detach()
    if tensor.is_complex():
        raise TangentError(f"{call}: takes real numbers, got {tensor.dtype}; give their sizes, such as B.abs()")
    check_finite(call, "the value", [tensor])
    return tensor.double()


def columns(call: str, kernel: Tiled, y: object) -> tuple[Float[Tensor, "N k"], float, float]:
    """Y over a power of two, with K_y = s²YYᵀ; that power s; and the rounding of the numbers given."""
    given = as_tensor(call, "targets", y, kernel.device).detach()
    check_finite(call, "the value", [given])
    rounding = rounding_of(given.dtype, [given])
    target = (
        class_columns(call, given, kernel.width if kernel.full else None).to(kernel.device) if given.ndim else given
    )
    target = target[:, None] if target.ndim == 1 else target
    wanted = (kernel.n, kernel.width) if kernel.full else (kernel.n, *target.shape[1:2])
    if target.ndim != 2 or tuple(target.shape) != wanted:
        raise TangentError(
            f"{call}: targets of shape {tuple(given.shape)} do not fit a kernel of shape {shape_of(kernel)}"
        )
    scale = power_of_two(largest(target), safe=_SAFE_ROOT)
    return (target.reshape(-1, 1) if kernel.full else target) / scale, scale, rounding


def rounding_of(dtype: torch.dtype, values: Iterable[Tensor]) -> float:
    """The rounding of numbers: that of float32 also for numbers in float64 which float32 holds, as after ``.double()``."""
    if dtype == torch.float64 and all(torch.equal(value.float().double(), value.double()) for value in values):
        return torch.finfo(torch.float32).eps
    return torch.finfo(dtype if dtype.is_floating_point else torch.float64).eps


def shape_of(kernel: Tiled) -> tuple[int, ...]:
    """The shape of a kernel of samples with themselves."""
    return (kernel.n, kernel.width, kernel.n, kernel.width) if kernel.full else (kernel.n, kernel.n)


def check_resolved(call: str, what: str, left: float, whole: float, rounding: float, zero: str) -> None:
    """Raise TangentError if centering leaves nothing of a norm ``whole`` (``zero`` says so), or nothing but rounding."""
    if left <= _ROUNDED * whole:
        raise TangentError(f"{call}: {zero}")
    if left <= _RESOLVED * rounding * whole:
        raise TangentError(
            f"{call}: centering leaves {left / whole:.0e} of {what}, whose numbers are rounded to {rounding:.0e}, so the "
            "angle is not known; center what it is made from first, or make it in float64"
        )


def check_square(call: str, kernel: Tiled, whole: float = 0.0) -> None:
    """Raise TangentError unless a kernel is symmetric up to the rounding of its entries, of norm ``whole``."""
    check_symmetric(call, kernel, slack=_RESOLVED * torch.finfo(kernel.dtype).eps * whole)
