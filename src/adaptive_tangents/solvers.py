"""fit(): the exact adaptive model, by alternating two closed forms, accelerated and certified (theory §4).

One round: with the transforms M held, the least-norm coefficients are those of kernel regression with the adapted kernel
K_M; with the coefficients held, the best transforms come from one decomposition a block. Both steps lower the same
objective. Between rounds the coefficients are extrapolated (Anderson), and the extrapolation kept only where it lowers
the objective further.
"""

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Shaped
from scipy.optimize import minimize_scalar
from torch import Tensor

from adaptive_tangents.adaptation import KernelChange, kernel_change
from adaptive_tangents.constraints import independent_constraints
from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.features import TangentFeatures
from adaptive_tangents.inputs import check_finite
from adaptive_tangents.losses import SquaredError, factorise
from adaptive_tangents.memory import memory_limit, require_memory
from adaptive_tangents.mixed import as_structure
from adaptive_tangents.spectral import TwoSided
from adaptive_tangents.structures import Solution, Structure
from adaptive_tangents.transforms import Transform, transform_matrices

Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class Round:
    """One round of the alternation: objective Ω̃(β) + loss, relative stationarity residual, seconds since the start."""

    objective: float
    stationarity: float
    accelerated: bool
    seconds: float


@dataclass(frozen=True)
class Fit:
    """A fitted adaptive tangent model with the certificates of its solution.

    ``coefficients`` B and ``transforms`` M per block, ``dual`` α (n, c); ``objective`` is Ω̃(β) + loss; ``feasibility``
    ‖φβ − r‖/‖r‖; ``stationarity`` ‖∇Ω̃(β) − 2φᵀα‖/‖2φᵀα‖; ``lower_bound`` a bound on every model's objective, None where
    the penalty gives none (``lower_bound_reason`` says why). ``smallest_eigenvalue`` and ``jitter`` are of the kernel
    solved with; ``features`` are those fitted. Solved in float64.
    """

    coefficients: Mapping[str, Float[Tensor, "_o _i"]] = field(repr=False)
    transforms: Mapping[str, Transform] = field(repr=False)
    dual: Float[Tensor, "n c"] = field(repr=False)
    structure: Structure
    ridge: float
    objective: float
    feasibility: float
    stationarity: float
    lower_bound: float | None
    lower_bound_reason: str
    converged: bool
    reason: str
    history: tuple[Round, ...] = field(repr=False)
    smallest_eigenvalue: float
    jitter: float
    dropped: int
    features: TangentFeatures = field(repr=False)

    @property
    def rounds(self) -> int:
        """Kernel solves."""
        return len(self.history)

    @property
    def gap(self) -> float | None:
        """(objective − lower bound)/objective, or None where there is no bound."""
        return None if self.lower_bound is None else (self.objective - self.lower_bound) / max(self.objective, 1e-300)

    def transform(self, feats: TangentFeatures) -> TangentFeatures:
        """Adapted features Mφ, TangentFeatures again: their kernel is the adapted kernel K_M."""
        return feats.transformed(self.transforms)

    def predict(self, feats: TangentFeatures) -> Float[Tensor, "m c"]:
        """φβ for features of any samples, in float64; add f(x; θ₀) for the model's output."""
        return feats.to(torch.float64).inner(self.coefficients)

    def kernel_change(self, y: Float[Tensor, "n c"] | None = None, *, keep: bool = False) -> KernelChange:
        """K_M − K₀ on the samples fitted, by block and side, along the targets r, or others y: see ``kernel_change``."""
        # r is the prediction and the residual, ρα.
        y = self.predict(self.features) + self.ridge * self.dual if y is None else y
        return kernel_change(self.features, self.transforms, y, keep=keep)

    def summary(self) -> str:
        """The solution and its certificates, for a person."""
        bound = self.lower_bound_reason if self.lower_bound is None else f"{self.lower_bound:.8g} (gap {self.gap:.1e})"
        task = "interpolation" if self.ridge == 0 else f"ridge {self.ridge:g}"
        lines = [
            f"{self.structure}, {task}: {'converged' if self.converged else 'NOT converged'}, {self.reason}",
            f"  objective     {self.objective:.8g}",
            f"  lower bound   {bound}",
            f"  feasibility   {self.feasibility:.1e}" + ("" if self.ridge == 0 else " (not asked for: ridge)"),
            f"  stationarity  {self.stationarity:.1e}",
            f"  kernel        smallest eigenvalue {self.smallest_eigenvalue:.2e}, jitter {self.jitter:.1e}",
            f"  rounds        {self.rounds} in {self.history[-1].seconds:.2f} s",
        ]
        if self.dropped:
            lines.append(f"  constraints   {self.dropped} follow from the others and were left out")
        return "\n".join(lines)


