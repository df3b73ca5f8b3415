"""Find which interpolation constraints are independent, and which contradict each other."""

from contextlib import suppress
from dataclasses import dataclass
from math import nan

import numpy as np
import scipy
import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.linalg.kernel_systems import DenseKernel
from adaptive_tangents.solvers.losses import Loss, SquaredError

_RANK_TOLERANCE = 1e-12  # of the largest eigenvalue; float32 features separate duplicates by about 1e-14 of it
_CONFLICT_TOLERANCE = 1e-6
_MEDIUM = 300  # rows; a larger kernel is factorized, once for this alone,
_LARGE = 1000  # and a still larger one only once, with the ridge that is needed anyway


@dataclass(frozen=True)
class Constraints:
    """The kernel's smallest eigenvalue, the independent rows (None: all), and how many others were dropped."""

    smallest_eigenvalue: float = nan
    kept: Int[Tensor, " k"] | None = None
    dropped: int = 0


def examined(kernel: DenseKernel, loss: Loss, *, samples: int) -> Constraints:
    """Examine K₀ before a fit; for interpolation, the kernel then keeps only independent constraints."""
    if isinstance(loss, SquaredError) and loss.interpolates:
        found = independent_constraints(kernel, loss.targets, samples=samples)
        kernel.kept = found.kept
        return found
    return Constraints(smallest_eigenvalue(kernel, ridge=loss.ridge if isinstance(loss, SquaredError) else 0.0))


def smallest_eigenvalue(kernel: DenseKernel, *, ridge: float = 0.0) -> float:
    """The smallest eigenvalue of K, to six digits; for large K to six digits of that of K + ρI. By inverse iteration."""
    size = kernel.matrix.shape[0]
    if size > _MEDIUM:
        with suppress(TangentError, scipy.sparse.linalg.ArpackNoConvergence):
            ridge = ridge if size > _LARGE else 0.0
            factor = kernel.factorized(ridge)
            if factor.jitter == 0:
                start = np.random.default_rng(0).standard_normal(size)
                inverse = scipy.sparse.linalg.LinearOperator(
                    (size, size),
                    matvec=lambda v: (
                        factor.solve(torch.as_tensor(v, device="cpu").to(kernel.matrix).flatten()).cpu().numpy()
                    ),
                )
                # The eigenvalue's error is the square of the eigenvector's.
                largest = scipy.sparse.linalg.eigsh(
                    inverse, k=1, which="LA", v0=start, tol=1e-3, ncv=12, maxiter=300, return_eigenvectors=False
                )
                return 1 / float(largest[0]) - ridge
    return float(torch.linalg.eigvalsh(kernel.matrix)[0])


def independent_constraints(whole: DenseKernel, r: Float[Tensor, " k"], *, samples: int) -> Constraints:
    """The independent constraints of K₀; raises TangentError naming samples whose targets contradict each other.

    Dependent rows of φ stay dependent under every invertible M, so K₀ tells it for the whole fit.
    """
    kernel, smallest = whole.matrix, smallest_eigenvalue(whole)
    if smallest > _RANK_TOLERANCE * float(kernel.diagonal().sum()):  # the trace is above the largest eigenvalue
        return Constraints(smallest)
    values, vectors = torch.linalg.eigh(kernel)
    null = vectors[:, values <= _RANK_TOLERANCE * values[-1]]
    if null.shape[1] == 0:
        return Constraints(smallest)
    conflict = null @ (null.mT @ r)
    if float(conflict.norm()) > _CONFLICT_TOLERANCE * float(r.norm()):
        per_sample = conflict.reshape(samples, -1).norm(dim=1)
        named = (per_sample > 0.1 * per_sample.max()).nonzero().flatten().tolist()
        listed = ", ".join(map(str, named[:10])) + (f" and {len(named) - 10} more" if len(named) > 10 else "")
        raise TangentError(
            f"fit: {null.shape[1]} of {kernel.shape[0]} constraints are linearly dependent and their targets contradict each "
            f"other, so no β interpolates: samples {listed} (duplicate inputs with different targets?); "
            "remove them, or use a positive ridge"
        )
    rank = kernel.shape[0] - null.shape[1]
    _, pivots, _, _ = scipy.linalg.lapack.dpstrf(kernel.cpu().numpy())
    kept = torch.as_tensor(pivots[:rank].astype("int64") - 1, device=kernel.device).sort().values
    return Constraints(smallest, kept, kernel.shape[0] - rank)
