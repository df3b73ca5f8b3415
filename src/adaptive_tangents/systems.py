"""The linear systems of the fit, in the dual: those of an adapted kernel, dense, through features, or by products alone.

Everything asks for one thing: given w = w₀ + φᵀη, the least of ⟨D v, v⟩/2 + L″(φv)/2 − ⟨w, v⟩ for the metric
D = 2(MᵀM)⁻¹ of the held transform and the loss's curvature L″, or under the constraint φv = 0. Its solution is
v = ½MᵀM(w₀ + φᵀu), and u (nc,) solves a system in K_M.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features import TangentFeatures

Solve = Callable[[Tensor], Tensor]
Root = Float[Tensor, "n c c"]

_JITTERS = (0.0, 1e-15, 1e-14, 1e-13, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8)
_CG_TOLERANCE = 1e-12
_CG_STEPS = 2000
_CHUNK = 16
_ROUNDING = (1.0, 1e1, 1e2, 1e3, 1e4, 1e5)  # shifts of a single-precision kernel, in units of its own rounding


@dataclass(frozen=True)
class Factorised:
    """A Cholesky factor of K + ρI, with the jitter that was added to make it exist."""

    factor: Float[Tensor, "k k"] = field(repr=False)
    jitter: float

    def solve(self, r: Float[Tensor, "k *m"]) -> Float[Tensor, "k *m"]:
        """(K + ρI)⁻¹ r, of one right side or of several."""
        # Two triangular solves: several times faster than cholesky_solve for one right side.
        half = torch.linalg.solve_triangular(self.factor, r.reshape(len(r), -1), upper=False)
        found: Tensor = torch.linalg.solve_triangular(self.factor.mT, half, upper=True)
        return found.reshape(r.shape)


def factorise(kernel: Float[Tensor, "k k"], ridge: float) -> Factorised:
    """Cholesky of K + ρI, with as little jitter as it takes; raises TangentError where even a visible one fails."""
    diagonal = kernel.diagonal().clone()
    scale = float(diagonal.mean())
    try:
        for jitter in _JITTERS:
            kernel.diagonal().copy_(diagonal + (ridge + jitter * scale))  # a shifted copy would be one more in memory
            factor, failed = torch.linalg.cholesky_ex(kernel)
            if not int(failed):
                return Factorised(factor, jitter * scale)
    finally:
        kernel.diagonal().copy_(diagonal)
    raise TangentError(
        "fit: the adapted kernel is not positive definite even with a jitter of 1e-8 of its diagonal; "
        "use a positive ridge, or a stronger penalty"
    )


class Kernel(ABC):
    """An adapted kernel K_M over nc outputs: its products, and the inverses that the losses ask for."""

    jitter = 0.0

    @abstractmethod
    def apply(self, x: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """K x."""

    @abstractmethod
    def shifted(self, ridge: float) -> Solve:
        """The map x ↦ (K + ρI)⁻¹ x."""

    @abstractmethod
    def rooted(self, root: Root) -> Solve:
        """The map x ↦ (I + ½SᵀKS)⁻¹ x, S block-diagonal with a block a sample."""


class DenseKernel(Kernel):
    """The kernel as a matrix, factorised."""

    def __init__(self, matrix: Float[Tensor, "k k"], kept: Int[Tensor, " m"] | None = None) -> None:
        self.matrix, self.kept = matrix, kept
        self._whole: tuple[float, Factorised] | None = None

    def apply(self, x: Tensor) -> Tensor:
        return self.matrix @ x

    def factorised(self, ridge: float) -> Factorised:
        """The whole of K + ρI, factorised once."""
        if self._whole is None or self._whole[0] != ridge:
            self._whole = ridge, factorise(self.matrix, ridge)
        return self._whole[1]

    def shifted(self, ridge: float) -> Solve:
        kept = self.kept
        matrix = self.matrix if kept is None else self.matrix[kept][:, kept]
        factor = self.factorised(ridge) if kept is None else factorise(matrix, ridge)
        self._whole = None  # as long as the inverse lives, and no longer
        self.jitter = factor.jitter

        def solve(x: Tensor) -> Tensor:
            wanted = x if kept is None else x[kept]
            found = factor.solve(wanted)
            if ridge == 0 or factor.jitter > 0:
                # Directions that leave the constraints would add up over many steps: refined once, jitter and all.
                found = found + factor.solve(wanted - matrix @ found - ridge * found)
            return found if kept is None else torch.zeros_like(x).index_copy_(0, kept, found)

        return solve

    def rooted(self, root: Root) -> Solve:
        n, c = root.shape[:2]
        cube = torch.einsum("kab,kalc->kblc", root, self.matrix.reshape(n, c, n, c))
        system = torch.einsum("kblc,lcd->kbld", cube, root).reshape(n * c, n * c) / 2
        system.diagonal().add_(1)
        return Factorised(torch.linalg.cholesky(system), 0.0).solve


class PrimalKernel(Kernel):
    """The kernel as GGᵀ for fewer parameters p than outputs nc: the systems solved are p × p."""

    def __init__(self, adapted: TangentFeatures) -> None:
        self.rows = torch.cat([block.features().flatten(2) for block in adapted.blocks.values()], 2).flatten(0, 1)

    def apply(self, x: Tensor) -> Tensor:
        return self.rows @ (self.rows.mT @ x)

    def shifted(self, ridge: float) -> Solve:
        factor = factorise(self.rows.mT @ self.rows, ridge)
        return lambda x: (x - self.rows @ factor.solve(self.rows.mT @ x)) / ridge

    def rooted(self, root: Root) -> Solve:
        rows = _rooted(root, self.rows)
        factor = factorise(rows.mT @ rows, 2.0)
        return lambda x: x - rows @ factor.solve(rows.mT @ x)


@runtime_checkable
class Products(Protocol):
    """What is asked of a kernel that is never formed in float64: products, and parts of it for a preconditioner."""

    n: int
    c: int

    def apply(self, x: Float[Tensor, "k *m"]) -> Float[Tensor, "k *m"]:
        """K x."""

    def rounded(self) -> Float[Tensor, "k k"]:
        """All of it, in float32."""

    def entries(self) -> Float[Tensor, " k"]:
        """Its diagonal."""

    def columns(self, chosen: Int[Tensor, " q"]) -> Float[Tensor, "k m"]:
        """All outputs' columns of these samples."""


