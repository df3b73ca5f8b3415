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
from typing import Literal, get_args, overload

import torch
from jaxtyping import Shaped
from torch import Tensor

from adaptive_tangents.checks import check_choice
from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.features.transforms import is_identity
from adaptive_tangents.kernels.tiles import Kernels
from adaptive_tangents.linalg.kernel_systems import DenseKernel
from adaptive_tangents.runtime.memory import memory_limit, require_memory
from adaptive_tangents.solvers.alternation import Extrapolation, held_coefficients
from adaptive_tangents.solvers.certificates import Record, certified
from adaptive_tangents.solvers.constraints import independent_constraints, smallest_eigenvalue
from adaptive_tangents.solvers.kernel_fit import KernelFit, fit_kernel
from adaptive_tangents.solvers.losses import SquaredError
from adaptive_tangents.solvers.newton import line_search, newton_direction
from adaptive_tangents.solvers.problem import Point, Problem, System
from adaptive_tangents.solvers.results import Fit, Round
from adaptive_tangents.solvers.subspaces import compressed
from adaptive_tangents.solvers.targets import LossName, goal_of
from adaptive_tangents.structures.base import Matrices, Structure, check_sketch
from adaptive_tangents.structures.mixed import as_structure
from adaptive_tangents.structures.spectral import TwoSided

Progress = Callable[[int, float], None]
Solver = Literal["newton", "anderson", "alternation"]
Form = Literal["auto", "dense", "primal", "matrix-free"]

_STAGE = 3.0  # the factor by which τ falls
_LOOSE = 0.02  # the stationarity at which a stage gives way to the next
_MOST_STAGES = 34
_WEAK = 0.7  # a penalty at least this share of ‖β‖² where it starts: nothing much adapts
_STILL = 10  # steps that leave the objective as it is
_PATIENCE = 20  # products with the curvature a system may cost a step before it is made anew,
_SIZE_OF_ONE = 100  # or one for so many rows of a dense one: making it grows as their cube, a product as their square
_DENSE_COPIES = 6  # the system in use, matrix and factor, while the next is made
_ROUNDED_COPIES = 3  # the factor in use, while the next is made


@overload
def fit(
    feats: TangentFeatures, r: Shaped[Tensor, "..."], *,
    structure: Structure | Mapping[str, Structure] | None = None, loss: LossName = "squared",
    offset: Shaped[Tensor, "n c"] | None = None, ridge: float = 0.0, tol: float = 1e-8, max_rounds: int = 200,
    solver: Solver = "newton", form: Form = "auto", start: Fit | None = None, memory_limit: int | None = None,
    progress: Progress | None = None,
) -> Fit: ...  # fmt: skip
@overload
def fit(
    feats: Kernels, r: Shaped[Tensor, "..."], *,
    structure: Structure | Mapping[str, Structure] | None = None, loss: LossName = "squared",
    offset: Shaped[Tensor, "n c"] | None = None, ridge: float = 0.0, tol: float = 1e-8, max_rounds: int = 200,
    solver: Solver = "newton", form: Form = "auto", start: Fit | None = None, memory_limit: int | None = None,
    progress: Progress | None = None,
) -> KernelFit: ...  # fmt: skip
def fit(
    feats: TangentFeatures | Kernels,
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
    memory_limit: int | None = None,
    progress: Progress | None = None,
) -> Fit | KernelFit:
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

    In place of features a kernel will do, a store, a tensor or a mapping of blocks to tensors, for structures whose Ω̃ depends
    on norms of blocks only (``Fixed``, ``Full``, ``LayerScale``), squared error, "newton" or the "alternation": that gives
    a ``KernelFit``. ``memory_limit`` (default: that of the features, or half of what is free) decides the form.
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
    if not isinstance(feats, TangentFeatures):
        _check_for_kernels(loss, offset, start)
        return fit_kernel(
            feats, r, structure=structure, ridge=ridge, tol=tol, max_rounds=max_rounds, solver=solver, form=form,
            memory_limit=memory_limit, progress=progress,
        )  # fmt: skip
    feats = feats if memory_limit is None else replace(feats, limit=memory_limit)
    check_sketch("fit", structure, feats)
    check_choice("solver", solver, get_args(Solver))
    check_choice("form", form, get_args(Form))
    if not tol > 0 or max_rounds < 1:
        raise TangentError(f"fit: tol and max_rounds are positive, got {tol} and {max_rounds}")
    goal = goal_of(feats, r, loss=loss, offset=offset, ridge=ridge)
    doubled = feats.to(torch.float64)
    structure = structure.prepared(doubled)
    within = compressed(doubled, structure)
    chosen, rank = _form(within.features, form, interpolates=goal.interpolates)
    problem = Problem(within.features, structure, goal, chosen, rank)
    began = None if start is None else _of_blocks("start was fitted to", start.coefficients, feats)
    found = _Search(problem, tol, max_rounds, solver, progress).run(None if began is None else within.down(began))
    coefficients, transforms = within.up(found.coefficients), within.up_transforms(found.transforms)
    return replace(found, features=feats, coefficients=coefficients, transforms=transforms)


