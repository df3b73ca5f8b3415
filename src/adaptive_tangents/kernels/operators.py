"""A kernel as a linear operator whose products go tile by tile: solved with and decomposed without being held whole."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.kernels.tiles import Cached, Kernels, Request, Tiled, share, tiled
from adaptive_tangents.runtime.memory import memory_limit as limit_of
from adaptive_tangents.runtime.memory import require_memory

_SMALL = 400  # rows of a matrix that is decomposed outright
_COPIES = 4  # a matrix, its eigenvectors, and what finding them takes


class KernelOperator(LinearOperator):  # type: ignore[misc]
    """K + ρI as a scipy ``LinearOperator``, products tile by tile, accumulated in float64: made by ``kernel_operator``.

    Vectors are (n·c,) in the order of (n, c), or (n,) of a trace kernel; several at once are columns. ``apply`` is the same
    on torch tensors.
    """

    def __init__(self, kernel: Tiled, *, ridge: float = 0.0) -> None:
        self.kernel, self.ridge = kernel, ridge
        self.n, self.c = kernel.n, kernel.width * kernel.batch
        super().__init__(np.dtype(np.float64), (kernel.n * self.c, kernel.m * self.c))

    def apply(self, x: Float[Tensor, "k *m"]) -> Float[Tensor, "q *m"]:
        """(K + ρI) x."""
        return self._product(x, mirrored=False)

    def _product(self, x: Tensor, *, mirrored: bool) -> Tensor:
        """K x, or Kᵀ x of a kernel that is not symmetric."""
        kernel = self.kernel
        given = x.to(kernel.device, torch.float64).reshape(-1, kernel.batch, kernel.width, x[0].numel())
        rows_of = given.movedim(1, 0).flatten(1, 2)  # (g, n·w, vectors)
        found = kernel.zeros(kernel.batch, (kernel.m if mirrored else kernel.n) * kernel.width, rows_of.shape[2])
        for rows, columns, tile in kernel.tiles():
            a, b = kernel.entries(rows), kernel.entries(columns)
            if not mirrored:
                found[:, a] += tile @ rows_of[:, b]
            if mirrored or (kernel.symmetric and rows != columns):
                found[:, b] += tile.mT @ rows_of[:, a]
        kernel.reduced(found)
        whole = found.reshape(kernel.batch, -1, kernel.width, rows_of.shape[2]).movedim(0, 1)
        whole = whole.reshape(-1, *x.shape[1:])
        return whole + self.ridge * x if self.ridge else whole

    def rounded(self) -> Float[Tensor, "k k"]:
        """K in float32."""
        return self.kernel.matrices(torch.float32)[0]

    def entries(self) -> Float[Tensor, " k"]:
        """The diagonal of K."""
        return self.kernel.diagonal().flatten()

    def columns(self, chosen: Int[Tensor, " q"]) -> Float[Tensor, "k m"]:
        """The columns of K of these samples, each with all of its outputs; tiles that hold none are not read."""
        kernel, w = self.kernel, self.kernel.width
        found = kernel.zeros(kernel.n, w, len(chosen), w)

        def put(rows: slice, columns: slice, tile: Tensor) -> None:
            held = ((chosen >= columns.start) & (chosen < columns.stop)).nonzero().flatten()
            cube = tile.reshape(rows.stop - rows.start, w, columns.stop - columns.start, w)
            found[rows, :, held] = cube[:, :, chosen[held] - columns.start].double()

        for rows, columns in share(kernel.grid, kernel.group):
            sides = [columns] + ([rows] if kernel.symmetric and rows != columns else [])
            if any(bool(((chosen >= side.start) & (chosen < side.stop)).any()) for side in sides):
                tile = kernel.read(rows, columns)[0]
                put(rows, columns, tile)
                if len(sides) == 2:
                    put(columns, rows, tile.mT)
        return kernel.reduced(found).reshape(kernel.size, -1)

    def _matvec(self, x: NDArray[Any]) -> NDArray[np.float64]:
        return self._matmat(x.reshape(-1, 1))[:, 0]

    def _matmat(self, x: NDArray[Any]) -> NDArray[np.float64]:
        return np.asarray(self.apply(torch.tensor(x, dtype=torch.float64)).cpu().numpy())

    def _rmatvec(self, x: NDArray[Any]) -> NDArray[np.float64]:
        return self._rmatmat(x.reshape(-1, 1))[:, 0]

    def _rmatmat(self, x: NDArray[Any]) -> NDArray[np.float64]:
        if self.shape[0] == self.shape[1]:
            return self._matmat(x)
        return np.asarray(self._product(torch.tensor(x, dtype=torch.float64), mirrored=True).cpu().numpy())


def kernel_operator(K: Kernels, *, ridge: float = 0.0, memory_limit: int | None = None) -> KernelOperator:
    r"""A kernel as the linear operator x ↦ (K + ρI)x, whose products go tile by tile.

    ``K`` is a store or a tensor; of outputs "full" the operator acts on (n·c,) in the order of (n, c), of "diagonal"
    likewise but with each output by itself, of "trace" on (n,). Sums are in float64. A kernel of x with other samples gives a
    rectangular operator. Tiles are kept in memory as far as ``memory_limit`` (default: half of what is free) allows, and
    read again where it does not.

    Raises TangentError for a store that is not complete, or a ridge for a rectangular kernel.

    >>> import torch, adaptive_tangents as at
    >>> K = at.tangent_kernel(torch.nn.Linear(3, 2), torch.randn(5, 3), outputs="trace")
    >>> at.kernel_operator(K, ridge=0.5).matvec(torch.ones(5).numpy()).shape
    (5,)
    """
    kernel = tiled(Request("kernel_operator", rectangular=True, diagonal=True), K)
    if kernel.n != kernel.m and ridge:
        raise TangentError(
            f"kernel_operator: a ridge is for a kernel of samples with themselves, this is of {kernel.n} with {kernel.m}; "
            "leave it out"
        )
    return KernelOperator(cached(kernel, memory_limit), ridge=ridge)


def cached(kernel: Tiled, memory_limit: int | None) -> Tiled:
    """The kernel with tiles kept within the limit."""
    return Cached(kernel, limit_of(memory_limit, kernel.device))


@dataclass(frozen=True)
class KernelEigen:
    """The largest eigenvalues of a kernel, falling, with unit eigenvectors as columns.

    ``residual`` is the largest ‖Kv − λv‖ over the largest eigenvalue; ``form`` "dense" or "lanczos", ``products`` how many
    products the latter took; ``trace`` tr K, so that ``values.sum()/trace`` is the share explained.
    """

    values: Float[Tensor, " k"] = field(repr=False)
    vectors: Float[Tensor, "N k"] = field(repr=False)
    residual: float
    trace: float
    form: str
    products: int


def kernel_eigen(K: Kernels, k: int, *, tol: float = 1e-10, memory_limit: int | None = None) -> KernelEigen:
    r"""The k largest eigenvalues λ of a kernel and their eigenvectors, K v = λ v, by Lanczos on products tile by tile.

    ``vectors`` (n·c, k) are in the order of (n, c). Those of a small kernel, and many of any, are found from the matrix
    itself where ``memory_limit`` allows it. ``tol`` is relative to each eigenvalue. Source: Lehoucq, Sorensen & Yang, 1998
    (ARPACK).

    Raises TangentError for k out of range, a kernel not symmetric, and where memory does not hold what it takes.

    >>> import torch, adaptive_tangents as at
    >>> at.kernel_eigen(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2).values
    tensor([3., 2.], dtype=torch.float64)
    """
    kernel = tiled(Request("kernel_eigen"), K)
    if not 1 <= k <= kernel.size:
        raise TangentError(f"kernel_eigen: k is from 1 to {kernel.size}, the rows of the kernel, got {k}")
    return eigen("kernel_eigen", KernelOperator(cached(kernel, memory_limit)), k, tol=tol, memory_limit=memory_limit)


def eigen(call: str, operator: KernelOperator, k: int, *, tol: float, memory_limit: int | None) -> KernelEigen:
    """``kernel_eigen`` of an operator."""
    kernel, size = operator.kernel, operator.kernel.size
    products, form = 0, "dense"
    needed, limit = _COPIES * 8 * size**2, limit_of(memory_limit, kernel.device)
    if k == size:
        require_memory(call, needed, limit, remedy="ask for fewer eigenvalues than the kernel has rows")
    if k == size or ((size <= _SMALL or k > size // 4) and needed <= limit):
        values, vectors = torch.linalg.eigh(kernel.matrices()[0])
        values, vectors = values[-k:].flip(0), vectors[:, -k:].flip(1)
    else:
        form = "lanczos"

        def product(x: NDArray[np.float64]) -> NDArray[np.float64]:
            nonlocal products
            products += 1
            return np.asarray(operator.matvec(x))

        counted = LinearOperator((size, size), matvec=product, dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(size)
        try:
            found, basis = eigsh(counted, k=k, which="LA", v0=start, tol=tol, ncv=min(size, max(2 * k + 1, 20)))
        except ArpackNoConvergence as failure:
            raise TangentError(
                f"{call}: Lanczos found {len(failure.eigenvalues)} of {k} eigenvalues to {tol:g}; ask for fewer, or raise tol"
            ) from failure
        order = np.argsort(-found)
        values = torch.as_tensor(found[order], device=kernel.device)
        vectors = torch.as_tensor(basis[:, order], device=kernel.device)
    left = (operator.apply(vectors) - vectors * values).norm(dim=0)
    residual = float(left.max()) / max(float(values[0].abs()), 1e-300)
    return KernelEigen(values, vectors, residual, float(operator.entries().sum()), form, products)