class FeatureProducts:
    """The kernel of features by products with them."""

    def __init__(self, adapted: TangentFeatures) -> None:
        self.adapted, self.n, self.c = adapted, adapted.n, adapted.c

    def apply(self, x: Tensor) -> Tensor:
        return self.adapted.inner(self.adapted.combine(x.reshape(self.n, self.c))).flatten()

    def rounded(self) -> Tensor:
        return self.adapted.to(torch.float32).kernel().reshape(self.n * self.c, self.n * self.c)

    def entries(self) -> Tensor:
        parts = (self.adapted[k : k + _CHUNK] for k in range(0, self.n, _CHUNK))
        return torch.cat([part.kernel().flatten(2).flatten(0, 1).diagonal() for part in parts])

    def columns(self, chosen: Tensor) -> Tensor:
        return self.adapted.kernel(self.adapted[chosen]).reshape(self.n * self.c, -1)


class FreeKernel(Kernel):
    """The kernel by its products in float64, its systems by conjugate gradients with what ``near`` knows of it."""

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
            moved = _rooted(root.mT, p[:, None])[:, 0]
            return p + _rooted(root, self.apply(moved)[:, None])[:, 0] / 2

        return lambda x: conjugate_gradients(apply, x, near)

    @abstractmethod
    def near_shifted(self, ridge: float) -> Solve:
        """About x ↦ (K + ρI)⁻¹ x."""

    @abstractmethod
    def near_rooted(self, root: Root) -> Solve:
        """About x ↦ (I + ½SᵀKS)⁻¹ x."""


class PivotedKernel(FreeKernel):
    """Never formed: preconditioned by a partial Cholesky factor.

    ``rank`` columns are chosen by random pivoting, of probability the diagonal that is left (Chen, Epperly, Tropp & Webber,
    2023), some at a time; the seed is fixed.
    """

    def __init__(self, products: Products, rank: int, chunk: int = _CHUNK) -> None:
        super().__init__(products)
        self.columns, self.rest = partial_cholesky(products, rank, chunk)

    def near_shifted(self, ridge: float) -> Solve:
        return _low_rank_inverse(self.columns, ridge + self.rest)

    def near_rooted(self, root: Root) -> Solve:
        return _low_rank_inverse(_rooted(root, self.columns) / 2**0.5, 1.0)


class RoundedKernel(FreeKernel):
    """Formed and factorised in float32, a preconditioner so close that few products in float64 are needed."""

    def near_shifted(self, ridge: float) -> Solve:
        matrix = self.products.rounded()
        matrix.diagonal().add_(ridge)
        return _rounded_inverse(matrix)

    def near_rooted(self, root: Root) -> Solve:
        n, c = root.shape[:2]
        matrix, small = self.products.rounded(), root.float()
        # In place, some samples at a time: copies of the whole would be what memory is short of.
        rows, columns = matrix.reshape(n, c, n * c), matrix.reshape(n * c, n, c)
        for k in range(0, n, _CHUNK):
            part = slice(k, k + _CHUNK)
            rows[part] = small[part].mT @ rows[part] / 2
            columns[:, part] = torch.einsum("rlc,lcd->rld", columns[:, part], small[part])
        matrix.diagonal().add_(1)
        return _rounded_inverse(matrix)