def certify(
    feats: TangentFeatures,
    r: Shaped[Tensor, "..."],
    coefficients: Matrices,
    *,
    structure: Structure | Mapping[str, Structure] | None = None,
    loss: LossName = "squared",
    offset: Shaped[Tensor, "n c"] | None = None,
    ridge: float = 0.0,
    tol: float = 1e-8,
    form: Form = "auto",
) -> Fit:
    r"""The fit at given coefficients β, from wherever they come, with the best M for them and all certificates.

    Arguments as of ``fit``; ``coefficients`` holds one matrix a block. Nothing is optimised but M: objective Ω̃(β) + loss,
    stationarity, feasibility and lower bound are those of β. ``converged`` says whether the stationarity is below √tol.
    Source: LeJeune & Alemohammad, CPAL 2024, §3.

    Raises TangentError as ``fit`` does, and where the coefficients are of other blocks.

    >>> import torch, adaptive_tangents as at
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> x, r = torch.randn(20, 3), torch.randn(20, 1)
    >>> feats = at.tangent_features(model, x)
    >>> plain = at.fit(feats, r, structure=at.Fixed(), ridge=0.1)
    >>> found = at.certify(feats, r, plain.coefficients, structure=at.TwoSided(at.Quadratic(0.1)), ridge=0.1)
    >>> found.converged, found.objective < plain.objective
    (False, True)
    """
    structure = as_structure(structure) if structure is not None else TwoSided()
    check_sketch("certify", structure, feats)
    check_choice("form", form, get_args(Form))
    goal = goal_of(feats, r, loss=loss, offset=offset, ridge=ridge)
    given = _of_blocks("the coefficients are of", coefficients, feats)
    doubled = feats.to(torch.float64)
    chosen, rank = _form(feats, form, interpolates=goal.interpolates)
    problem = Problem(doubled, structure.prepared(doubled), goal, chosen, rank)
    matrices = {name: matrix.detach().to(feats.device, torch.float64) for name, matrix in given.items()}
    return replace(_Search(problem, tol, 1, "newton", None).examine(matrices), features=feats)


