"""The layout of a kernel: its kind over outputs, its shape and dtype, and the form it has while it is summed.

While it is summed a kernel is (batch, N, M): full (1, n·c, m·c), trace (1, n, m), diagonal (c, n, m).
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.runtime.chunks import ranges
from adaptive_tangents.runtime.memory import empty

Outputs = Literal["full", "trace", "diagonal"]
"""The kind of a kernel over outputs: (n, c, m, c), (n, m) summed over outputs, or (n, m, c) each output with itself."""

Precision = Literal["float32", "mixed", "float64", "bfloat16"]


def kernel_shape(outputs: Outputs, n: int, m: int, c: int) -> tuple[int, ...]:
    """Shape of a kernel of n by m samples with c outputs."""
    return {"full": (n, c, m, c), "trace": (n, m), "diagonal": (n, m, c)}[outputs]


def entries(outputs: Outputs, c: int) -> int:
    """Entries of a kernel for a pair of samples with c outputs."""
    return {"full": c**2, "trace": 1, "diagonal": c}[outputs]


def column_axis(outputs: Outputs) -> int:
    """The dimension of a kernel along which the second samples run."""
    return 2 if outputs == "full" else 1


def swapped(kernel: Float[Tensor, "..."], outputs: Outputs) -> Float[Tensor, "..."]:
    """K(x₂, x) from K(x, x₂)."""
    return kernel.permute(2, 3, 0, 1) if outputs == "full" else kernel.transpose(0, 1)


def check_outputs(call: str, outputs: str) -> None:
    """Raise TangentError unless ``outputs`` names a kind of kernel."""
    if outputs not in ("full", "trace", "diagonal"):
        raise TangentError(f"{call}: outputs is 'full', 'trace' or 'diagonal', got {outputs!r}")


def check_precision(call: str, precision: str) -> None:
    """Raise TangentError unless ``precision`` names a way to contract features."""
    if precision not in get_args(Precision):
        raise TangentError(f"{call}: precision is 'float32', 'mixed', 'float64' or 'bfloat16', got {precision!r}")


def empty_kernel(
    n: int, m: int, c: int, outputs: Outputs, like: Tensor, precision: Precision = "float32"
) -> Float[Tensor, "batch N M"]:
    """A kernel of zeros, in the (batch, N, M) layout."""
    shape = {"full": (1, n * c, m * c), "trace": (1, n, m), "diagonal": (c, n, m)}[outputs]
    return empty(shape, like, kernel_dtype(like.dtype, precision)).zero_()


def working_dtype(dtype: torch.dtype, precision: Precision = "float32") -> torch.dtype:
    """The dtype that features of ``dtype`` are contracted in: float32 or better."""
    return torch.promote_types(dtype, torch.float64 if precision == "float64" else torch.float32)


def kernel_dtype(dtype: torch.dtype, precision: Precision = "float32") -> torch.dtype:
    """The dtype in which blocks are added up, which is the kernel's."""
    return torch.float64 if precision == "mixed" else working_dtype(dtype, precision)


def mirror(kernel: Float[Tensor, "batch N N"]) -> None:
    """Copy the upper triangle onto the lower, in place."""
    for rows in ranges(kernel.shape[1], 128):
        diagonal = kernel[:, rows, rows]
        diagonal.copy_(diagonal.triu() + diagonal.triu(1).mT)
        kernel[:, rows.stop :, rows] = kernel[:, rows, rows.stop :].mT


def check_overflow(kernel: Float[Tensor, "batch N M"], rows: int) -> None:
    """Raise TangentError if an entry is too large for the kernel's dtype; a sample has ``rows`` rows."""
    if bool(torch.isfinite(kernel.sum())) or bool(torch.isfinite(kernel).all()):
        return
    first = int((~torch.isfinite(kernel)).any(2).any(0).nonzero()[0, 0]) // rows
    remedy = (
        "scale the outputs, e.g. output_fn=lambda out: out / 1e100"
        if kernel.dtype == torch.float64
        else "use float64: precision='float64', or for a store dtype=torch.float64 (--float64)"
    )
    raise TangentError(
        f"kernel: products of the features of sample {first} are too large for {str(kernel.dtype).removeprefix('torch.')}, "
        f"whose largest number is {torch.finfo(kernel.dtype).max:.0e}; {remedy}"
    )


def finish(kernel: Float[Tensor, "batch N M"], n: int, m: int, c: int, outputs: Outputs) -> Tensor:
    """From the (batch, N, M) layout to the user's: (n, c, m, c), (n, m) or (n, m, c)."""
    if outputs == "full":
        return kernel.reshape(n, c, m, c)
    return kernel[0] if outputs == "trace" else kernel.permute(1, 2, 0).contiguous()
