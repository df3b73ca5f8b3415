"""Which interpolation constraints are independent, and which contradict each other."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.linalg.lapack import dpstrf
from torch import Tensor

from adaptive_tangents.errors import TangentError

_RANK_TOLERANCE = 1e-12  # of the largest eigenvalue: float32 features leave duplicates apart by about 1e-14 of it
_CONFLICT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Constraints:
    """The smallest eigenvalue of the kernel, and the independent rows (None: all of them)."""

    smallest_eigenvalue: float
    kept: Int[Tensor, " k"] | None


def independent_constraints(
    kernel: Float[Tensor, "k k"], r: Float[Tensor, " k"], *, samples: int, interpolate: bool
) -> Constraints:
    """Examine K₀ before interpolating; raises TangentError naming samples whose targets contradict each other.

    Rows of φ that depend on others stay dependent under every invertible M, so this is done once, on the initial kernel.
    """
    values = torch.linalg.eigvalsh(kernel)
    smallest, largest = float(values[0]), float(values[-1])
    if not interpolate or smallest > _RANK_TOLERANCE * largest:
        return Constraints(smallest, None)
    values, vectors = torch.linalg.eigh(kernel)
    null = vectors[:, values <= _RANK_TOLERANCE * largest]
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
    _, pivots, _, _ = dpstrf(kernel.cpu().numpy())
    kept = torch.as_tensor(pivots[:rank].astype("int64") - 1, device=kernel.device).sort().values
    return Constraints(smallest, kept)