def fit(
    feats: TangentFeatures,
    r: Shaped[Tensor, "..."],
    *,
    structure: Structure | Mapping[str, Structure] | None = None,
    ridge: float = 0.0,
    tol: float = 1e-8,
    max_rounds: int = 200,
    accelerate: bool = True,
    progress: Progress | None = None,
) -> Fit:
    r"""Fit β and the feature transform M jointly: min over M ∈ 𝓜, θ of ‖θ‖² + Ω(M) subject to φ(x_k)Mᵀθ = r_k.

    ``r`` (n, c), or (n,) where c = 1, holds targets minus f(x;θ₀). ``ridge`` ρ > 0 replaces the constraint by
    (1/ρ)Σ‖r_k − φ(x_k)β‖². A mapping from patterns on block names to structures is a ``Mixed`` one. Stops when the objective
    changes by less than ``tol`` relative and the stationarity residual is below √tol; otherwise after ``max_rounds`` kernel
    solves, with ``converged=False`` and a TangentWarning.
    Source: LeJeune & Alemohammad, CPAL 2024, §3; certificates in docs/architecture.md.

    Raises TangentError for shapes that do not fit, non-finite targets, a negative ρ, constraints that contradict each
    other, or a kernel too large for memory.

    >>> import torch, adaptive_tangents as at
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> x, y = torch.randn(20, 3), torch.randn(20, 1)
    >>> found = at.fit(at.tangent_features(model, x), y, structure=at.TwoSided(at.Quadratic(1.0)), ridge=0.1)
    >>> found.converged
    True
    """
    structure = TwoSided() if structure is None else as_structure(structure)
    loss = SquaredError(ridge)
    if not tol > 0 or max_rounds < 1:
        raise TangentError(f"fit: tol and max_rounds are positive, got {tol} and {max_rounds}")
    targets = _targets(feats, r)
    size = feats.n * feats.c
    require_memory(
        "fit", 4 * 8 * size**2, memory_limit(feats.limit, feats.device),
        remedy=f"fit fewer samples (the kernel is {size} × {size})",
    )  # fmt: skip
    structure = structure.prepared(feats)
    return _Alternation(feats, targets, structure, loss, tol, max_rounds, accelerate, progress).run()


def _targets(feats: TangentFeatures, r: Tensor) -> Tensor:
    given = tuple(r.shape)
    r = r[:, None] if r.ndim == 1 and feats.c == 1 else r
    if tuple(r.shape) != (feats.n, feats.c):
        raise TangentError(
            f"fit: targets have shape {given}, features are of n = {feats.n} samples, c = {feats.c} outputs"
        )
    if r.device != feats.device:
        raise TangentError(f"fit: targets are on {r.device} and features on {feats.device}; move one with .to(device)")
    if not r.is_floating_point():
        raise TangentError(f"fit: targets are {r.dtype}; give real residuals y − f(x;θ₀), e.g. r.double()")
    check_finite("fit", "the target", [r])
    return r.detach().double()


@dataclass(frozen=True)
class _Step:
    """What one kernel solve gives: coefficients, their dual coefficients, and the inner minimum at them."""

    coefficients: dict[str, Tensor]
    alpha: Tensor
    generators: dict[str, Tensor]
    solution: Solution
    objective: float
    jitter: float


