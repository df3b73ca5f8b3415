"""What the fit must do to the data: the dual step each loss asks for, its value, and its part of the lower bound."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.errors import TangentError


@dataclass(frozen=True)
class SquaredError:
    """(1/ρ)·Σ_k‖r_k − φ(x_k)β‖², or at ρ = 0 the constraint φ(x_k)β = r_k: interpolation.

    Given a kernel K, the dual coefficients solve (K + ρI)α = r, and r − Kα = ρα.
    Raises TangentError for a negative or non-finite ρ.
    """

    ridge: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.ridge < float("inf"):
            raise TangentError(f"fit: the ridge ρ is zero (interpolation) or positive, got {self.ridge}")

    def value(self, residual: Float[Tensor, " k"]) -> float:
        """The loss of the residual r − φβ; a constraint costs nothing."""
        return 0.0 if self.ridge == 0 else float((residual**2).sum()) / self.ridge

    def bound(self, a: Float[Tensor, " k"], r: Float[Tensor, " k"]) -> float:
        """⟨a, r⟩ − ρ‖a‖²/4, the loss's part of the dual objective D(a)."""
        return float(a @ r) - self.ridge * float(a @ a) / 4


@dataclass(frozen=True)
class Factorised:
    """A Cholesky factor of K + ρI, with the jitter that was added to make it exist."""

    factor: Float[Tensor, "k k"]
    jitter: float

    def solve(self, r: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """(K + ρI)⁻¹ r."""
        return torch.cholesky_solve(r[:, None], self.factor)[:, 0]


def factorise(kernel: Float[Tensor, "k k"], ridge: float) -> Factorised:
    """Cholesky of K + ρI, with as little jitter as it takes; raises TangentError where even a visible one fails."""
    scale = float(kernel.diagonal().mean())
    for jitter in (0.0, 1e-15, 1e-14, 1e-13, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8):
        shifted = kernel.clone()
        shifted.diagonal().add_(ridge + jitter * scale)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not int(failed):
            return Factorised(factor, jitter * scale)
    raise TangentError(
        "fit: the adapted kernel is not positive definite even with a jitter of 1e-8 of its diagonal; "
        "use a positive ridge, or a stronger penalty"
    )
