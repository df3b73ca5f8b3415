"""A kernel as a scipy linear operator, for scipy's solvers."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from adaptive_tangents.errors import TangentError
from adaptive_tangents.kernels.products import KernelProducts, cached
from adaptive_tangents.kernels.tiles import Kernels, Request, Tiled, tiled


class KernelOperator(KernelProducts, LinearOperator):  # type: ignore[misc]
    """K + ρI as a scipy ``LinearOperator``, with products tile by tile in float64; ``kernel_operator`` makes it.

    Vectors are (n·c,) in the order of (n, c), or (n,) for a trace kernel; several vectors are columns. ``apply`` takes torch
    tensors instead.
    """

    def __init__(self, kernel: Tiled, *, ridge: float = 0.0) -> None:
        KernelProducts.__init__(self, kernel, ridge=ridge)
        LinearOperator.__init__(self, np.dtype(np.float64), (kernel.n * self.c, kernel.m * self.c))

    def _matvec(self, x: NDArray[Any]) -> NDArray[np.float64]:
        return self._matmat(x.reshape(-1, 1))[:, 0]

    def _matmat(self, x: NDArray[Any]) -> NDArray[np.float64]:
        return np.asarray(self.apply(torch.tensor(x, dtype=torch.float64, device="cpu")).cpu().numpy())

    def _rmatvec(self, x: NDArray[Any]) -> NDArray[np.float64]:
        return self._rmatmat(x.reshape(-1, 1))[:, 0]

    def _rmatmat(self, x: NDArray[Any]) -> NDArray[np.float64]:
        if self.kernel.symmetric:
            return self._matmat(x)
        return np.asarray(self.apply(torch.tensor(x, dtype=torch.float64, device="cpu"), mirrored=True).cpu().numpy())


def kernel_operator(K: Kernels, *, ridge: float = 0.0, memory_limit: int | None = None) -> KernelOperator:
    r"""A kernel as the linear operator x ↦ (K + ρI)x, with products tile by tile in float64.

    With outputs "full" the operator acts on (n·c,) in the order of (n, c), with "diagonal" likewise but on each output by
    itself, with "trace" on (n,). A kernel of x with other samples gives a rectangular operator.

    Args:
        K: a kernel: a tensor, or a store; a kernel by block counts as the sum of its blocks.
        ridge: ρ, at least 0.
        memory_limit: bytes for tiles that are kept in memory; None is half of what is free. Other tiles are read again.

    Raises:
        TangentError: when a store is not complete, or a rectangular kernel has a ridge.

    >>> import torch, adaptive_tangents as at
    >>> from adaptive_tangents.kernels.operators import kernel_operator
    >>> K = at.tangent_kernel(torch.nn.Linear(3, 2), torch.randn(5, 3), outputs="trace")
    >>> kernel_operator(K, ridge=0.5).matvec(torch.ones(5).numpy()).shape
    (5,)
    """
    kernel = tiled(Request("kernel_operator", rectangular=True, diagonal=True), K)
    if kernel.n != kernel.m and ridge:
        raise TangentError(
            f"kernel_operator: a ridge is for a kernel of samples with themselves, this is of {kernel.n} with {kernel.m}; "
            "leave it out"
        )
    return KernelOperator(cached(kernel, memory_limit), ridge=ridge)
