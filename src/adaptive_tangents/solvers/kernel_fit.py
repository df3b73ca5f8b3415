"""``fit`` on kernels alone, in memory or on disk: the factors q_ℓ of blocks, found by Newton's method and certified.

At the optimum half the slope of ω̃ at ‖B_ℓ‖ is √κ_ℓ, κ_ℓ = αᵀK_ℓα (see ``kernel_model``). Newton's method is run on these
equations, where its step lowers the objective; the alternation's, which cannot raise it, is taken otherwise.
"""

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from adaptive_tangents.checks import check_choice
from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.kernels.operators import KernelOperator
from adaptive_tangents.kernels.regression import Form, check_solver, is_dense, residual_targets
from adaptive_tangents.kernels.tiles import Cached, Kernels, Request, StoredKernel, Sum, Tiled, blocks_of, tiled
from adaptive_tangents.runtime.memory import memory_limit as limit_of
from adaptive_tangents.solvers.certificates import FEASIBLE, lower_bound
from adaptive_tangents.solvers.kernel_problem import KernelProblem, Norms, State, slopes
from adaptive_tangents.solvers.losses import SquaredError
from adaptive_tangents.solvers.results import Round
from adaptive_tangents.structures.base import Structure

Solver = Literal["newton", "alternation"]
Progress = Callable[[int, float], None]

_STAGE, _LOOSE, _WEAK, _MOST_STAGES = 3.0, 0.02, 0.7, 34  # as in ``solvers``
_COPIES = 6  # the system in use, matrix and factor, while the next is made
_STILL = 10  # steps that leave the objective as it is


@dataclass(frozen=True)
class KernelFit:
    """A model fitted to kernels alone, with the certificates of a ``Fit``; made by ``fit`` on a store or on tensors.

    ``dual`` α (n, c) and ``gains`` z_ℓ of each block, "" where blocks are not told apart: B_ℓ = z_ℓ²φ_ℓᵀα; ``norms`` ‖B_ℓ‖,
    of blocks that move together under the first of their names. ``residual`` is that of the last linear system; the rest is
    as in ``Fit``.
    """

    dual: Float[Tensor, "n c"] = field(repr=False)
    gains: Mapping[str, float]
    norms: Mapping[str, float]
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
    form: str
    residual: float

    @property
    def rounds(self) -> int:
        """Kernel solves: how often a system was made and factorised, or preconditioned."""
        return sum(entry.solved for entry in self.history)

    @property
    def gap(self) -> float | None:
        """(objective − lower bound)/objective, or None where there is no bound."""
        return None if self.lower_bound is None else (self.objective - self.lower_bound) / max(self.objective, 1e-300)

    def predict(self, K: Kernels) -> Float[Tensor, "m c"]:
        """φβ = Σ_ℓ z_ℓ² K_ℓ(x, x_train) α at other samples, in float64; add f(x; θ₀) for the model's output.

        ``K`` holds the kernels of those samples with the training samples, in this order and by block where the fit was:
        ``tangent_kernel(model, x, x_train, by_block=True)``, or a store of it. Raises TangentError for others.
        """
        request = Request("predict", rectangular=True)
        parts = {"": tiled(request, K)} if set(self.gains) == {""} else blocks_of(request, K)
        if set(parts) != set(self.gains):
            raise TangentError(
                f"predict: the kernels are of blocks {list(parts)}, the fit was of {list(self.gains)}; make them by block"
            )
        whole = Sum(list(parts.values()), [self.gains[name] ** 2 for name in parts])
        if (whole.m, whole.width) != tuple(self.dual.shape):
            raise TangentError(
                f"predict: the kernel is of {whole.n} samples with {whole.m} others, c = {whole.width}; the fit was of "
                f"n = {len(self.dual)} samples, c = {self.dual.shape[1]}: give the kernel of new samples with those"
            )
        return KernelOperator(whole).apply(self.dual.flatten()).reshape(whole.n, -1)


