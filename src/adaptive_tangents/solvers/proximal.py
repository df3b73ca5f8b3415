"""proximal_gradient(): the adaptive model by a first-order method, an independent check of what ``fit`` finds.

It minimizes the same objective, Ω̃(β) + loss(φβ)/ρ, but shares only features and structures with ``fit``: it uses no kernel,
no linear system and no transform, and autograd differentiates the loss.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from adaptive_tangents.checks import OF_CLASSES, Values, as_tensor, check_finite
from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.features.tangent_features import TangentFeatures, check_features
from adaptive_tangents.linalg.conjugate_gradients import Progress
from adaptive_tangents.runtime.progress import counted
from adaptive_tangents.solvers.losses import LossName
from adaptive_tangents.solvers.problem import relative
from adaptive_tangents.solvers.targets import check_moderate, size_of
from adaptive_tangents.structures.base import Matrices, Structure, check_sketch
from adaptive_tangents.structures.mixed import as_structure
from adaptive_tangents.structures.spectral import TWO_SIDED

_PRODUCTS = 50  # at most, of the power iteration, which stops when the eigenvalue changes by less than _SETTLED
_SETTLED = 1e-3
_LONGER = 1.5  # factor by which a curvature estimate that is too small grows
_ROUNDING = 1e-15  # a relative rise of the objective that is rounding
_NOISE = 1e-13  # a relative move of the outputs that is mostly rounding


@dataclass(frozen=True, eq=False)
class ProximalFit:
    """The solution of ``proximal_gradient``, in float64.

    Attributes:
        coefficients: β, one matrix B (o, i) for each block.
        structure: the structure fitted, with all that it learned from the features.
        ridge: ρ > 0.
        objective: Ω̃(β) + loss.
        stationarity: ‖∇Ω̃(β) + φᵀη‖/‖φᵀη‖, η the gradient of the loss; the same as in ``Fit``.
        converged: whether the stationarity met ``tol``.
        reason: why the search stopped.
        objectives: the objective at the start and after every step; it never rises.
    """

    coefficients: Mapping[str, Float[Tensor, "_o _i"]] = field(repr=False)
    structure: Structure
    ridge: float
    objective: float
    stationarity: float
    converged: bool
    reason: str
    objectives: tuple[float, ...] = field(repr=False)

    @property
    def steps(self) -> int:
        """Proximal steps taken."""
        return len(self.objectives) - 1

    def predict(self, feats: TangentFeatures) -> Float[Tensor, "m c"]:
        """φβ at any samples, in float64; add f(x; θ₀) for the model's output.

        Args:
            feats: tangent features φ of any m samples, of the same model.

        Raises:
            TangentError: when the features are of other blocks.
        """
        check_features("predict", feats)
        feats.check_matrices("predict", self.coefficients)
        return feats.to(torch.float64).inner(self.coefficients)


def proximal_gradient(
    feats: TangentFeatures,
    r: Values,
    *,
    ridge: float,
    structure: Structure | Mapping[str, Structure] = TWO_SIDED,
    loss: LossName = "squared",
    offset: Values | None = None,
    tol: float = 1e-8,
    max_steps: int = 20_000,
    start: Matrices | None = None,
    progress: Progress | bool | None = None,
) -> ProximalFit:
    r"""Minimize Ω̃(β) + (1/ρ)Σ‖r_k − φ(x_k)β‖², as ``fit`` does with a ridge, by proximal gradient steps alone.

    β ← prox_h(z − h·φᵀη(φz)), with η the gradient of the loss and z extrapolated from the last two β. This momentum
    (Nesterov's) restarts when it points uphill or would raise the objective, so the objective never rises. 1/h is the largest
    curvature of the loss, from a power iteration on φφᵀ; it grows when a step shows it too small. The kernel is never formed.
    A step costs two products with φ and two decompositions of each block; ill-conditioned problems take thousands of steps.

    Args:
        feats: tangent features φ of n samples with c outputs.
        r: targets minus f(x; θ₀), (n, c), or (n,) where c = 1; for cross-entropy integer labels (n,), 0 or 1 where c = 1.
        ridge: ρ > 0.
        structure: which transforms M are allowed; a mapping gives structures by patterns of block names, as in ``Mixed``.
        loss: "squared" or "cross-entropy" (logistic where c = 1).
        offset: f(x; θ₀), (n, c), for cross-entropy only.
        tol: stop at this stationarity.
        max_steps: stop after this many steps, with ``converged=False`` and a TangentWarning.
        start: β to start from, one matrix for each block, such as ``fit(...).coefficients``; None starts at 0.
        progress: called with the number of steps so far and the objective; True shows a bar.

    Raises:
        TangentError: when the structure has no proximal operator (``Modes`` with several modes), the ridge is not positive
            and finite, or targets, labels, offset or start do not fit the features.

    Source: Beck & Teboulle, SIAM J. Imaging Sci. 2(1), 2009; restarts: O'Donoghue & Candès, Found. Comput. Math. 15, 2015.

    >>> import torch, adaptive_tangents as at
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    >>> feats, y = at.tangent_features(model, torch.randn(5, 3)), torch.randn(5, 1)
    >>> found = at.solvers.proximal_gradient(feats, y, structure=at.Left(at.Quadratic(1.0)), ridge=5.0)
    >>> abs(found.objective / at.fit(feats, y, structure=at.Left(at.Quadratic(1.0)), ridge=5.0).objective - 1) < 1e-6
    True
    """
    if not 0 < ridge < math.inf:
        raise TangentError(
            f"proximal_gradient: the ridge ρ is positive and finite, got {ridge}; to interpolate use fit"
        )
    if not tol > 0 or max_steps < 1:
        raise TangentError(f"proximal_gradient: tol and max_steps are positive, got {tol} and {max_steps}")
    call = "proximal_gradient"
    check_features(call, feats)
    structure = as_structure(call, structure)
    check_sketch(call, structure, feats)
    doubled = feats.to(torch.float64)
    descent = _Descent(doubled, structure.prepared(doubled), _smooth(feats, r, loss, offset, ridge))
    point = descent.point(_start(doubled, start))
    with counted(progress, "objective", max_steps) as tell:
        found, objectives, converged, reason = descent.run(point, tol, max_steps, tell)
    if not converged:
        warnings.warn(f"proximal_gradient did not converge: {reason}", TangentWarning, stacklevel=2)
    return ProximalFit(
        found.coefficients, descent.structure, ridge, found.objective, descent.stationarity(found), converged, reason,
        tuple(objectives),
    )  # fmt: skip


@dataclass(frozen=True)
class _Smooth:
    """A loss of the outputs φβ (n, c), and an upper bound of its curvature in them."""

    value: Callable[[Tensor], Tensor]
    curvature: float

    def slope(self, outputs: Tensor) -> Tensor:
        with torch.enable_grad():
            at = outputs.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.value(at), at)
        return slope


def _smooth(feats: TangentFeatures, r: Values, loss: str, offset: Values | None, ridge: float) -> _Smooth:
    """The loss, after checking targets or labels."""
    call, size = "proximal_gradient", (feats.n, feats.c)
    r = as_tensor(call, "targets" if loss == "squared" else "labels", r, feats.device)
    offset = None if offset is None else as_tensor(call, "offset", offset, feats.device)
    if loss == "squared":
        goal = r[:, None] if r.ndim == 1 and feats.c == 1 else r
        if tuple(goal.shape) != size or not goal.is_floating_point() or goal.device != feats.device:
            raise TangentError(
                f"{call}: targets are real and of shape {size} on {feats.device}, got {r.dtype} of shape "
                f"{tuple(r.shape)} on {r.device}" + ("" if r.is_floating_point() else f"; {OF_CLASSES}")
            )
        if offset is not None:
            raise TangentError(f"{call}: offset is for cross-entropy; for squared error give r = y − f(x;θ₀)")
        check_finite(call, "the target", [goal])
        check_moderate(call, size_of(call, feats), goal)
        targets = goal.detach().double()
        return _Smooth(lambda outputs: ((targets - outputs) ** 2).sum() / ridge, 2 / ridge)
    if loss != "cross-entropy":
        raise TangentError(f"{call}: loss is squared or cross-entropy, got {loss!r}")
    if offset is None or tuple(offset.shape) != size or offset.device != feats.device:
        raise TangentError(f"{call}: cross-entropy needs offset = f(x;θ₀) of shape {size} on {feats.device}")
    check_finite(call, "the offset", [offset])
    classes, one = max(feats.c, 2), feats.c == 1
    wrong = tuple(r.shape) != (feats.n,) or r.is_floating_point() or r.is_complex() or r.device != feats.device
    if wrong or bool(((r < 0) | (r >= classes)).any()):
        raise TangentError(
            f"{call}: cross-entropy takes {feats.n} integer labels 0..{classes - 1} on {feats.device}, got {r.dtype} of "
            f"shape {tuple(r.shape)}" + ("" if wrong else f" from {int(r.min())} to {int(r.max())}")
        )
    labels, logits = r.long(), offset.detach().double()

    def entropy(outputs: Tensor) -> Tensor:
        if one:
            wanted = labels[:, None].to(logits)
            return functional.binary_cross_entropy_with_logits(logits + outputs, wanted, reduction="sum") / ridge
        return functional.cross_entropy(logits + outputs, labels, reduction="sum") / ridge

    # For one output p(1 − p) ≤ ¼; for several, the largest eigenvalue of diag(p) − ppᵀ is at most ½.
    return _Smooth(entropy, (0.25 if one else 0.5) / ridge)


def _start(feats: TangentFeatures, start: Matrices | None) -> dict[str, Tensor]:
    like = {"dtype": torch.float64, "device": feats.device}
    if start is None:
        return {name: torch.zeros(block.shape, **like) for name, block in feats.blocks.items()}  # type: ignore[call-overload]
    feats.check_matrices("proximal_gradient", start, "start has", finite=True)
    return {name: start[name].detach().to(**like) for name in feats.blocks}  # type: ignore[call-overload]


@dataclass(frozen=True)
class _Point:
    coefficients: dict[str, Tensor]
    outputs: Float[Tensor, "n c"]
    objective: float


class _Descent:
    def __init__(self, feats: TangentFeatures, structure: Structure, loss: _Smooth) -> None:
        self.feats, self.structure, self.loss = feats, structure, loss
        self.curvature = loss.curvature * self._largest_eigenvalue() or 1.0

    def _largest_eigenvalue(self) -> float:
        """A lower estimate of the kernel φφᵀ's largest eigenvalue, from products with φ."""
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(self.feats.n, self.feats.c, generator=generator, dtype=torch.float64, device="cpu").to(
            self.feats.device
        )
        vector, before = vector / vector.norm(), 0.0
        for _ in range(_PRODUCTS):
            vector = self.feats.inner(self.feats.combine(vector))
            found = float(vector.norm())
            if found == 0 or abs(found - before) <= _SETTLED * found:
                break
            vector, before = vector / found, found
        return found

    def point(self, coefficients: dict[str, Tensor]) -> _Point:
        outputs = self.feats.inner(coefficients)
        objective = self.structure.penalty(coefficients) + float(self.loss.value(outputs))
        return _Point(coefficients, outputs, objective)

    def stationarity(self, point: _Point) -> float:
        slope = self.feats.combine(self.loss.slope(point.outputs))
        size = _norm(slope)
        return relative(_norm(_plus(self.structure.gradient(point.coefficients), 1.0, slope)), size)

    def run(
        self, point: _Point, tol: float, max_steps: int, progress: Progress | None
    ) -> tuple[_Point, list[float], bool, str]:
        before, inertia, objectives = point, 1.0, [point.objective]
        while True:
            following = (1 + math.sqrt(1 + 4 * inertia**2)) / 2
            momentum = (inertia - 1) / following
            ahead = _plus(point.coefficients, momentum, _plus(point.coefficients, -1.0, before.coefficients))
            outputs = point.outputs + momentum * (point.outputs - before.outputs)
            found, left, size = self._step(ahead, outputs)
            if momentum > 0 and found.objective > point.objective * (1 + _ROUNDING):
                inertia, before = 1.0, point
                continue
            # Restart the momentum if the step went against it.
            moved = _plus(found.coefficients, -1.0, point.coefficients)
            inertia = 1.0 if _product(_plus(ahead, -1.0, found.coefficients), moved) > 0 else following
            before, point = point, found
            objectives.append(point.objective)
            if progress is not None:
                progress(len(objectives) - 1, point.objective)
            if left <= tol * size and (stationarity := self.stationarity(point)) <= tol:
                return point, objectives, True, f"stationarity {stationarity:.1e}"
            if len(objectives) > max_steps:
                reason = (
                    f"stopped after {max_steps} steps with stationarity {self.stationarity(point):.1e} (asked: {tol:g}); "
                    "raise max_steps or tol, or the ridge"
                )
                return point, objectives, False, reason

    def _step(self, ahead: dict[str, Tensor], outputs: Float[Tensor, "n c"]) -> tuple[_Point, float, float]:
        """A proximal step, an estimate of the gradient left after it, and the norm of the loss's gradient."""
        slope = self.feats.combine(self.loss.slope(outputs))
        while True:
            found = self.point(self.structure.proximal(_plus(ahead, -1 / self.curvature, slope), 1 / self.curvature))
            length = _norm(_plus(found.coefficients, -1.0, ahead))
            # The outputs' own change shows the curvature; differences of the loss would be lost in rounding.
            noise = _NOISE * float(found.outputs.norm() + outputs.norm())
            moved = float((found.outputs - outputs).norm())
            if moved <= noise or self.loss.curvature * moved**2 <= self.curvature * length**2:
                return found, 2 * self.curvature * length, _norm(slope)
            self.curvature *= _LONGER


def _product(x: Matrices, y: Matrices) -> float:
    return sum(float((x[name] * y[name]).sum()) for name in x)


def _norm(x: Matrices) -> float:
    return math.sqrt(_product(x, x))


def _plus(x: Matrices, step: float, y: Matrices) -> dict[str, Tensor]:
    return {name: x[name] + step * y[name] for name in x}