class _Alternation:
    def __init__(
        self, feats: TangentFeatures, r: Tensor, structure: Structure, loss: SquaredError, tol: float, max_rounds: int,
        accelerate: bool, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.given, self.feats = feats, feats.to(torch.float64)
        self.structure, self.loss, self.tol = structure, loss, tol
        self.max_rounds, self.progress = max_rounds, progress
        self.r = r.flatten()
        self.scale = float(self.r.norm())
        self.kept: Tensor | None = None
        self.smallest = math.nan
        self.memory = _Extrapolation() if accelerate else None

    def run(self) -> Fit:
        started = time.perf_counter()
        history: list[Round] = []
        transforms: Mapping[str, Transform] = {}
        step: _Step | None = None
        start: dict[str, Tensor] | None = None
        reason, converged, still = "", False, 0
        while not reason:
            previous, step = step, self._step(transforms, first=not history)
            stationarity = self._stationarity(step)
            accelerated = False
            transforms = step.solution.transforms
            change = (
                math.inf if previous is None else abs(previous.objective - step.objective) / max(step.objective, 1e-300)
            )
            if self.scale == 0:
                converged, reason = True, "the targets are zero, and so is the model"
            elif change <= self.tol and stationarity <= math.sqrt(self.tol):
                converged = True
                reason = f"objective changed by {change:.1e} relative, stationarity {stationarity:.1e}"
            elif len(history) + 1 >= self.max_rounds:
                reason = (
                    f"stopped after {self.max_rounds} rounds with the objective changing by {change:.1e} relative (asked: "
                    f"{self.tol:g}) and stationarity {stationarity:.1e} (asked: {math.sqrt(self.tol):.1e}); "
                    "raise max_rounds or tol"
                )
            else:
                still = still + 1 if change <= 1e-14 else 0
                if still >= 10:
                    reason = (
                        f"the objective no longer changes in float64 but stationarity is {stationarity:.1e} (asked: "
                        f"{math.sqrt(self.tol):.1e}): adaptation this strong moves too slowly, or the kernel is "
                        "ill-conditioned; raise tol, use a stronger penalty, or a positive ridge"
                    )
                elif self.memory is not None:
                    better = self._extrapolate(start, step)
                    accelerated = better is not None
                    start, transforms = better or (step.coefficients, transforms)
            history.append(Round(step.objective, stationarity, accelerated, time.perf_counter() - started))
            if self.progress is not None:
                self.progress(len(history), step.objective)
        assert step is not None
        if not converged:
            warnings.warn(f"fit did not converge: {reason}", TangentWarning, stacklevel=3)
        return self._result(step, history, converged, reason)

    def _step(self, transforms: Mapping[str, Transform], *, first: bool) -> _Step:
        adapted = self.feats.transformed(transforms) if transforms else self.feats
        size = self.r.numel()
        kernel = adapted.kernel().reshape(size, size)
        if first:
            self._inspect(kernel)
        kept = self.kept
        factor = factorise(kernel if kept is None else kernel[kept][:, kept], self.loss.ridge)
        if kept is None:
            alpha = factor.solve(self.r)
        else:
            alpha = torch.zeros_like(self.r)
            alpha[kept] = factor.solve(self.r[kept])
        generators = self.feats.combine(alpha.reshape(self.feats.n, self.feats.c))
        coefficients = dict(generators)
        for _ in range(2):
            coefficients = transform_matrices(coefficients, transforms)
        solution = self.structure.solution(coefficients)
        objective = solution.penalty + self.loss.value(self.loss.ridge * alpha)
        return _Step(coefficients, alpha, generators, solution, objective, factor.jitter)

    def _inspect(self, kernel: Tensor) -> None:
        """The smallest eigenvalue of K₀, and which constraints follow from the others."""
        found = independent_constraints(kernel, self.r, samples=self.feats.n, interpolate=self.loss.ridge == 0)
        self.smallest, self.kept = found.smallest_eigenvalue, found.kept

    def _stationarity(self, step: _Step) -> float:
        gap = sum(float(((step.solution.gradient[k] - 2 * g) ** 2).sum()) for k, g in step.generators.items())
        size = sum(float(((2 * g) ** 2).sum()) for g in step.generators.values())
        return math.sqrt(gap / size) if size > 0 else 0.0

    def _extrapolate(
        self, start: dict[str, Tensor] | None, step: _Step
    ) -> tuple[dict[str, Tensor], Mapping[str, Transform]] | None:
        """Coefficients extrapolated from the rounds so far, where they have a lower objective than this round's."""
        assert self.memory is not None
        if start is None:
            return None
        candidate = self.memory.extrapolate(start, step.coefficients)
        if candidate is None:
            return None
        solution = self.structure.solution(candidate)
        objective = solution.penalty
        if self.loss.ridge > 0:
            objective += self.loss.value(self.r - self.feats.inner(candidate).flatten())
        if objective < step.objective:
            return candidate, solution.transforms
        self.memory.forget()
        return None

    def _result(self, step: _Step, history: list[Round], converged: bool, reason: str) -> Fit:
        prediction = self.feats.inner(step.coefficients).flatten()
        feasibility = float((prediction - self.r).norm()) / self.scale if self.scale > 0 else 0.0
        bound, why = self._lower_bound(step)
        return Fit(
            coefficients=step.coefficients,
            transforms=step.solution.transforms,
            dual=step.alpha.reshape(self.feats.n, self.feats.c),
            structure=self.structure,
            ridge=self.loss.ridge,
            objective=step.solution.penalty + self.loss.value(self.r - prediction),
            feasibility=feasibility,
            stationarity=self._stationarity(step),
            lower_bound=bound,
            lower_bound_reason=why,
            converged=converged,
            reason=reason,
            history=tuple(history),
            smallest_eigenvalue=self.smallest,
            jitter=step.jitter,
            dropped=0 if self.kept is None else self.r.numel() - self.kept.numel(),
            features=self.given,
        )

    def _lower_bound(self, step: _Step) -> tuple[float | None, str]:
        """D(a) = loss bound − Ω̃*(Σ a_kΦ(x_k)) at a = 2sα, the scale s searched."""

        def value(s: float) -> float:
            penalty = self.structure.dual({name: 2 * s * g for name, g in step.generators.items()})
            return self.loss.bound(2 * s * step.alpha, self.r) - penalty

        if self.scale == 0:
            return 0.0, "the targets are zero"
        finite, infinite = 0.0, 2.0
        if math.isfinite(value(infinite)):
            finite = infinite
        for _ in range(60):
            middle = (finite + infinite) / 2
            finite, infinite = (middle, infinite) if math.isfinite(value(middle)) else (finite, middle)
        if finite < 1e-9:
            return None, "none: this penalty's dual is infinite away from zero; stationarity alone certifies"
        found = minimize_scalar(lambda s: -value(s), bounds=(0, finite), method="bounded", options={"xatol": 1e-12})
        best = max(v for s in (0.0, float(found.x), min(1.0, finite)) if math.isfinite(v := value(s)))
        return best, "evaluated at the scaled dual coefficients"


class _Extrapolation:
    """Anderson extrapolation of a map B → T(B): the combination of past images, weights adding to one, with the least
    combined residual T(B) − B. Images that meet a linear constraint combine to one that meets it too.
    """

    def __init__(self, depth: int = 10) -> None:
        self.depth = depth
        self.images: list[Tensor] = []
        self.residuals: list[Tensor] = []

    def extrapolate(self, start: dict[str, Tensor], image: dict[str, Tensor]) -> dict[str, Tensor] | None:
        flat = torch.cat([matrix.flatten() for matrix in image.values()])
        residual = flat - torch.cat([start[name].flatten() for name in image])
        self.images = [*self.images, flat][-self.depth :]
        self.residuals = [*self.residuals, residual][-self.depth :]
        if len(self.images) < 2:
            return None
        stack = torch.stack(self.residuals)
        gram = stack @ stack.mT
        gram.diagonal().add_(1e-14 * float(gram.diagonal().max()))
        weights, failed = torch.linalg.solve_ex(gram, torch.ones_like(gram[0]))
        total = float(weights.sum())
        if int(failed) or not math.isfinite(total) or total == 0:  # residuals of zero: nothing moves
            self.forget()
            return None
        mixed = torch.einsum("k,kp->p", weights / total, torch.stack(self.images))
        pieces = torch.split(mixed, [matrix.numel() for matrix in image.values()])
        return {name: piece.reshape(image[name].shape) for name, piece in zip(image, pieces, strict=True)}

    def forget(self) -> None:
        """Start again from the latest round."""
        self.images, self.residuals = self.images[-1:], self.residuals[-1:]