def fit_kernel(
    K: Kernels,
    r: Shaped[Tensor, "..."],
    *,
    structure: Structure,
    ridge: float,
    tol: float,
    max_rounds: int,
    solver: str,
    form: str,
    memory_limit: int | None,
    progress: Progress | None,
) -> KernelFit:
    """``fit`` on kernels."""
    call = "fit"
    check_choice("solver", solver, get_args(Solver))
    check_choice("form", form, get_args(Form))
    check_solver(call, ridge, form, tol, max_rounds)
    groups, members = _groups(K, structure)
    first = next(iter(groups.values()))
    targets = residual_targets(call, r, first)
    if not first.full and targets.shape[1] > 1:
        raise TangentError(
            f"fit: targets have c = {targets.shape[1]} outputs and the kernel is (n, n); use one made with outputs='full'"
        )
    room = limit_of(memory_limit, first.device)
    dense = is_dense(call, first, form, room, copies=_COPIES)
    share = room // (4 * len(groups)) if dense else room // (2 * len(groups))
    held = {name: Cached(part, share) for name, part in groups.items()}
    means = {name: math.sqrt(float(part.diagonal().mean())) or 1.0 for name, part in held.items()}
    loss = SquaredError(targets.flatten(), ridge)
    problem = KernelProblem(held, structure.with_scales(means), loss, dense, room // 4)
    found = _Search(problem, tol, max_rounds, solver == "newton", progress).run()
    if not found.converged:
        warnings.warn(f"fit did not converge: {found.reason}", TangentWarning, stacklevel=4)
    return _renamed(found, members)


def _renamed(found: KernelFit, members: Mapping[str, tuple[str, ...]]) -> KernelFit:
    """With the gain of every block, of those that move together too."""
    return replace(found, gains={name: found.gains[group] for group, names in members.items() for name in names})


def _groups(K: Kernels, structure: Structure) -> tuple[dict[str, Tiled], dict[str, tuple[str, ...]]]:
    """The kernels whose coefficients' norms the structure depends on, and the blocks in each."""
    request = Request("fit")
    store = getattr(K, "kernel", K)
    store = getattr(store, "store", store)
    if isinstance(store, StoredKernel) and store.outputs == "trace" and store.c > 1:
        raise TangentError(
            f"fit: the store holds the trace of the kernel over c = {store.c} outputs, which is not the kernel of the model; "
            "make it with outputs='full'"
        )
    blocks = blocks_of(request, K)
    found = structure.norms_of(tuple(blocks))
    if found is None:
        raise TangentError(
            f"fit: {structure} transforms features in ways that kernels do not show; fit it to tangent_features(model, x), "
            "or use Fixed, Full or LayerScale"
        )
    if not found:
        raise TangentError(
            f"fit: {structure} needs the kernel of every block; make the store with by_block=True, or give a mapping of "
            "block names to kernels"
        )
    if not blocks:
        return {name: tiled(request, K) for name in found}, dict.fromkeys(found, ("",))
    return {name: Sum([blocks[block] for block in names]) for name, names in found.items()}, found


class _Search:
    def __init__(
        self, problem: KernelProblem, tol: float, max_rounds: int, newton: bool, progress: Progress | None
    ) -> None:
        self.problem, self.tol, self.max_rounds, self.newton, self.progress = problem, tol, max_rounds, newton, progress
        self.history: list[Round] = []
        self.started = time.perf_counter()

    def run(self) -> KernelFit:
        """From where nothing adapts to the optimum of τ = 1."""
        problem, zeros = self.problem, self.problem.like
        if not bool(problem.loss.targets.any()):
            nothing = torch.zeros_like(problem.loss.targets)
            aim = problem.solution(zeros)
            state = State(zeros, aim, zeros + 1, nothing, problem.products(nothing), lambda x: x, 0.0, 0, aim, 0.0)
            self._record(state, solved=False)
            return self._result(state, True, "the targets are zero, and so is the model")
        problem.temper = math.inf
        state = problem.state(zeros)
        self._record(state, solved=True)
        for temper in self._stages(state.norms):
            problem.temper = temper
            state, converged, reason = self._descend(state, last=temper == 1.0)
            if reason:
                break
        if problem.temper != 1.0:  # out of rounds before all of the adaptation had set in
            problem.temper = 1.0
            state = problem.state(state.norms)
        return self._result(state, converged, reason)

    def _stages(self, norms: Norms) -> list[float]:
        """τ = …, 9, 3, 1, from one at which little adapts at these norms."""
        stages, whole = [1.0], float((norms**2).sum())
        while len(stages) < _MOST_STAGES:
            self.problem.temper = stages[0]
            if self.problem.solution(norms).penalty >= _WEAK * whole:
                break
            stages.insert(0, stages[0] * _STAGE)
        return stages

    def _descend(self, state: State, *, last: bool) -> tuple[State, bool, str]:
        """Steps to the optimum of this stage, or near it; the reason to stop is empty where the next stage is to go on."""
        state = self.problem.state(state.norms)  # the alternation's step
        self._record(state, solved=True)
        change, still = math.inf, 0
        while True:
            if not last and (state.stationarity <= _LOOSE or still >= _STILL):
                return state, False, ""
            reason = self._stopped(change, state.stationarity, still, last=last)
            if reason is not None:
                return state, *reason
            before, state = state, self._step(state)
            change = abs(before.objective - state.objective) / max(abs(state.objective), 1e-300)
            still = still + 1 if change <= 1e-14 else 0

    def _stopped(self, change: float, stationarity: float, still: int, *, last: bool) -> tuple[bool, str] | None:
        """Whether to stop: with success, and why."""
        asked = math.sqrt(self.tol)
        if last and change <= self.tol and stationarity <= asked:
            return True, f"objective changing by {change:.1e} relative, stationarity {stationarity:.1e}"
        if len(self.history) > self.max_rounds:
            return False, (
                f"stopped after {self.max_rounds} rounds with the objective changing by {change:.1e} relative (asked: "
                f"{self.tol:g}) and stationarity {stationarity:.1e} (asked: {asked:.1e}); raise max_rounds or tol"
            )
        if still >= _STILL:
            return False, (
                f"the objective no longer changes but stationarity is {stationarity:.1e} (asked: {asked:.1e}): the kernel is "
                "ill-conditioned; use a positive ridge, a stronger penalty, or raise tol"
            )
        return None

    def _step(self, state: State) -> State:
        """Newton's step where it lowers the objective, else the alternation's."""
        slack = 1e-13 * abs(state.objective)
        moved = self._newton(state) if self.newton else None
        length = 1.0
        while moved is not None and length > 0.1:
            planned = (state.planned + length * moved).clamp_min(0)
            found = self.problem.state(planned)
            self._record(found, solved=True)
            if found.objective <= state.objective + slack:
                return found
            length /= 4
        found = self.problem.state(state.norms)
        self._record(found, solved=True)
        return found if found.objective <= state.objective + slack else state

    def _newton(self, state: State) -> Norms | None:
        """The step of the norms v that solves ω̃′(v)/2 = √κ to first order."""
        problem = self.problem
        bend = problem.bends(state.aim)
        if bend is None:
            return None
        v, q, root = state.planned, state.weights, state.kappa.sqrt()
        # q = 2v/ω̃′, so that dq/dv = q(2 − qω̃″)/(2v), and dκ_ℓ/dq_j = −2 (K_ℓα)ᵀ(K + ρI)⁻¹(K_jα).
        gain = torch.where(v > 0, q * (2 - q * bend) / (2 * v), 0.0)
        across = state.images @ state.solve(state.images.mT)
        jacobian = torch.diag(bend / 2) + across / root.clamp_min(1e-300)[:, None] * gain
        step, failed = torch.linalg.solve_ex(jacobian, root - slopes(state.aim) / 2)
        usable = not int(failed) and bool(torch.isfinite(step).all())
        return step if usable else None

    def _record(self, state: State, *, solved: bool) -> None:
        seconds, temper = time.perf_counter() - self.started, self.problem.temper
        self.history.append(Round(state.objective, state.stationarity, seconds, temper, solved, state.steps))
        if self.progress is not None:
            self.progress(len(self.history), state.objective)

    def _result(self, state: State, converged: bool, reason: str) -> KernelFit:
        problem, loss = self.problem, self.problem.loss
        # The dual coefficients that the loss itself gives, as α may not solve its system exactly.
        dual = state.alpha if loss.interpolates else -loss.slope(state.outputs) / 2
        images = state.images if loss.interpolates else problem.products(dual)
        sizes = (images @ dual).clamp_min(0).sqrt()
        ratio = torch.where(state.kappa > 0, state.slopes / state.kappa.sqrt().clamp_min(1e-300), 0.0)
        # ∇Ω̃(β) − 2φᵀα has the block φ_ℓᵀe_ℓ of norm √(e_ℓᵀK_ℓe_ℓ).
        errors = ratio[:, None] * state.alpha - 2 * dual
        gap = float(((errors * (ratio[:, None] * state.images - 2 * images)).sum(1).clamp_min(0)).sum().sqrt())
        size = float(2 * sizes.norm())
        stationarity = gap / size if size > 0 else 0.0
        feasibility = float((state.outputs - loss.targets).norm()) / (float(loss.targets.norm()) or 1.0)
        if converged and loss.interpolates and feasibility > FEASIBLE:
            converged, reason = (
                False,
                (
                    f"the targets are missed by {feasibility:.1e} relative: the kernel is too ill-conditioned for the "
                    f"{'dense' if problem.dense else 'matrix-free'} form; use a positive ridge"
                ),
            )
        generators = {name: s.reshape(1, 1) for name, s in zip(problem.parts, sizes, strict=True)}
        bound, why = lower_bound(problem.structure, loss, generators, dual)
        first = next(iter(problem.parts.values()))
        return KernelFit(
            dual=state.alpha.reshape(first.n, -1),
            gains={name: math.sqrt(float(q)) for name, q in zip(problem.parts, state.weights, strict=True)},
            norms={name: float(v) for name, v in zip(problem.parts, state.norms, strict=True)},
            structure=problem.structure, ridge=loss.ridge, objective=state.objective, feasibility=feasibility,
            stationarity=stationarity, lower_bound=bound, lower_bound_reason=why, converged=converged, reason=reason,
            history=tuple(self.history), smallest_eigenvalue=problem.smallest, jitter=problem.jitter,
            dropped=problem.dropped, form="dense" if problem.dense else "matrix-free", residual=state.residual,
        )  # fmt: skip
