"""Ridge and strength of an estimator, chosen by folds: every sample is predicted by fits that have not seen it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional

from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.runtime.progress import Progress, silent
from adaptive_tangents.solvers.fit import unwarned
from adaptive_tangents.solvers.losses import LossName
from adaptive_tangents.solvers.results import Fit
from adaptive_tangents.structures.base import Fixed, Structure
from adaptive_tangents.structures.strengths import has_strength, strengthened

_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # times the mean of K₀'s diagonal
_MORE = 10.0  # adapted features are larger, so the ridge that suits them may be, too
_SHARES = (0.95, 0.8, 0.5)  # Ω̃(β) over ‖β‖² at the fixed kernel's β: less is more adaptation
_DECADES = torch.arange(-7.0, 2.01, 0.5, dtype=torch.float64, device="cpu")  # of λ/‖β‖², among which these are found
_TEMPERATURES = np.logspace(-2, 3, 251)
_COARSE = 1e-4  # `tol` of the fits that are only compared


@dataclass(frozen=True)
class Task:
    """Features, f(x;θ₀) and targets of training samples, and how they are fitted."""

    feats: TangentFeatures
    start: Float[Tensor, "n c"]
    targets: Shaped[Tensor, "n *c"]
    loss: LossName
    intercepts: bool
    tol: float
    max_rounds: int
    seed: int

    def intercept(self, index: Int[Tensor, " _k"]) -> Float[Tensor, " c"]:
        """The unpenalized part of predictions, from some of the samples."""
        c = self.start.shape[1]
        if not self.intercepts:
            return self.start.new_zeros(c)
        if self.loss == "squared":
            return (self.targets[index] - self.start[index]).mean(0)
        counts = torch.bincount(self.targets[index].flatten(), minlength=max(2, c)).double() + 0.5
        logs = counts.log()
        return logs[1:] - logs[:1] if c == 1 else logs - logs.mean()

    def fit(
        self, index: Int[Tensor, " _k"], structure: Structure, ridge: float,
        *, start: Fit | None = None, tol: float | None = None, watch: Progress = silent,
    ) -> Fit:  # fmt: skip
        """A fit to some of the samples."""
        whole = len(index) == self.feats.n
        feats = self.feats if whole else self.feats[index]
        base = self.start[index] + self.intercept(index)
        squared = self.loss == "squared"
        found = unwarned(
            feats, self.targets[index] - base if squared else self.targets[index], structure=structure, loss=self.loss,
            offset=None if squared else base, ridge=ridge, tol=tol or self.tol, max_rounds=self.max_rounds, start=start,
            watch=watch,
        )  # fmt: skip
        assert isinstance(found, Fit)
        return found

    def values(self, found: Fit, kept: Int[Tensor, " _k"], held: Int[Tensor, " _h"]) -> Float[Tensor, "_h c"]:
        """Predictions of held-out samples by a fit to those kept."""
        return self.start[held] + self.intercept(kept) + found.predict(self.feats[held])

    def error(self, values: Float[Tensor, "k c"], index: Int[Tensor, " k"]) -> float:
        """The mean loss of predictions."""
        if self.loss == "squared":
            return float(((self.targets[index] - values) ** 2).sum()) / len(index)
        return float(cross_entropy(values, self.targets[index].flatten()))


@dataclass(frozen=True)
class Choice:
    """The ridge and strength chosen, the table of candidates, and the best one's held-out predictions of some samples.

    ``part`` is the share of the choice in the work of choice and fit, which grows with the square of samples.
    """

    ridge: float
    strength: float
    table: dict[str, Any] = field(default_factory=lambda: {"params": [], "mean_test_loss": np.empty(0), "chosen": None})
    index: Int[Tensor, " _k"] | None = None
    values: Float[Tensor, "_k c"] | None = None
    part: float = 0.0


@dataclass(frozen=True)
class _Tried:
    """A candidate with its held-out predictions and their mean loss."""

    ridge: float
    strength: float
    values: Float[Tensor, "_k c"]
    loss: float


def strengthened_to(structure: Structure, strength: float) -> Structure:
    """The structure with its penalties times the strength; ``Fixed`` at infinity."""
    if math.isinf(strength):
        return Fixed()
    return structure if strength == 1 else strengthened(structure, strength)


def chosen(
    task: Task, structure: Structure, ridge: float | None, strength: float | None, folds: int, most: int | None,
    *, predictions: bool, progress: Progress = silent,
) -> Choice:  # fmt: skip
    """The candidate with the least held-out loss; None of ridge and strength is to be chosen, a number is kept.

    With ``predictions``, samples are held out even where there is nothing to choose.
    """
    ridges = [ridge] if ridge is not None else [share * _mean_square(task.feats) for share in _RIDGES]
    if not has_strength(structure):
        strength = math.inf if isinstance(structure, Fixed) else 1.0
    some = _drawn(task, most)
    parts = dealt(task, some, folds)
    if not parts or (len(ridges) == 1 and strength is not None and not predictions):
        return Choice(ridges[len(ridges) // 2], math.inf if strength is None else strength)
    count = len(ridges) + (len(_SHARES) * (1 if ridge is not None else 2) if strength is None else 0)
    work = count * len(parts) * ((len(some) - len(parts[0])) / task.feats.n) ** 2
    part = work / (1 + work)
    trial = _Trial(task, structure, some, parts)
    tried: list[_Tried] = []

    def attempt(ridge: float, strength: float) -> None:
        progress("ridge and strength", part * len(tried) / count)
        tried.append(trial(ridge, strength))

    for each in ridges:
        attempt(each, math.inf if strength is None else strength)
    if strength is None:
        best = min(tried, key=lambda one: one.loss).ridge
        strengths = _strengths(structure, task.feats, task.fit(some, Fixed(), best, tol=_COARSE))
        near = [best] if ridge is not None else [best, _MORE * best]
        for each, one in product(near, strengths):
            attempt(each, one)
    index = min(range(len(tried)), key=lambda k: tried[k].loss)
    table = {
        "params": [{"ridge": one.ridge, "strength": one.strength} for one in tried],
        "mean_test_loss": np.array([one.loss for one in tried]),
        "chosen": index,
    }
    found = tried[index]
    return Choice(found.ridge, found.strength, table, torch.cat(parts), found.values, part)


@dataclass(frozen=True)
class _Trial:
    """Predicts each of some samples by fits without its fold."""

    task: Task
    structure: Structure
    some: Int[Tensor, " _k"]
    parts: Sequence[Int[Tensor, " _h"]]

    def __call__(self, ridge: float, strength: float) -> _Tried:
        made, structure = [], strengthened_to(self.structure, strength)
        for held in self.parts:
            kept = self.some[~torch.isin(self.some, held)].sort().values
            found = self.task.fit(kept, structure, ridge, tol=_COARSE)
            made.append(self.task.values(found, kept, held))
        values = torch.cat(made)
        return _Tried(ridge, strength, values, self.task.error(values, torch.cat(list(self.parts))))


def temperature(choice: Choice, labels: Int[Tensor, " n"]) -> float:
    """What to divide outputs by so that the cross-entropy of held-out predictions is least; 1 without such."""
    if choice.values is None or choice.index is None:
        return 1.0
    truth = labels.to(choice.values.device)[choice.index]
    losses = [float(cross_entropy(choice.values / float(scale), truth)) for scale in _TEMPERATURES]
    return float(_TEMPERATURES[int(np.argmin(losses))])


def cross_entropy(values: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """The mean cross-entropy, logistic where c = 1."""
    logits = torch.cat([torch.zeros_like(values), values], 1) if values.shape[1] == 1 else values
    return functional.cross_entropy(logits, labels.long())


def dealt(task: Task, some: Int[Tensor, " _k"], folds: int) -> list[Int[Tensor, " _h"]]:
    """Samples dealt to folds, class by class where there are classes; none where there are fewer than four samples."""
    folds = min(folds, len(some) // 2)
    if folds < 2:
        return []
    order = some
    kinds = _kinds(task)
    if kinds is not None:
        order = some[torch.sort(kinds[some], stable=True).indices]
    return [order[k::folds] for k in range(folds)]


def _kinds(task: Task) -> Int[Tensor, " n"] | None:
    """Class numbers of the samples; None for regression."""
    if not task.targets.is_floating_point():
        return task.targets.flatten()
    signs = task.targets.abs() == 1
    return (
        (task.targets > 0).long() @ torch.arange(1, task.targets.shape[1] + 1, device="cpu").to(signs.device)
        if signs.all()
        else None
    )


def _drawn(task: Task, most: int | None) -> Int[Tensor, " _k"]:
    """At most so many samples, shuffled."""
    n = task.feats.n
    order = torch.randperm(n, generator=torch.Generator().manual_seed(task.seed), device="cpu").to(task.feats.device)
    return order[: n if most is None else most]


def _mean_square(feats: TangentFeatures) -> float:
    """The mean of K₀'s diagonal over samples and outputs."""
    some = feats[: min(feats.n, 200)]
    return float(some.kernel(outputs="trace").diagonal().double().mean()) / feats.c or 1.0


def _strengths(structure: Structure, feats: TangentFeatures, found: Fit) -> list[float]:
    """The factors of λ at which Ω̃ is a share of ‖β‖² at the fixed kernel's β, weak adaptation first."""
    prepared = structure.prepared(feats.to(torch.float64))
    size = sum(float((matrix**2).sum()) for matrix in found.coefficients.values())
    if not size:
        return [1.0]
    logs = [math.log10(size) + float(decade) for decade in _DECADES]
    shares = [strengthened(prepared, 10**log).penalty(found.coefficients) / size for log in logs]
    return [float(10 ** np.interp(share, np.maximum.accumulate(shares), logs)) for share in _SHARES]
