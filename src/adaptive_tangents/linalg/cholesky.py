"""Cholesky factors of kernels: whole ones with as little jitter as possible, and partial ones with random pivots."""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptive_tangents.errors import TangentError

_JITTERS = (0.0, 1e-15, 1e-14, 1e-13, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8)
CHUNK = 16


@dataclass(frozen=True)
class Factorized:
    """A Cholesky factor of K + ρI, and the jitter that was added to the diagonal to make it exist."""

    factor: Float[Tensor, "k k"] = field(repr=False)
    jitter: float

    def solve(self, r: Float[Tensor, "k *m"]) -> Float[Tensor, "k *m"]:
        """(K + ρI)⁻¹ r for one right side or several."""
        # Two triangular solves: several times faster than cholesky_solve for one right side.
        half = torch.linalg.solve_triangular(self.factor, r.reshape(len(r), -1), upper=False)
        found: Tensor = torch.linalg.solve_triangular(self.factor.mT, half, upper=True)
        return found.reshape(r.shape)


def factorize(kernel: Float[Tensor, "k k"], ridge: float) -> Factorized:
    """The Cholesky factor of K + ρI with the least jitter that works; raises TangentError if even the largest fails."""
    diagonal = kernel.diagonal().clone()
    scale = float(diagonal.mean())
    try:
        for jitter in _JITTERS:
            kernel.diagonal().copy_(diagonal + (ridge + jitter * scale))  # in place: a shifted copy would double memory
            factor, failed = torch.linalg.cholesky_ex(kernel)
            if not int(failed):
                return Factorized(factor, jitter * scale)
    finally:
        kernel.diagonal().copy_(diagonal)
    raise TangentError(
        "fit: the adapted kernel is not positive definite even with a jitter of 1e-8 of its diagonal; "
        "use a positive ridge, or a stronger penalty"
    )


@runtime_checkable
class Products(Protocol):
    """A kernel that is never formed in float64: its products, and the parts that a preconditioner needs."""

    n: int
    c: int

    def apply(self, x: Float[Tensor, "k *m"]) -> Float[Tensor, "k *m"]:
        """K x."""

    def rounded(self) -> Float[Tensor, "k k"]:
        """The whole kernel in float32."""

    def entries(self) -> Float[Tensor, " k"]:
        """Its diagonal."""

    def columns(self, chosen: Int[Tensor, " q"]) -> Float[Tensor, "k m"]:
        """The columns of these samples, for all outputs."""


def partial_cholesky(kernel: Products, rank: int, chunk: int = CHUNK) -> tuple[Float[Tensor, "k m"], float]:
    """L with LLᵀ close to the kernel, about ``rank`` columns, and the mean of the remaining diagonal.

    Samples are chosen ``chunk`` at a time.
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
        # Pivots that depend on each other add no direction: keep the independent ones.
        values, vectors = torch.linalg.eigh(block[rows])
        wanted = values > 1e-12 * float(diagonal.max())
        if not bool(wanted.any()):
            break
        columns = torch.cat([columns, (block @ vectors[:, wanted]) / values[wanted].sqrt()], 1)
        left = (diagonal - (columns**2).sum(1)).clamp_min(0)
    return columns, max(float(left.mean()), 1e-14 * float(diagonal.mean()))
