"""A kernel as scipy's linear operator, for scipy's solvers."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from adaptive_tangents.errors import TangentError
from adaptive_tangents.kernels.products import KernelProducts, cached
from adaptive_tangents.kernels.tiles import Kernels, Request, Tiled, tiled


class KernelOperator(KernelProducts, LinearOperator):  # type: ignore[misc]
    """K + ρI as a scipy ``LinearOperator``, products tile by tile, accumulated in float64: made by ``kernel_operator``.

    Vectors are (n·c,) in the order of (n, c), or (n,) of a trace kernel; several at once are columns. ``apply`` is the same
    on torch tensors.
    """

    def __init__(self, kernel: Tiled, *, ridge: float = 0.0) -> None:
        KernelProducts.__init__(self, kernel, ridge=ridge)
        LinearOperator.__init__(self, np.dtype(np.float64), (kernel.n * self.c, kernel.m * self.c))

    def _matvec(self, x: NDArray[Any]) -> NDArray[np.float64]:
        return self._matmat(x.reshape(-1, 1))[:, 0]

    def _matmat(self, x: NDArray[Any]) -> NDArray[np.float64]:
        return np.asarray(self.apply(torch.tensor(x, dtype=torch.float64)).cpu().numpy())

    def _rmatvec(self, x: NDArray[Any]) -> NDArray[np.float64]:
        return self._rmatmat(x.reshape(-1, 1))[:, 0]

    def _rmatmat(self, x: NDArray[Any]) -> NDArray[np.float64]:
        if self.shape[0] == self.shape[1]:
            return self._matmat(x)
        return np.asarray(self.apply(torch.tensor(x, dtype=torch.float64), mirrored=True).cpu().numpy())


def kernel_operator(K: Kernels, *, ridge: float = 0.0, memory_limit: int | None = None) -> KernelOperator:
    r"""A kernel as the linear operator x ↦ (K + ρI)x, whose products go tile by tile.

    ``K`` is a store or a tensor; of outputs "full" the operator acts on (n·c,) in the order of (n, c), of "diagonal"
    likewise but with each output by itself, of "trace" on (n,). Sums are in float64. A kernel of x with other samples gives a
    rectangular operator. Tiles are kept in memory as far as ``memory_limit`` (default: half of what is free) allows, and
    read again where it does not.

    Raises TangentError for a store that is not complete, or a ridge for a rectangular kernel.

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