def _check_for_kernels(loss: str, offset: Tensor | None, start: Fit | None) -> None:
    """Raise TangentError for what kernels alone do not allow."""
    for given, what in (
        (loss != "squared", f"loss={loss!r}"),
        (offset is not None, "offset"),
        (start is not None, "start"),
    ):
        if given:
            raise TangentError(
                f"fit: {what} needs features, and this is a kernel; fit to tangent_features(model, x), or leave it out"
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


def _of_blocks(what: str, matrices: Matrices, feats: TangentFeatures) -> dict[str, Tensor]:
    shapes = {name: tuple(matrix.shape) for name, matrix in matrices.items()}
    wanted = {name: block.shape for name, block in feats.blocks.items()}
    if shapes != wanted:
        raise TangentError(f"fit: {what} blocks {shapes}, these features have {wanted}")
    return dict(matrices)


class _Search:
    def __init__(
        self, problem: Problem, tol: float, max_rounds: int, solver: Solver, progress: Progress | None
    ) -> None:
        self.problem, self.tol, self.max_rounds, self.progress = problem, tol, max_rounds, progress
        self.newton, self.memory = solver == "newton", Extrapolation() if solver == "anderson" else None
        dense = problem.feats.n * problem.feats.c if problem.form == "dense" else 0
        self.patience = max(_PATIENCE, dense // _SIZE_OF_ONE)
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
                    found = independent_constraints(kernel, problem.targets, samples=problem.feats.n)
                    self.smallest, kernel.kept = found.smallest_eigenvalue, found.kept
                    problem.kept = found.kept
                    self.dropped = 0 if found.kept is None else len(zeros) - len(found.kept)
                else:
                    ridge = problem.loss.ridge if isinstance(problem.loss, SquaredError) else 0.0
                    self.smallest = smallest_eigenvalue(kernel, ridge=ridge)
        return problem.inverted({}, kernel, zeros)

    def _stages(self, beta: dict[str, Tensor]) -> list[float]:
        """τ = …, 9, 3, 1, from one at which little adapts at these coefficients."""
        whole = sum(float((matrix**2).sum()) for matrix in beta.values())
        stages = [1.0]
        while len(stages) < _MOST_STAGES:
            self.problem.temper = stages[0]
            if self.problem.solution(beta).penalty >= _WEAK * whole:
                break
            stages.insert(0, stages[0] * _STAGE)
        return stages

    def _descend(self, point: Point, system: System, *, last: bool) -> tuple[Point, Tensor, System, bool, str]:
        """Second-order steps to the optimum of this stage, or near it."""
        problem = self.problem
        # The system of the stage before serves on: conjugate gradients need some more products, and tell when it is worn out.
        adapts = bool(system.transforms) or not is_identity(point.solution.transforms)
        products, solved, stale, moved, self.still = 0, False, False, not adapts, 0
        while True:
            if self.still:
                # Outputs tracked through the steps gather rounding, which may look like a lower objective: from here on
                # those of the coefficients, and of the step.
                point = problem.point(point.coefficients, problem.inner(point.coefficients))
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
            if self.still:
                direction = replace(direction, outputs=problem.inner(direction.step))
            before = point
            point, length = line_search(problem, point, direction, reduced)
            gained = (before.objective - point.objective) / max(abs(before.objective), 1e-300)
            self.still = self.still + 1 if gained <= 1e-14 else 0
            products, moved = direction.products, True
            # Where the model was wrong, that is seldom the system's fault: only where no part of its step would do.
            stale = length == 0 or products > self.patience
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
        record = Record(tuple(self.history), self.smallest, system.kernel.jitter, self.dropped)
        found = certified(self.problem, point, alpha, record, converged=converged, reason=reason)
        if not found.converged:
            warnings.warn(f"fit did not converge: {found.reason}", TangentWarning, stacklevel=4)
        return found

    def examine(self, coefficients: dict[str, Tensor]) -> Fit:
        """The fit at given coefficients, with the best transforms for them."""
        problem = self.problem
        system = self._first()
        point = problem.point(coefficients, problem.inner(coefficients))
        system = problem.system(point.solution.transforms, point.outputs)
        reduced = problem.reduce(system, point.solution.gradient, problem.loss.slope(point.outputs))
        alpha = problem.dual(point, reduced)
        stationarity = problem.stationarity(point, alpha)
        self._record(point, stationarity, solved=True)
        record = Record(tuple(self.history), self.smallest, system.kernel.jitter, self.dropped)
        met = stationarity <= math.sqrt(self.tol)
        reason = f"coefficients as given, stationarity {stationarity:.1e} (asked: {math.sqrt(self.tol):.1e})"
        return certified(problem, point, alpha, record, converged=met, reason=reason)
