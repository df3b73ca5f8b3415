"""Kernels K_M as solvers use them, made from adapted features: through a p × p matrix, or by products alone.

All solvers need the same step: given w = w₀ + φᵀη, minimize ⟨D v, v⟩/2 + L″(φv)/2 − ⟨w, v⟩ over v, with the metric
D = 2(MᵀM)⁻¹ of the held transform and the loss's curvature L″, or under the constraint φv = 0. The solution is
v = ½MᵀM(w₀ + φᵀu), where u (nc,) solves a system in K_M.
"""

import torch
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.linalg.cholesky import CHUNK, factorize
from adaptive_tangents.linalg.conjugate_gradients import Solve
from adaptive_tangents.linalg.kernel_systems import KernelSystem, Root, rooted_product


class PrimalKernel(KernelSystem):
    """The kernel as GGᵀ, for p < nc parameters: the systems are p × p."""

    def __init__(self, adapted: TangentFeatures) -> None:
        self.rows = torch.cat([block.features().flatten(2) for block in adapted.blocks.values()], 2).flatten(0, 1)

    def apply(self, x: Tensor) -> Tensor:
        return self.rows @ (self.rows.mT @ x)

    def shifted(self, ridge: float) -> Solve:
        factor = factorize(self.rows.mT @ self.rows, ridge)
        return lambda x: (x - self.rows @ factor.solve(self.rows.mT @ x)) / ridge

    def rooted(self, root: Root) -> Solve:
        rows = rooted_product(root, self.rows)
        factor = factorize(rows.mT @ rows, 2.0)
        return lambda x: x - rows @ factor.solve(rows.mT @ x)


class FeatureProducts:
    """The kernel of features, by products with them."""

    def __init__(self, adapted: TangentFeatures) -> None:
        self.adapted, self.n, self.c = adapted, adapted.n, adapted.c

    def apply(self, x: Tensor) -> Tensor:
        return self.adapted.inner(self.adapted.combine(x.reshape(self.n, self.c))).flatten()

    def rounded(self) -> Tensor:
        try:
            return self.adapted.to(torch.float32).kernel().reshape(self.n * self.c, self.n * self.c)
        except TangentError as error:
            raise TangentError("fit: the kernel is too large for single precision; use form='dense'") from error

    def entries(self) -> Tensor:
        parts = (self.adapted[k : k + CHUNK] for k in range(0, self.n, CHUNK))
        return torch.cat([part.kernel().flatten(2).flatten(0, 1).diagonal() for part in parts])

    def columns(self, chosen: Tensor) -> Tensor:
        return self.adapted.kernel(self.adapted[chosen]).reshape(self.n * self.c, -1)
