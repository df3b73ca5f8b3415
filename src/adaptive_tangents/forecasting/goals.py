"""What a forecast aims at: targets or labels, their loss at any outputs, and what is left of it for a fit."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from adaptive_tangents.checks import as_tensor, check_finite, check_real
from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.solvers.fit import unwarned
from adaptive_tangents.solvers.results import Fit
from adaptive_tangents.structures.base import Structure

_TOL = 1e-4  # of a step's fit: the linearization it fits holds less exactly than this
_ROUNDS = 100


class Goal(ABC):
    """Targets of some samples, and the loss that training lowers."""

    @abstractmethod
    def losses(self, outputs: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
        """The loss of each sample at the outputs."""

    @abstractmethod
    def fitted(
        self, feats: TangentFeatures, outputs: Float[Tensor, "n c"], structure: Structure, relative: float, mean: float
    ) -> Fit:
        """The exact fit to what is left at the outputs; the ridge is ``relative`` times the mean eigenvalue of K."""

    @abstractmethod
    def missing(self, outputs: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """The change of the outputs that a Newton step asks for: r = y − f for squared error."""

    @abstractmethod
    def taken(self, index: Tensor) -> "Goal":
        """The goal of some of the samples."""

    def loss(self, outputs: Float[Tensor, "n c"]) -> float:
        """The mean loss."""
        return float(self.losses(outputs).mean())


@dataclass(frozen=True)
class Amounts(Goal):
    """Real targets y, with squared error, a mean over outputs."""

    y: Float[Tensor, "n c"]

    def losses(self, outputs: Tensor) -> Tensor:
        return ((self.y - outputs) ** 2).mean(1)

    def missing(self, outputs: Tensor) -> Tensor:
        return self.y - outputs

    def fitted(
        self, feats: TangentFeatures, outputs: Tensor, structure: Structure, relative: float, mean: float
    ) -> Fit:
        left = self.y - outputs
        found = unwarned(feats, left, structure=structure, ridge=relative * mean, tol=_TOL, max_rounds=_ROUNDS)
        assert isinstance(found, Fit)
        return found

    def taken(self, index: Tensor) -> "Amounts":
        return Amounts(self.y[index])


@dataclass(frozen=True)
class Labels(Goal):
    """Class numbers with cross-entropy; the logistic loss where there is one output."""

    labels: Int[Tensor, " n"]

    def losses(self, outputs: Tensor) -> Tensor:
        logits = torch.cat([torch.zeros_like(outputs), outputs], 1) if outputs.shape[1] == 1 else outputs
        return functional.cross_entropy(logits, self.labels, reduction="none")

    def _probabilities(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid() if outputs.shape[1] == 1 else outputs.softmax(1)

    def curvature(self, outputs: Tensor) -> float:
        """The mean second derivative of the loss in an output, p(1 − p)."""
        p = self._probabilities(outputs)
        return float((p * (1 - p)).mean())

    def missing(self, outputs: Tensor) -> Tensor:
        p = self._probabilities(outputs)
        goal = self.labels[:, None].to(p) if p.shape[1] == 1 else functional.one_hot(self.labels, p.shape[1]).to(p)
        return (goal - p) / max(self.curvature(outputs), torch.finfo(p.dtype).tiny)

    def fitted(
        self, feats: TangentFeatures, outputs: Tensor, structure: Structure, relative: float, mean: float
    ) -> Fit:
        # (1/ρ)·CE curves as squared error (1/ρ′)‖·‖² does for ρ′ = 2ρ/(p(1 − p)).
        ridge = relative * mean * self.curvature(outputs) / 2
        found = unwarned(
            feats, self.labels, structure=structure, loss="cross-entropy", offset=outputs, ridge=ridge, tol=_TOL,
            max_rounds=_ROUNDS,
        )  # fmt: skip
        assert isinstance(found, Fit)
        return found

    def taken(self, index: Tensor) -> "Labels":
        return Labels(self.labels[index])


def goal_of(call: str, y: object, outputs: Float[Tensor, "n c"], loss: str) -> Goal:
    """The goal of targets or labels as the user gave them; raises TangentError when they do not fit the outputs."""
    n, c = outputs.shape
    what = "targets" if loss == "squared" else "labels"
    given = as_tensor(call, what, y, outputs.device)
    if given.device != outputs.device:
        raise TangentError(
            f"{call}: {what} are on {given.device} and the network's outputs on {outputs.device}; move one with .to(device)"
        )
    if loss == "squared":
        shape = tuple(given.shape)
        given = given[:, None] if given.ndim == 1 and c == 1 else given
        if tuple(given.shape) != (n, c):
            hint = "" if shape != (n,) or given.is_floating_point() else "; class numbers need loss='cross-entropy'"
            raise TangentError(f"{call}: targets have shape {shape}, expected ({n}, {c}): n samples, c outputs{hint}")
        if given.is_complex():
            raise TangentError(f"{call}: targets are {given.dtype}; give real ones, such as y.real")
        check_real(call, given, "real numbers, e.g. y.double()")
        check_finite(call, "the target", [given])
        return Amounts(given.detach().double())
    if tuple(given.shape) != (n,) or given.is_floating_point() or given.is_complex():
        raise TangentError(
            f"{call}: cross-entropy takes n = {n} integer labels, got {given.dtype} of shape {tuple(given.shape)}"
        )
    classes = max(c, 2)
    wrong = ((given < 0) | (given >= classes)).nonzero().flatten()
    if len(wrong):
        k = int(wrong[0])
        raise TangentError(f"{call}: labels are 0..{classes - 1}, sample {k} has {int(given[k])}")
    return Labels(given.detach().long())