def _rounded_inverse(matrix: Float[Tensor, "k k"]) -> Solve:
    """The map x ↦ A⁻¹x to single precision; A, positive definite up to its rounding, is given up."""
    rounding = torch.finfo(matrix.dtype).eps * float(torch.linalg.matrix_norm(matrix))
    added = 0.0
    for multiple in _ROUNDING:
        matrix.diagonal().add_(multiple * rounding - added)
        added = multiple * rounding
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            break
    else:
        raise TangentError("fit: the kernel is not positive definite in single precision; use form='dense'")
    solve = Factorised(factor, added).solve

    def near(x: Tensor) -> Tensor:
        size = x.norm(dim=0)  # single precision has a narrower range
        size = torch.where(size > 0, size, 1.0)
        return solve((x / size).to(factor.dtype)).to(x.dtype) * size

    return near


def _rooted(root: Root, columns: Float[Tensor, "k m"]) -> Float[Tensor, "k m"]:
    """Sᵀ times columns."""
    n, c = root.shape[:2]
    return torch.einsum("kab,kam->kbm", root, columns.reshape(n, c, -1)).reshape(n * c, -1)


def _low_rank_inverse(columns: Float[Tensor, "k m"], shift: float) -> Solve:
    """The map x ↦ (LLᵀ + shift·I)⁻¹ x."""
    factor = factorise(columns.mT @ columns, shift)
    return lambda x: (x - columns @ factor.solve(columns.mT @ x)) / shift


@dataclass(frozen=True)
class Iterated:
    """What conjugate gradients found of A⁻¹B: the largest relative residual of a column, and after how many products."""

    solution: Float[Tensor, "k *m"] = field(repr=False)
    residual: float
    steps: int


def conjugate_gradients(apply: Solve, b: Float[Tensor, "k *m"], near: Solve) -> Float[Tensor, "k *m"]:
    """A⁻¹b to a relative residual of 1e-12, or as near as float64 comes; ``near`` is about A⁻¹."""
    return iterate(apply, b, near).solution


def iterate(
    apply: Solve,
    b: Float[Tensor, "k *m"],
    near: Solve,
    *,
    tol: float = _CG_TOLERANCE,
    most: int = _CG_STEPS,
    start: Float[Tensor, "k *m"] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Iterated:
    """Conjugate gradients on A x = b, all columns of b at once, each with directions of its own; the best iterate of each."""
    x = torch.zeros_like(b) if start is None else start.clone()
    residual = b.clone() if start is None else b - apply(x)
    size = b.norm(dim=0)
    direction = moved = near(residual)
    product = _inner(residual, moved)
    best, best_size, since, steps = x, residual.norm(dim=0), 0, 0
    while steps < most and bool((best_size > tol * size).any()) and since <= 100:
        steps += 1
        image = apply(direction)
        length = _ratio(product, _inner(direction, image))
        before, x, residual = residual, x + length * direction, residual - length * image
        left = residual.norm(dim=0)
        better = left < best_size
        since = 0 if bool(better.any()) else since + 1
        best, best_size = torch.where(better, x, best), torch.where(better, left, best_size)
        if progress is not None:
            progress(steps, float(_ratio(best_size, size).max()))
        moved = near(residual)
        # The change alone, as ``near`` may be rounded more than the rest: directions stay conjugate.
        ratio = _ratio(_inner(residual - before, moved), product)
        product = _inner(residual, moved)
        direction = moved + ratio * direction
    return Iterated(best, float(_ratio(best_size, size).max()), steps)


def _inner(x: Float[Tensor, "k *m"], y: Float[Tensor, "k *m"]) -> Float[Tensor, "*m"]:
    return (x * y).sum(0)


def _ratio(a: Float[Tensor, "*m"], b: Float[Tensor, "*m"]) -> Float[Tensor, "*m"]:
    """a/b, and zero where b is: a column that is solved moves no further."""
    return torch.where(b != 0, a / b, 0.0)


def partial_cholesky(kernel: Products, rank: int, chunk: int = _CHUNK) -> tuple[Float[Tensor, "k m"], float]:
    """L with LLᵀ close to the kernel, of about ``rank`` columns, and the mean of the diagonal that is left.

    ``chunk`` samples are chosen at a time.
    """
    n, c = kernel.n, kernel.c
    diagonal = kernel.entries()
    total = float(diagonal.sum())
    generator = torch.Generator(device=diagonal.device).manual_seed(0)
    columns = diagonal.new_zeros(n * c, 0)
    left = diagonal.clone()
    while columns.shape[1] < rank and float(left.sum()) > 1e-13 * total:
        weights = left.reshape(n, c).sum(1).clamp_min(0)
        count = min(chunk, int((weights > 0).sum()))
        chosen = torch.multinomial(weights, count, generator=generator)
        rows = (chosen[:, None] * c + torch.arange(c, device=chosen.device)).flatten()
        block = kernel.columns(chosen) - columns @ columns[rows].mT
        # Directions of the pivots that others among them already give are left out.
        values, vectors = torch.linalg.eigh(block[rows])
        wanted = values > 1e-12 * float(diagonal.max())
        if not bool(wanted.any()):
            break
        columns = torch.cat([columns, (block @ vectors[:, wanted]) / values[wanted].sqrt()], 1)
        left = (diagonal - (columns**2).sum(1)).clamp_min(0)
    return columns, max(float(left.mean()), 1e-14 * float(diagonal.mean()))
