"""The largest eigenvalues of a kernel: by Lanczos with products tile by tile, or from the matrix if it is small."""

from dataclasses import dataclass, field, replace

import numpy as np
import scipy
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.kernels.derived_kernels import check_symmetric, in_range, largest, power_of_two
from adaptive_tangents.kernels.products import KernelProducts, cached
from adaptive_tangents.kernels.tiles import Kernels, Request, Sum, tiled
from adaptive_tangents.runtime.memory import limit_for, require_memory

_SMALL = 400  # rows; a matrix of at most so many is decomposed directly
_PROBED = 20  # steps of Lanczos that look for negative eigenvalues
_COPIES = 4  # of a matrix: itself, its eigenvectors, and the working memory of eigh


@dataclass(frozen=True, eq=False)
class KernelEigen:
    """The largest eigenvalues of a kernel; ``kernel_eigen`` makes it.

    Attributes:
        values: the eigenvalues (k,), largest first.
        vectors: unit eigenvectors as columns (n·c, k), in the order of (n, c).
        residual: the largest ‖Kv − λv‖ over the largest eigenvalue.
        trace: tr K; ``values.sum()/trace`` is the share explained.
        form: "dense" or "lanczos".
        products: the number of products with K that Lanczos took; 0 if dense.
    """

    values: Float[Tensor, " k"] = field(repr=False)
    vectors: Float[Tensor, "N k"] = field(repr=False)
    residual: float
    trace: float
    form: str
    products: int


def kernel_eigen(K: Kernels, k: int, *, tol: float = 1e-10, memory_limit: int | None = None) -> KernelEigen:
    r"""The k largest eigenvalues λ of a kernel and their eigenvectors, K v = λ v, by Lanczos with products tile by tile.

    If the kernel is small or k is large, and memory allows it, they are computed from the matrix itself.

    Args:
        K: a kernel (n, c, n, c) or (n, n): a tensor, or a store; a kernel by block counts as the sum of its blocks.
        k: the number of eigenvalues, from 1 to the rows of the kernel.
        tol: the accuracy of Lanczos, relative to each eigenvalue.
        memory_limit: bytes that may be used; None is half of what is free.

    Raises:
        TangentError: when k is out of range, the kernel is not of samples with themselves, Lanczos does not converge, or
            memory would exceed the limit.

    Source: Lehoucq, Sorensen & Yang, 1998 (ARPACK).

    >>> import torch, adaptive_tangents as at
    >>> at.kernels.kernel_eigen(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2).values
    tensor([3., 2.], dtype=torch.float64)
    """
    kernel = tiled(Request("kernel_eigen"), K)
    check_symmetric("kernel_eigen", kernel)
    if not 1 <= k <= kernel.size:
        raise TangentError(f"kernel_eigen: k is from 1 to {kernel.size}, the rows of the kernel, got {k}")
    scale = power_of_two(largest(kernel.diagonal()))
    kernel = kernel if scale == 1 else Sum([kernel], [1 / scale])
    found = eigen("kernel_eigen", KernelProducts(cached(kernel, memory_limit)), k, tol=tol, memory_limit=memory_limit)
    trace = in_range("kernel_eigen", "the trace", found.trace, scale)
    return replace(found, values=found.values * scale, trace=trace)


def eigen(call: str, of: KernelProducts, k: int, *, tol: float, memory_limit: int | None) -> KernelEigen:
    """``kernel_eigen`` of a kernel given by its products."""
    kernel, size = of.kernel, of.kernel.size
    products, form = 0, "dense"
    needed, limit = _COPIES * 8 * size**2, limit_for(memory_limit, kernel.device)
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
            return np.asarray(of.apply(torch.tensor(x, dtype=torch.float64, device="cpu")).cpu().numpy())

        counted = scipy.sparse.linalg.LinearOperator((size, size), matvec=product, dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(size)
        try:
            found, basis = scipy.sparse.linalg.eigsh(
                counted, k=k, which="LA", v0=start, tol=tol, ncv=min(size, max(2 * k + 1, 20))
            )
        except scipy.sparse.linalg.ArpackNoConvergence as failure:
            raise TangentError(
                f"{call}: Lanczos found {len(failure.eigenvalues)} of {k} eigenvalues to {tol:g}; ask for fewer, or raise tol"
            ) from failure
        order = np.argsort(-found)
        values = torch.as_tensor(found[order], device=kernel.device)
        vectors = torch.as_tensor(basis[:, order], device=kernel.device)
    left = (of.apply(vectors) - vectors * values).norm(dim=0)
    residual = float(left.max()) / max(float(values[0].abs()), 1e-300)
    return KernelEigen(values, vectors, residual, float(of.entries().sum()), form, products)


def lowest(of: KernelProducts, steps: int = _PROBED) -> tuple[float, float]:
    """Bounds from within on the smallest and the largest eigenvalue, from a few steps of Lanczos."""
    size = of.kernel.size
    generator = torch.Generator().manual_seed(0)
    basis = [
        torch.nn.functional.normalize(torch.randn(size, generator=generator, dtype=torch.float64, device="cpu"), dim=0)
    ]
    images: list[Tensor] = []
    for _ in range(min(steps, size)):
        images.append(of.apply(basis[-1].to(of.kernel.device)).cpu())
        rest, held = images[-1].clone(), torch.stack(basis, 1)
        for _ in range(2):
            rest = rest - held @ (held.mT @ rest)
        if float(rest.norm()) <= 1e-12 * float(images[-1].norm()):
            break
        basis.append(rest / rest.norm())
    held, moved = torch.stack(basis[: len(images)], 1), torch.stack(images, 1)
    values = torch.linalg.eigvalsh(held.mT @ moved)
    return float(values[0]), float(values[-1])
