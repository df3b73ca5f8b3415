"""proximal_gradient(): the adaptive model by a first-order method, an independent check of what ``fit`` finds.

It minimizes the same objective, Ω̃(β) + loss(φβ)/ρ, and shares with ``fit`` the features, the structures and nothing else: no
kernel, no linear system, no transform; slopes of the loss are autograd's.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from adaptive_tangents.checks import Values, as_tensor, check_finite
from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.linalg.conjugate_gradients import Progress
from adaptive_tangents.solvers.losses import LossName
from adaptive_tangents.solvers.targets import check_features
from adaptive_tangents.structures.base import Matrices, Structure, check_sketch
from adaptive_tangents.structures.mixed import as_structure

_PRODUCTS = 50  # of the power iteration, which ends earlier once the eigenvalue moves by less than a thousandth
_SETTLED = 1e-3
_LONGER = 1.5  # the factor by which a curvature taken too small grows
_ROUNDING = 1e-15  # a relative rise of the objective that is no rise
_NOISE = 1e-13  # a relative move of the outputs that is mostly rounding


@dataclass(frozen=True)
class ProximalFit:
    """What ``proximal_gradient`` found: coefficients B per block, and how near they are to an optimum.

    ``objective`` is Ω̃(β) + loss; ``objectives`` that after every step, never rising; ``stationarity`` is that of a
    ``Fit``, ‖∇Ω̃(β) + φᵀη‖/‖φᵀη‖ with η the slope of the loss. Float64 throughout.
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
        """φβ for features of any samples, in float64; add f(x; θ₀) for the model's output."""
        return feats.to(torch.float64).inner(self.coefficients)


def proximal_gradient(
    feats: TangentFeatures,
    r: Values,
    *,
    ridge: float,
    structure: Structure | Mapping[str, Structure],
    loss: LossName = "squared",
    offset: Values | None = None,
    tol: float = 1e-8,
    max_steps: int = 20_000,
    start: Matrices | None = None,
    progress: Progress | None = None,
) -> ProximalFit:
    r"""Minimize Ω̃(β) + (1/ρ)Σ‖r_k − φ(x_k)β‖², as ``fit`` does with a ridge, by proximal gradient steps alone.

    β ← prox_h(z − h·φᵀη(φz)), η the slope of the loss and z extrapolated from the last two β (Nesterov's momentum, dropped
    where it points uphill or would raise the objective, so that the objective never rises); 1/h is the largest curvature
    of the loss, from a power iteration on φφᵀ, raised where a step shows it too small. The kernel is never formed.
    ``r``, ``loss`` and ``offset`` are as in ``fit``; ``start`` holds a matrix a block, such as ``fit(...).coefficients``.
    Stops at a stationarity of ``tol``, or after ``max_steps`` with ``converged=False`` and a TangentWarning. A step costs two
    products with φ and two decompositions a block; ill-conditioned problems take thousands.
    Source: Beck & Teboulle, SIAM J. Imaging Sci. 2(1), 2009; restarts: O'Donoghue & Candès, Found. Comput. Math. 15, 2015.

    Raises TangentError for a structure without a proximal operator (``Modes`` with several modes), a ridge that is not
    positive and finite, and targets, labels, offset or start that do not belong to the features.

    >>> import torch, adaptive_tangents as at
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    >>> feats, y = at.tangent_features(model, torch.randn(5, 3)), torch.randn(5, 1)
    >>> found = at.proximal_gradient(feats, y, structure=at.Left(at.Quadratic(1.0)), ridge=5.0)
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
    found, objectives, converged, reason = descent.run(point, tol, max_steps, progress)
    if not converged:
        warnings.warn(f"proximal_gradient did not converge: {reason}", TangentWarning, stacklevel=2)
    return ProximalFit(
        found.coefficients, descent.structure, ridge, found.objective, descent.stationarity(found), converged, reason,
        tuple(objectives),
    )  # fmt: skip


@dataclass(frozen=True)
class _Smooth:
    """A loss of the outputs φβ (n, c), and the largest curvature it can have in any of them."""

    value: Callable[[Tensor], Tensor]
    curvature: float

    def slope(self, outputs: Tensor) -> Tensor:
        with torch.enable_grad():
            at = outputs.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.value(at), at)
        return slope


def _smooth(feats: TangentFeatures, r: Values, loss: str, offset: Values | None, ridge: float) -> _Smooth:
    """The loss that is asked for, after checking what it is of."""
    call, size = "proximal_gradient", (feats.n, feats.c)
    r = as_tensor(call, "targets" if loss == "squared" else "labels", r, feats.device)
    offset = None if offset is None else as_tensor(call, "offset", offset, feats.device)
    if loss == "squared":
        goal = r[:, None] if r.ndim == 1 and feats.c == 1 else r
        if tuple(goal.shape) != size or not goal.is_floating_point() or goal.device != feats.device:
            raise TangentError(
                f"{call}: targets are real and of shape {size} on {feats.device}, got {r.dtype} of shape "
                f"{tuple(r.shape)} on {r.device}"
            )
        if offset is not None:
            raise TangentError(f"{call}: offset is for cross-entropy; for squared error give r = y − f(x;θ₀)")
        check_finite(call, "the target", [goal])
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

    # p(1 − p) of one output is at most ¼, the largest eigenvalue of diag(p) − ppᵀ at most ½.
    return _Smooth(entropy, (0.25 if one else 0.5) / ridge)


def _start(feats: TangentFeatures, start: Matrices | None) -> dict[str, Tensor]:
    like = {"dtype": torch.float64, "device": feats.device}
    wanted = {name: block.shape for name, block in feats.blocks.items()}
    if start is None:
        return {name: torch.zeros(shape, **like) for name, shape in wanted.items()}  # type: ignore[call-overload]
    shapes = {name: tuple(matrix.shape) for name, matrix in start.items()}
    if shapes != wanted:
        raise TangentError(f"proximal_gradient: start has blocks {shapes}, these features have {wanted}")
    if not all(bool(torch.isfinite(matrix).all()) for matrix in start.values()):
        raise TangentError("proximal_gradient: start is not finite")
    return {name: start[name].detach().to(**like) for name in wanted}  # type: ignore[call-overload]


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
        """Of the kernel φφᵀ, from below, without making it."""
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(self.feats.n, self.feats.c, generator=generator, dtype=torch.float64).to(self.feats.device)
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
        return _norm(_plus(self.structure.gradient(point.coefficients), 1.0, slope)) / size if size > 0 else 0.0

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
            # Where the step went against the momentum, there is none in the next.
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
        """A proximal step; about what it leaves of the gradient, and the size of the loss's."""
        slope = self.feats.combine(self.loss.slope(outputs))
        while True:
            found = self.point(self.structure.proximal(_plus(ahead, -1 / self.curvature, slope), 1 / self.curvature))
            length = _norm(_plus(found.coefficients, -1.0, ahead))
            # The outputs' own move tells the curvature met, where differences of the loss would be lost in rounding.
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
