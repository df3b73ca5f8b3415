"""Steps θ_{k+1} = θ_k + sβ_k within a trust region: the ridge follows how well each fit predicts the true loss."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.capture.batches import Batch, samples, take
from adaptive_tangents.capture.capture import Capture
from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.forecasting.goals import Goal
from adaptive_tangents.measures.alignment import effective_rank
from adaptive_tangents.runtime.chunks import ranges
from adaptive_tangents.solvers.results import Fit
from adaptive_tangents.structures.base import Matrices, Structure

ACCEPTED = 0.25  # the share of the predicted fall of the loss that a step must reach
_TRUSTED = 0.75  # and from which the next ridge is weaker
_WEAKER, _STRONGER = 1 / 3, 4.0
_MOST_TRIES = 8
_SHORTEST, _HALF = 0.1, 0.5  # lengths of a step: the least, and the one tried if outputs at 1 are not finite
_NEAR = 1e-4  # length at which the loss is linear
_AT_A_TIME, _PASS = 16, 1024  # samples whose kernel, or whose outputs, are computed at once
_FIRST = torch.tensor([0], device="cpu")  # a fit keeps the features of one sample, so that it stays small
_LEAST = 1e-12  # relative fall of the loss that is no rounding


@dataclass(frozen=True)
class Step:
    """One step θ_{k+1} = θ_k + sβ_k.

    Attributes:
        loss: the mean training loss after it.
        held_out: the mean loss of the held-out samples after it; NaN without any.
        length: s.
        ridge: ρ of its fit.
        relative_ridge: κ, the ridge over the mean eigenvalue of the kernel at θ_k (for cross-entropy, over its product with
            half the mean curvature of the loss).
        agreement: the fall of the loss over what the fit predicts for s = 1.
        rank: the effective rank (participation) of β, a mean over the blocks that are matrices, weighted by ‖B‖².
        tries: how many ridges were tried.
        converged: whether its fit did.
        seconds: that it took.
    """

    loss: float
    held_out: float
    length: float
    ridge: float
    relative_ridge: float
    agreement: float
    rank: float
    tries: int
    converged: bool
    seconds: float


@dataclass(frozen=True)
class Ground:
    """A network with the samples to fit and those held out; it counts the passes over samples in ``passes``."""

    capture: Capture
    x: Batch
    goal: Goal
    held_x: Batch | None
    held: Goal | None
    passes: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "backward": 0.0})

    @property
    def rounding(self) -> float:
        """What is no more than rounding, relative to outputs."""
        return 30 * torch.finfo(self.capture.probe.least).eps

    def outputs(self, parameters: Mapping[str, Tensor]) -> Float[Tensor, "n c"]:
        """The outputs f of the samples to fit."""
        self.passes["forward"] += 1
        return outputs_at(self.capture, parameters, self.x)

    def finite_outputs(self, parameters: Mapping[str, Tensor]) -> Float[Tensor, "n c"] | None:
        """The same, or None where one is not finite, as far from θ₀."""
        try:
            return self.outputs(parameters)
        except TangentError:
            return None

    def held_losses(self, parameters: Mapping[str, Tensor]) -> Float[Tensor, " m"] | None:
        """The loss of each held-out sample; infinite where an output is not finite, as far from θ₀."""
        if self.held is None or self.held_x is None:
            return None
        try:
            return self.held.losses(outputs_at(self.capture, parameters, self.held_x))
        except TangentError:
            return torch.full((samples(self.held_x),), math.inf, dtype=torch.float64, device="cpu")

    def features(self, parameters: Mapping[str, Tensor]) -> TangentFeatures:
        """φ of the samples to fit."""
        made = self.capture.at(parameters).features(self.x)
        self.passes["forward"] += 1
        self.passes["backward"] += made.c
        return made


def outputs_at(capture: Capture, parameters: Mapping[str, Tensor], x: Batch) -> Float[Tensor, "n c"]:
    """f(x; θ) in float64, some samples at a time."""
    there = capture.at(parameters)
    parts = [there.outputs(take(x, part), {}) for part in ranges(samples(x), _PASS)]
    return torch.cat(parts).double()


@dataclass(frozen=True)
class Taken:
    """A step, the fit it took, and where it led."""

    step: Step
    fit: Fit
    parameters: Mapping[str, Tensor]
    held_losses: Tensor | None


class Iterate:
    """Parameters θ_k with their outputs, and with features and their mean eigenvalue, which are made when first asked for.

    All candidates begin at the same one, so the features at θ₀ are made once.
    """

    def __init__(self, ground: Ground, parameters: Mapping[str, Tensor], outputs: Float[Tensor, "n c"]) -> None:
        self.ground, self.parameters, self.outputs = ground, parameters, outputs

    @cached_property
    def features(self) -> TangentFeatures:
        """φ of the samples to fit."""
        return self.ground.features(self.parameters)

    @cached_property
    def mean(self) -> float:
        """The mean eigenvalue of their kernel."""
        return mean_eigenvalue(self.features)


@dataclass
class Walk:
    """Steps one after the other, from θ₀ on, at present at ``iterate``; ``reason`` says why there are no more."""

    ground: Ground
    structure: Structure
    relative_ridge: float
    iterate: Iterate | None
    reason: str = ""

    def step(self) -> Taken | None:
        """The next step, which lowers the training loss; None where no ridge lowers it enough."""
        if self.iterate is None:
            return None
        began, ground = time.perf_counter(), self.ground
        here, outputs = self.iterate.parameters, self.iterate.outputs
        loss = ground.goal.loss(outputs)
        if float(ground.goal.missing(outputs).norm()) <= ground.rounding * float(outputs.norm()):
            self.reason = "the network fits its targets: nothing is left to learn"
            return None
        feats, mean = self.iterate.features, self.iterate.mean
        if mean == 0:
            self.reason = "the tangent features of all samples are zero: no gradient moves the network"
            return None
        kappa = self.relative_ridge
        for tries in range(1, _MOST_TRIES + 1):
            found = ground.goal.fitted(feats, outputs, self.structure, kappa, mean)
            change = found.predict(feats)
            predicted = loss - ground.goal.loss(outputs + change)
            length, after, there, beyond = self._searched(here, feats, found, outputs, change)
            fall = loss - after
            agreement = fall / predicted if predicted > 0 else 0.0
            if beyond is not None and agreement >= ACCEPTED and fall > _LEAST * loss:
                self.relative_ridge = kappa * (_WEAKER if agreement >= _TRUSTED else 1.0)
                held = ground.held_losses(there)
                step = Step(
                    after, math.nan if held is None else float(held.mean()), length, found.ridge, kappa, agreement,
                    _rank(found.coefficients), tries, found.converged, time.perf_counter() - began,
                )  # fmt: skip
                self.iterate = Iterate(ground, there, beyond)
                return Taken(step, replace(found, features=feats[_FIRST.to(feats.device)]), there, held)
            kappa *= _STRONGER
        self.reason = (
            f"the trust region shrank to nothing: {_MOST_TRIES} ridges, up to {kappa / _STRONGER:.1e} times the kernel's "
            f"mean eigenvalue, gave no step that lowers the loss by {ACCEPTED:g} of what its fit predicts"
        )
        return None

    def _searched(
        self, here: Mapping[str, Tensor], feats: TangentFeatures, found: Fit, before: Tensor, predicted: Tensor
    ) -> tuple[float, float, dict[str, Tensor], Tensor | None]:
        """The length s ≤ 1, the training loss there, where it leads, and the outputs.

        The whole length is taken if the loss falls nearly as the fit predicts; else it is compared with the length at which
        the parabola is least that has the loss and slope at 0 and the loss at 1.
        """
        goal = self.ground.goal
        loss = goal.loss(before)
        slope = (goal.loss(before + _NEAR * predicted) - loss) / _NEAR
        tried = [self._at(here, feats, found, 1.0)]
        after = tried[0][1]
        if loss - after < _TRUSTED * (loss - goal.loss(before + predicted)):
            bend = after - loss - slope
            least = -slope / (2 * bend) if math.isfinite(bend) and bend > 0 else _HALF
            if least < 1:
                tried.append(self._at(here, feats, found, max(_SHORTEST, least)))
        return min(tried, key=lambda each: each[1])

    def _at(
        self, here: Mapping[str, Tensor], feats: TangentFeatures, found: Fit, length: float
    ) -> tuple[float, float, dict[str, Tensor], Tensor | None]:
        there = moved(here, feats, found.coefficients, length)
        outputs = self.ground.finite_outputs(there)
        return length, math.inf if outputs is None else self.ground.goal.loss(outputs), there, outputs


def moved(
    parameters: Mapping[str, Tensor], feats: TangentFeatures, coefficients: Matrices, length: float
) -> dict[str, Tensor]:
    """θ + sβ."""
    there = dict(parameters)
    for name, block in feats.blocks.items():
        for parameter, change in block.split(coefficients[name]).items():
            there[parameter] = (parameters[parameter].double() + length * change).to(parameters[parameter].dtype)
    return there


def mean_eigenvalue(feats: TangentFeatures) -> float:
    """The mean eigenvalue of the kernel, trace K/(nc)."""
    traces = [feats[part].kernel(outputs="trace").diagonal() for part in ranges(feats.n, _AT_A_TIME)]
    return float(torch.cat(traces).double().sum()) / (feats.n * feats.c)


def _rank(coefficients: Matrices) -> float:
    """The effective rank, a mean over blocks that are matrices."""
    weights = {name: float((B.double() ** 2).sum()) for name, B in coefficients.items()}
    matrices = {name for name, B in coefficients.items() if min(B.shape) > 1} or set(coefficients)
    total = sum(weights[name] for name in matrices)
    if total == 0:
        return 0.0
    return sum(weights[name] * effective_rank(coefficients[name]).participation for name in matrices) / total
