"""fit(): the exact adaptive model, by second-order steps or the alternation of two closed forms, certified.

With the transforms M held, the least-norm coefficients are those of kernel regression with the adapted kernel K_M; with the
coefficients held, the best transforms come from one decomposition a block. The alternation repeats these two; Newton's
method uses the system in K_M to precondition conjugate gradients on the true curvature instead. Either starts where nothing
adapts and lets adaptation set in by degrees: the penalty τΩ, τ from large to 1, each stage from where the last one ended.
"""

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Shaped
from scipy.optimize import minimize_scalar
from torch import Tensor

from adaptive_tangents.alternation import Extrapolation, held_coefficients
from adaptive_tangents.constraints import independent_constraints, smallest_eigenvalue
from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.features import TangentFeatures
from adaptive_tangents.fits import Fit, Round
from adaptive_tangents.inputs import check_finite
from adaptive_tangents.losses import CrossEntropy, SquaredError
from adaptive_tangents.memory import memory_limit, require_memory
from adaptive_tangents.mixed import as_structure
from adaptive_tangents.model import Point, Problem, System
from adaptive_tangents.newton import line_search, newton_direction
from adaptive_tangents.spectral import TwoSided
from adaptive_tangents.structures import Structure
from adaptive_tangents.subspaces import compressed
from adaptive_tangents.systems import DenseKernel
from adaptive_tangents.transforms import is_identity

Progress = Callable[[int, float], None]
Solver = Literal["newton", "anderson", "alternation"]
Form = Literal["auto", "dense", "primal", "matrix-free"]
LossName = Literal["squared", "cross-entropy"]

_STAGE = 10.0  # the factor by which τ falls
_LOOSE = 0.1  # the stationarity at which a stage gives way to the next
_WEAK = 0.7  # a penalty at least this share of ‖β‖² where it starts: nothing much adapts
_STILL = 10  # steps that leave the objective as it is
_FEASIBLE = 1e-6  # a constraint missed by more, relative, is not met
_SMALLEST_SCALE = 1e-9  # of the dual coefficients, to have a finite bound
_PATIENCE = 20  # products with the curvature a system may cost before it is made anew
_DENSE_COPIES = 6  # the system in use, matrix and factor, while the next is made
_ROUNDED_COPIES = 3  # the factor in use, while the next is made


