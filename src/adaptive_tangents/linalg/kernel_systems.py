"""The linear systems of a kernel over nc outputs, solved by a factor or by preconditioned conjugate gradients."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.linalg.cholesky import CHUNK, Factorized, Products, factorize, partial_cholesky
from adaptive_tangents.linalg.conjugate_gradients import Solve, conjugate_gradients

Root = Float[Tensor, "n c c"]
_ROUNDING = (1.0, 1e1, 1e2, 1e3, 1e4, 1e5)  # shifts of a single-precision kernel, in units of its own rounding


class KernelSystem(ABC):
    """An adapted kernel K_M over nc outputs: its products, and the inverses that the losses need."""

    jitter = 0.0

    @abstractmethod
    def apply(self, x: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """K x."""

    @abstractmethod
    def shifted(self, ridge: float) -> Solve:
        """The map x ↦ (K + ρI)⁻¹ x."""

    @abstractmethod
    def rooted(self, root: Root) -> Solve:
        """The map x ↦ (I + ½SᵀKS)⁻¹ x; S is block-diagonal, one block per sample."""


class DenseKernel(KernelSystem):
    """The kernel as a matrix, factorized."""

    def __init__(self, matrix: Float[Tensor, "k k"], kept: Int[Tensor, " m"] | None = None) -> None:
        self.matrix, self.kept = matrix, kept
        self._whole: tuple[float, Factorized] | None = None

    def apply(self, x: Tensor) -> Tensor:
        return self.matrix @ x

    def factorized(self, ridge: float) -> Factorized:
        """The factor of K + ρI over all rows, computed once."""
        if self._whole is None or self._whole[0] != ridge:
            self._whole = ridge, factorize(self.matrix, ridge)
        return self._whole[1]

    def shifted(self, ridge: float) -> Solve:
        kept = self.kept
        matrix = self.matrix if kept is None else self.matrix[kept][:, kept]
        factor = self.factorized(ridge) if kept is None else factorize(matrix, ridge)
        self._whole = None  # the factor lives as long as the inverse does, and no longer
        self.jitter = factor.jitter

        def solve(x: Tensor) -> Tensor:
            wanted = x if kept is None else x[kept]
            found = factor.solve(wanted)
            if ridge == 0 or factor.jitter > 0:
                # One refinement step against jitter and rounding: their errors would add up and violate the constraints.
                found = found + factor.solve(wanted - matrix @ found - ridge * found)
            return found if kept is None else torch.zeros_like(x).index_copy_(0, kept, found)

        return solve

    def rooted(self, root: Root) -> Solve:
        n, c = root.shape[:2]
        # K is symmetric, so the transpose of SᵀK is KS.
        half = (root.mT @ self.matrix.reshape(n, c, n * c)).reshape(n * c, n * c)
        system = (root.mT @ half.mT.reshape(n, c, n * c)).reshape(n * c, n * c).div_(2)
        system.diagonal().add_(1)
        return Factorized(torch.linalg.cholesky(system), 0.0).solve


class FreeKernel(KernelSystem):
    """A kernel known by its products in float64; systems are solved by conjugate gradients with a preconditioner."""

    def __init__(self, products: Products) -> None:
        self.products = products

    def apply(self, x: Tensor) -> Tensor:
        return self.products.apply(x)

    def shifted(self, ridge: float) -> Solve:
        near = self.near_shifted(ridge)
        return lambda x: conjugate_gradients(lambda p: self.apply(p) + ridge * p, x, near)

    def rooted(self, root: Root) -> Solve:
        near = self.near_rooted(root)

        def apply(p: Tensor) -> Tensor:
            moved = rooted_product(root.mT, p[:, None])[:, 0]
            return p + rooted_product(root, self.apply(moved)[:, None])[:, 0] / 2

        return lambda x: conjugate_gradients(apply, x, near)

    @abstractmethod
    def near_shifted(self, ridge: float) -> Solve:
        """Approximates x ↦ (K + ρI)⁻¹ x."""

    @abstractmethod
    def near_rooted(self, root: Root) -> Solve:
        """Approximates x ↦ (I + ½SᵀKS)⁻¹ x."""


class PivotedKernel(FreeKernel):
    """A kernel that is never formed, preconditioned by a partial Cholesky factor of ``rank`` columns.

    Columns are chosen ``chunk`` samples at a time by random pivoting, with probability proportional to the remaining
    diagonal and a fixed seed. Source: Chen, Epperly, Tropp & Webber, 2023.
    """

    def __init__(self, products: Products, rank: int, chunk: int = CHUNK) -> None:
        super().__init__(products)
        self.columns, self.rest = partial_cholesky(products, rank, chunk)

    def near_shifted(self, ridge: float) -> Solve:
        return _low_rank_inverse(self.columns, ridge + self.rest)

    def near_rooted(self, root: Root) -> Solve:
        return _low_rank_inverse(rooted_product(root, self.columns) / 2**0.5, 1.0)


class RoundedKernel(FreeKernel):
    """A kernel formed and factorized in float32; as a preconditioner this needs only a few products in float64."""

    def near_shifted(self, ridge: float) -> Solve:
        matrix = self.products.rounded()
        matrix.diagonal().add_(ridge)
        return _rounded_inverse(matrix)

    def near_rooted(self, root: Root) -> Solve:
        n, c = root.shape[:2]
        matrix, small = self.products.rounded(), root.float()
        # In place, a few samples at a time: there is no memory for copies of the whole matrix.
        rows, columns = matrix.reshape(n, c, n * c), matrix.reshape(n * c, n, c)
        for k in range(0, n, CHUNK):
            part = slice(k, k + CHUNK)
            rows[part] = small[part].mT @ rows[part] / 2
            columns[:, part] = torch.einsum("rlc,lcd->rld", columns[:, part], small[part])
        matrix.diagonal().add_(1)
        return _rounded_inverse(matrix)


def _rounded_inverse(matrix: Float[Tensor, "k k"]) -> Solve:
    """The map x ↦ A⁻¹x in single precision; A, positive definite up to rounding, is overwritten."""
    rounding = torch.finfo(matrix.dtype).eps * float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    added = 0.0
    for multiple in _ROUNDING:
        matrix.diagonal().add_(multiple * rounding - added)
        added = multiple * rounding
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            break
    else:
        raise TangentError("fit: the kernel is not positive definite in single precision; use form='dense'")
    solve = Factorized(factor, added).solve

    def near(x: Tensor) -> Tensor:
        size = x.norm(dim=0)  # normalized, since single precision has a narrower range
        size = torch.where(size > 0, size, 1.0)
        return solve((x / size).to(factor.dtype)).to(x.dtype) * size

    return near


def rooted_product(root: Root, columns: Float[Tensor, "k m"]) -> Float[Tensor, "k m"]:
    """Sᵀ times columns."""
    n, c = root.shape[:2]
    return torch.einsum("kab,kam->kbm", root, columns.reshape(n, c, -1)).reshape(n * c, -1)


def _low_rank_inverse(columns: Float[Tensor, "k m"], shift: float) -> Solve:
    """The map x ↦ (LLᵀ + shift·I)⁻¹ x."""
    factor = factorize(columns.mT @ columns, shift)
    return lambda x: (x - columns @ factor.solve(columns.mT @ x)) / shift
