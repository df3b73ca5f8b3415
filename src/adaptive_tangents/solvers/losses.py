"""Losses of the outputs φβ: value, gradient and curvature in φβ, and the loss's part of the lower bound."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from adaptive_tangents.errors import TangentError

LossName = Literal["squared", "cross-entropy"]

_SIMPLEX_TOLERANCE = 1e-12


class Loss(ABC):
    """A convex function of the outputs φβ of all samples, one vector (nc,), divided by the ridge ρ."""

    name: ClassVar[LossName]
    ridge: float

    @property
    def interpolates(self) -> bool:
        """Whether the loss is the constraint φβ = r."""
        return False

    @property
    def trivial(self) -> bool:
        """Whether β = 0 is the solution for any features."""
        return False

    @abstractmethod
    def value(self, outputs: Float[Tensor, " k"]) -> float:
        """The loss of the outputs φβ."""

    @abstractmethod
    def slope(self, outputs: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """The gradient η in the outputs; at an optimum ∇Ω̃(β) = −φᵀη, so the dual coefficients are α = −η/2."""

    @abstractmethod
    def root(self, outputs: Float[Tensor, " k"]) -> "Float[Tensor, 'n c c'] | None":
        """S of each sample, with SSᵀ the Hessian in its outputs; None if that is (2/ρ)I for all."""

    @abstractmethod
    def bound(self, a: Float[Tensor, " k"]) -> float:
        """The loss's part of the dual objective D(a): minus its conjugate at −a, or −∞."""


@dataclass(frozen=True)
class SquaredError(Loss):
    """(1/ρ)·Σ_k‖r_k − φ(x_k)β‖², or for ρ = 0 the constraint φ(x_k)β = r_k (interpolation).

    Raises TangentError when ρ is negative or not finite.
    """

    name = "squared"
    targets: Float[Tensor, " k"] = field(repr=False)
    ridge: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.ridge < float("inf"):
            raise TangentError(f"fit: the ridge ρ is zero (interpolation) or positive, got {self.ridge}")

    @property
    def interpolates(self) -> bool:
        return self.ridge == 0

    @property
    def trivial(self) -> bool:
        return not bool(self.targets.any())

    def value(self, outputs: Tensor) -> float:
        return 0.0 if self.interpolates else float(((self.targets - outputs) ** 2).sum()) / self.ridge

    def slope(self, outputs: Tensor) -> Tensor:
        return torch.zeros_like(outputs) if self.interpolates else 2 * (outputs - self.targets) / self.ridge

    def root(self, outputs: Tensor) -> None:
        return None

    def bound(self, a: Tensor) -> float:
        return float(a @ self.targets) - self.ridge * float(a @ a) / 4


@dataclass(frozen=True)
class CrossEntropy(Loss):
    r"""(1/ρ)·Σ_k CE(f(x_k; θ₀) + φ(x_k)β, label_k): softmax over c ≥ 2 outputs, or the logistic loss of one.

    ``labels`` (n,) are integers 0..c − 1 (0 and 1 for one output); ``offset`` (n, c) is f(x; θ₀).
    Raises TangentError unless ρ is positive and finite: without a ridge, separable data have no optimum.
    """

    name = "cross-entropy"
    labels: Int[Tensor, " n"] = field(repr=False)
    offset: Float[Tensor, "n c"] = field(repr=False)
    ridge: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.ridge < float("inf"):
            raise TangentError(
                f"fit: cross-entropy takes a positive, finite ridge ρ, got {self.ridge}; without one, labels that the "
                "features separate have no optimum: coefficients grow without bound"
            )

    def _logits(self, outputs: Tensor) -> Tensor:
        logits: Tensor = self.offset + outputs.reshape(self.offset.shape)
        return logits

    @property
    def _goal(self) -> Tensor:
        """The labels as probabilities (n, c)."""
        if self.offset.shape[1] == 1:
            return self.labels[:, None].to(self.offset)
        return functional.one_hot(self.labels, self.offset.shape[1]).to(self.offset)

    def probabilities(self, outputs: Float[Tensor, " k"]) -> Float[Tensor, "n c"]:
        """The probability of each class, or of label 1 for one output."""
        logits = self._logits(outputs)
        return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)

    def value(self, outputs: Tensor) -> float:
        logits = self._logits(outputs)
        if logits.shape[1] == 1:
            total = functional.softplus(torch.where(self.labels[:, None] == 1, -logits, logits)).sum()
        else:
            total = functional.cross_entropy(logits, self.labels, reduction="sum")
        return float(total) / self.ridge

    def slope(self, outputs: Tensor) -> Tensor:
        return ((self.probabilities(outputs) - self._goal) / self.ridge).flatten()

    def root(self, outputs: Tensor) -> Tensor:
        p = self.probabilities(outputs)
        if p.shape[1] == 1:
            return torch.sqrt(p * (1 - p) / self.ridge)[:, :, None]
        # S = diag(√p) − p√pᵀ has SSᵀ = diag(p) − ppᵀ, as the probabilities add up to one.
        root = p.sqrt()
        block: Tensor = torch.diag_embed(root) - p[:, :, None] * root[:, None, :]
        return block / math.sqrt(self.ridge)

    def bound(self, a: Tensor) -> float:
        a = a.reshape(self.offset.shape)
        q = self._goal - self.ridge * a
        q = torch.cat([1 - q, q], 1) if q.shape[1] == 1 else q
        outside = float(q.min()) < -_SIMPLEX_TOLERANCE or float((q.sum(1) - 1).abs().max()) > 1e3 * _SIMPLEX_TOLERANCE
        if outside:
            return -float("inf")
        entropy = -float(torch.special.xlogy(q.clamp_min(0), q.clamp_min(0)).sum())
        return entropy / self.ridge - float((a * self.offset).sum())