def fit(
    feats: TangentFeatures,
    r: Shaped[Tensor, "..."],
    *,
    structure: Structure | Mapping[str, Structure] | None = None,
    loss: LossName = "squared",
    offset: Shaped[Tensor, "n c"] | None = None,
    ridge: float = 0.0,
    tol: float = 1e-8,
    max_rounds: int = 200,
    solver: Solver = "newton",
    form: Form = "auto",
    start: Fit | None = None,
    progress: Progress | None = None,
) -> Fit:
    r"""Fit β and the feature transform M jointly: min over M ∈ 𝓜, θ of ‖θ‖² + Ω(M) subject to φ(x_k)Mᵀθ = r_k.

    ``r`` (n, c), or (n,) where c = 1, holds targets minus f(x;θ₀). ``ridge`` ρ > 0 replaces the constraint by
    (1/ρ)Σ‖r_k − φ(x_k)β‖². With ``loss="cross-entropy"``, ``r`` (n,) holds integer labels, ``offset`` (n, c) is f(x;θ₀),
    and the loss is (1/ρ)Σ CE(f(x_k;θ₀) + φ(x_k)β, label_k), ρ > 0; one output is the logistic loss of labels 0 and 1.
    ``structure`` may be a mapping from patterns on block names to structures.

    Stops when the decrease to expect is below ``tol`` relative and the stationarity residual below √tol; otherwise after
    ``max_rounds`` steps, with ``converged=False`` and a TangentWarning. ``solver``: "newton" (structures without a curvature
    fall back on "anderson"), the "alternation", or that extrapolated, "anderson". ``form`` of the linear systems: "dense"
    factorises K_M (nc, nc), "primal" a matrix (p, p), "matrix-free" neither; "auto" the first of them that memory allows.
    ``start`` is a fit of the same features to begin from, as along a path of strengths.
    Source: LeJeune & Alemohammad, CPAL 2024, §3; certificates in docs/architecture.md.

    Raises TangentError for shapes that do not fit, non-finite targets, labels out of range, a negative ρ, patterns that do
    not divide the blocks, constraints that contradict each other, or a kernel too large for memory.

    >>> import torch, adaptive_tangents as at
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> x, y = torch.randn(20, 3), torch.randn(20, 1)
    >>> found = at.fit(at.tangent_features(model, x), y, structure=at.TwoSided(at.Quadratic(1.0)), ridge=0.1)
    >>> found.converged
    True
    """
    structure = as_structure(structure) if structure is not None else TwoSided()
    check_choice("solver", solver, get_args(Solver))
    check_choice("form", form, get_args(Form))
    check_choice("loss", loss, get_args(LossName))
    if not tol > 0 or max_rounds < 1:
        raise TangentError(f"fit: tol and max_rounds are positive, got {tol} and {max_rounds}")
    goal = _cross_entropy(feats, r, offset, ridge) if loss == "cross-entropy" else _squared(feats, r, offset, ridge)
    doubled = feats.to(torch.float64)
    structure = structure.prepared(doubled)
    within = compressed(doubled, structure)
    chosen, rank = _form(within.features, form, interpolates=goal.interpolates)
    problem = Problem(within.features, structure, goal, chosen, rank)
    began = _start(feats, start)
    found = _Search(problem, tol, max_rounds, solver, progress).run(None if began is None else within.down(began))
    coefficients, transforms = within.up(found.coefficients), within.up_transforms(found.transforms)
    return replace(found, features=feats, coefficients=coefficients, transforms=transforms)


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise TangentError for an option that is none of those known."""
    if value not in known:
        raise TangentError(f"fit: {name} is one of {', '.join(known)}, got {value!r}")


def _squared(feats: TangentFeatures, r: Tensor, offset: Tensor | None, ridge: float) -> SquaredError:
    if offset is not None:
        raise TangentError("fit: offset is for cross-entropy; for squared error give r = y − f(x;θ₀)")
    given = tuple(r.shape)
    r = r[:, None] if r.ndim == 1 and feats.c == 1 else r
    if tuple(r.shape) != (feats.n, feats.c):
        raise TangentError(
            f"fit: targets have shape {given}, features are of n = {feats.n} samples, c = {feats.c} outputs"
        )
    _check_device(feats, "targets", r)
    if not r.is_floating_point():
        raise TangentError(f"fit: targets are {r.dtype}; give real residuals y − f(x;θ₀), e.g. r.double()")
    check_finite("fit", "the target", [r])
    return SquaredError(r.detach().double().flatten(), ridge)


def _cross_entropy(feats: TangentFeatures, labels: Tensor, offset: Tensor | None, ridge: float) -> CrossEntropy:
    if offset is None:
        raise TangentError("fit: cross-entropy needs offset = f(x;θ₀), the outputs of the model itself, (n, c)")
    if tuple(offset.shape) != (feats.n, feats.c):
        raise TangentError(
            f"fit: offset has shape {tuple(offset.shape)}, features are of n = {feats.n} samples, c = {feats.c} outputs"
        )
    if tuple(labels.shape) != (feats.n,) or labels.is_floating_point() or labels.is_complex():
        raise TangentError(
            f"fit: cross-entropy takes n = {feats.n} integer labels, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    for name, tensor in (("labels", labels), ("offset", offset)):
        _check_device(feats, name, tensor)
    check_finite("fit", "the offset", [offset])
    classes = max(feats.c, 2)
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten()
    if len(wrong):
        k = int(wrong[0])
        raise TangentError(f"fit: labels are 0..{classes - 1}, sample {k} has {int(labels[k])}")
    return CrossEntropy(labels.long(), offset.detach().double(), ridge)


def _check_device(feats: TangentFeatures, name: str, tensor: Tensor) -> None:
    if tensor.device != feats.device:
        raise TangentError(
            f"fit: {name} are on {tensor.device} and features on {feats.device}; move one with .to(device)"
        )


def _form(feats: TangentFeatures, form: Form, *, interpolates: bool) -> tuple[str, int | None]:
    """How to solve the systems, and the columns that a preconditioner may have; None is all of them, in float32."""
    size, limit = feats.n * feats.c, memory_limit(feats.limit, feats.device)
    p = sum(block.shape[0] * block.shape[1] for block in feats.blocks.values())
    dense, primal = _DENSE_COPIES * 8 * size**2, _DENSE_COPIES * 8 * p * max(p, size)
    rank = (
        None
        if _ROUNDED_COPIES * 4 * size**2 <= limit
        else max(1, min(size // 2, 2000, limit // (_DENSE_COPIES * 8 * size)))
    )
    if form == "primal" and interpolates:
        raise TangentError("fit: the primal form needs a ridge; interpolation is solved in the dual")
    if form == "auto":
        if p < size and not interpolates and primal <= limit:
            return "primal", rank
        return ("dense" if dense <= limit else "matrix-free"), rank
    if form != "matrix-free":
        require_memory(
            "fit", dense if form == "dense" else primal, limit,
            remedy=f"use form='matrix-free', or fewer samples (the kernel is {size} × {size})",
        )  # fmt: skip
    return form, rank


def _start(feats: TangentFeatures, start: Fit | None) -> dict[str, Tensor] | None:
    if start is None:
        return None
    shapes = {name: tuple(matrix.shape) for name, matrix in start.coefficients.items()}
    wanted = {name: block.shape for name, block in feats.blocks.items()}
    if shapes != wanted:
        raise TangentError(f"fit: start was fitted to blocks {shapes}, these features have {wanted}")
    return dict(start.coefficients)


class _Search:
    def __init__(
        self, problem: Problem, tol: float, max_rounds: int, solver: Solver, progress: Progress | None
    ) -> None:
        self.problem, self.tol, self.max_rounds, self.progress = problem, tol, max_rounds, progress
        self.newton, self.memory = solver == "newton", Extrapolation() if solver == "anderson" else None
        self.smallest, self.dropped = math.nan, 0
        self.history: list[Round] = []
        self.started = time.perf_counter()
        self.still = 0

    def run(self, start: dict[str, Tensor] | None) -> Fit:
        """From where nothing adapts, or a start, to the optimum of τ = 1."""
        problem, loss = self.problem, self.problem.loss
        system = self._first()
        blocks = problem.feats.blocks
        like = {
            name: torch.zeros(b.shape, dtype=torch.float64, device=problem.feats.device) for name, b in blocks.items()
        }
        beta = like if start is None else {name: matrix.to(like[name]) for name, matrix in start.items()}
        outputs = problem.inner(beta)
        if isinstance(loss, SquaredError) and not bool(loss.targets.any()):
            point = problem.point(like, torch.zeros_like(outputs))
            self._record(point, 0.0, solved=True)
            return self._result(
                point, torch.zeros_like(outputs), system, True, "the targets are zero, and so is the model"
            )
        if start is None:
            beta, outputs, system = held_coefficients(problem, system, outputs)
        else:
            beta, outputs = problem.restored(system, beta, outputs)
        problem.temper, stages = 1.0, [1.0]
        point = problem.point(beta, outputs)
        if self.newton and point.solution.curvature is None:
            self.newton, self.memory = False, Extrapolation()
        if not self.newton:
            point, alpha, system, converged, reason = self._alternate(point, system)
            return self._result(point, alpha, system, converged, reason)
        problem.temper = math.inf
        self._record(problem.point(beta, outputs), 0.0 if start is None else math.nan, solved=True)
        stages = self._stages(beta) if start is None else [1.0]
        for temper in stages:
            problem.temper = temper
            point = problem.point(point.coefficients, point.outputs)
            point, alpha, system, converged, reason = self._descend(point, system, last=temper == 1.0)
            if reason:
                break
        if problem.temper != 1.0:  # out of rounds before all of the adaptation had set in
            problem.temper = 1.0
            point = problem.point(point.coefficients, point.outputs)
        return self._result(point, alpha, system, converged, reason)

    def _first(self) -> System:
        """The system of K₀, after looking at which constraints are independent."""
        problem = self.problem
        zeros = torch.zeros(problem.feats.n * problem.feats.c, dtype=torch.float64, device=problem.feats.device)
        with problem.timed("kernels"):
            kernel = problem.kernel({})
        if isinstance(kernel, DenseKernel):
            with problem.timed("constraints"):
                if problem.loss.interpolates:
                    found = independent_constraints(kernel.matrix, problem.targets, samples=problem.feats.n)
                    self.smallest, kernel.kept = found.smallest_eigenvalue, found.kept
                    problem.kept = found.kept
                    self.dropped = 0 if found.kept is None else len(zeros) - len(found.kept)
                else:
                    self.smallest = smallest_eigenvalue(kernel.matrix)
        return problem.inverted({}, kernel, zeros)

    def _stages(self, beta: dict[str, Tensor]) -> list[float]:
        """τ = …, 100, 10, 1, from one at which little adapts at these coefficients."""
        whole = sum(float((matrix**2).sum()) for matrix in beta.values())
        stages = [1.0]
        while len(stages) < 16:
            self.problem.temper = stages[0]
            if self.problem.solution(beta).penalty >= _WEAK * whole:
                break
            stages.insert(0, stages[0] * _STAGE)
        return stages

    def _descend(self, point: Point, system: System, *, last: bool) -> tuple[Point, Tensor, System, bool, str]:
        """Second-order steps to the optimum of this stage, or near it."""
        problem = self.problem
        stale = bool(system.transforms) or not is_identity(point.solution.transforms)
        products, solved, moved, self.still = 0, False, not stale, 0
        while True:
            if stale:
                system = problem.system(point.solution.transforms, point.outputs)
                solved = True
            elif system.root is not None:
                system = problem.inverted(system.transforms, system.kernel, point.outputs)
            beta, outputs = problem.restored(system, point.coefficients, point.outputs)
            if beta is not point.coefficients:
                point = problem.point(beta, outputs)
            reduced = problem.reduce(system, point.solution.gradient, problem.loss.slope(point.outputs))
            alpha = problem.dual(point, reduced)
            stationarity = problem.stationarity(point, alpha)
            self._record(point, stationarity, solved=solved, products=products)
            change = reduced.size / 2 / max(abs(point.objective), 1e-300)
            # One step at least where anything adapts: it costs little, and its error is the square of what it finds.
            if last:
                stopped = self._stopped(change if moved else math.inf, stationarity)
                if stopped is not None:
                    return point, alpha, system, *stopped
            elif len(self.history) > self.max_rounds:
                return point, alpha, system, False, self._out(change, stationarity)
            elif stationarity <= _LOOSE or self.still >= _STILL:
                return point, alpha, system, False, ""
            direction = newton_direction(problem, system, point, reduced, stationarity)
            before = point
            point, length = line_search(problem, point, direction, reduced)
            gained = (before.objective - point.objective) / max(abs(before.objective), 1e-300)
            self.still = self.still + 1 if gained <= 1e-14 else 0
            products, moved = direction.products, True
            stale = length < 1 or direction.truncated or products > _PATIENCE
            solved = False

    def _alternate(self, point: Point, system: System) -> tuple[Point, Tensor, System, bool, str]:
        """Rounds of the two closed forms, extrapolated where that lowers the objective further."""
        problem = self.problem
        start, transforms, accelerated, previous = None, dict(system.transforms), False, math.inf
        while True:
            if start is not None:
                system = problem.system(transforms, point.outputs)
                beta, outputs, system = held_coefficients(problem, system, point.outputs)
                point = problem.point(beta, outputs)
            slope = problem.loss.slope(point.outputs)
            if problem.loss.interpolates:
                reduced = problem.reduce(system, point.solution.gradient, slope)
                alpha = problem.dual(point, reduced)
            else:
                alpha = -slope / 2
            stationarity = problem.stationarity(point, alpha)
            self._record(point, stationarity, solved=True, accelerated=accelerated)
            change = abs(previous - point.objective) / max(abs(point.objective), 1e-300)
            self.still = self.still + 1 if change <= 1e-14 else 0
            stopped = self._stopped(change, stationarity)
            if stopped is not None:
                return point, alpha, system, *stopped
            previous, transforms, found = point.objective, dict(point.solution.transforms), None
            if self.memory is not None and start is not None:
                found = self.memory.better(problem, start, point)
            accelerated = found is not None
            start = point.coefficients if found is None else found.coefficients
            transforms = transforms if found is None else dict(found.solution.transforms)

    def _stopped(self, change: float, stationarity: float) -> tuple[bool, str] | None:
        """Whether to stop: with success, and why."""
        if change <= self.tol and stationarity <= math.sqrt(self.tol):
            return True, f"objective changing by {change:.1e} relative, stationarity {stationarity:.1e}"
        if len(self.history) > self.max_rounds:
            return False, self._out(change, stationarity)
        if self.still >= _STILL:
            return False, (
                f"the objective no longer changes in float64 but stationarity is {stationarity:.1e} (asked: "
                f"{math.sqrt(self.tol):.1e}): adaptation this strong moves too slowly, or the kernel is "
                "ill-conditioned; raise tol, use a stronger penalty, or a positive ridge"
            )
        return None

    def _out(self, change: float, stationarity: float) -> str:
        return (
            f"stopped after {self.max_rounds} rounds with the objective changing by {change:.1e} relative (asked: "
            f"{self.tol:g}) and stationarity {stationarity:.1e} (asked: {math.sqrt(self.tol):.1e}); raise max_rounds or tol"
        )

    def _record(
        self, point: Point, stationarity: float, *, solved: bool, products: int = 0, accelerated: bool = False
    ) -> None:
        seconds, temper = time.perf_counter() - self.started, self.problem.temper
        self.history.append(Round(point.objective, stationarity, seconds, temper, solved, products, accelerated))
        if self.progress is not None:
            self.progress(len(self.history), point.objective)

    def _result(self, point: Point, alpha: Tensor, system: System, converged: bool, reason: str) -> Fit:
        problem, loss = self.problem, self.problem.loss
        n, c = problem.feats.n, problem.feats.c
        squared = isinstance(loss, SquaredError)
        outputs = problem.inner(point.coefficients)
        feasibility = None
        if squared:
            size = float(problem.targets.norm())
            feasibility = float((outputs - problem.targets).norm()) / size if size > 0 else 0.0
        if converged and loss.interpolates and feasibility is not None and feasibility > _FEASIBLE:
            converged = False
            reason = (
                f"the targets are missed by {feasibility:.1e} relative: the kernel is too ill-conditioned for the "
                f"{problem.form} form; use form='dense' or a positive ridge"
            )
        bound, why = lower_bound(problem, alpha)
        if not converged:
            warnings.warn(f"fit did not converge: {reason}", TangentWarning, stacklevel=4)
        return Fit(
            coefficients=point.coefficients, transforms=point.solution.transforms, dual=alpha.reshape(n, c),
            structure=problem.structure, loss="squared error" if squared else "cross-entropy", ridge=loss.ridge,
            objective=point.solution.penalty + loss.value(outputs), feasibility=feasibility,
            stationarity=problem.stationarity(point, alpha), lower_bound=bound, lower_bound_reason=why,
            converged=converged, reason=reason, history=tuple(self.history), smallest_eigenvalue=self.smallest,
            jitter=system.kernel.jitter, dropped=self.dropped, form=problem.form, timings=dict(problem.timings),
            features=problem.feats, targets=problem.targets.reshape(n, c) if squared else None,
        )  # fmt: skip


def lower_bound(problem: Problem, alpha: Tensor) -> tuple[float | None, str]:
    """D(a), the loss's bound less Ω̃*(Σ a_kΦ(x_k)), at a = 2sα, the scale s searched; None where no s > 0 gives one."""
    generators = problem.combine(alpha)

    def value(s: float) -> float:
        penalty = problem.structure.dual({name: 2 * s * g for name, g in generators.items()})
        return problem.loss.bound(2 * s * alpha) - penalty

    if not bool(alpha.any()):
        return value(0.0), "the targets are zero"
    finite, infinite = _SMALLEST_SCALE, 2.0
    if not math.isfinite(value(finite)):
        return None, "none: this penalty's dual is infinite away from zero; stationarity alone certifies"
    if math.isfinite(value(infinite)):
        finite = infinite
    while infinite - finite > 1e-15 * infinite:
        middle = (finite + infinite) / 2
        finite, infinite = (middle, infinite) if math.isfinite(value(middle)) else (finite, middle)
    found = minimize_scalar(lambda s: -value(s), bounds=(0, finite), method="bounded", options={"xatol": 1e-12})
    best = max(v for s in (0.0, float(found.x), min(1.0, finite)) if math.isfinite(v := value(s)))
    return best, "evaluated at the scaled dual coefficients"
