"""``fit`` on kernels alone, in memory or on disk: Newton's method for the factors q_ℓ of blocks, with certificates.

At the optimum ω̃′(‖B_ℓ‖)/2 = √κ_ℓ, κ_ℓ = αᵀK_ℓα (see ``kernel_problem``). Newton's method solves these equations. If its step
does not lower the objective, the alternation's step replaces it, which cannot raise the objective.
"""

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch

from adaptive_tangents.checks import Values, check_choice
from adaptive_tangents.errors import TangentError
from adaptive_tangents.kernels.derived_kernels import check_symmetric, largest
from adaptive_tangents.kernels.products import cache_shares
from adaptive_tangents.kernels.regression import KernelForm, is_dense, residual_targets
from adaptive_tangents.kernels.tiles import Cached, Kernels, Request, StoredKernel, Sum, Tiled, blocks_of, tiled
from adaptive_tangents.runtime.memory import limit_for
from adaptive_tangents.solvers.certificates import certificates
from adaptive_tangents.solvers.continuation import ZERO_TARGETS, Continuation, Course, stages
from adaptive_tangents.solvers.kernel_problem import KernelProblem, Norms, State, slopes
from adaptive_tangents.solvers.losses import SquaredError
from adaptive_tangents.solvers.problem import relative
from adaptive_tangents.solvers.results import KernelFit
from adaptive_tangents.solvers.targets import check_moderate
from adaptive_tangents.structures.base import Structure

KernelSolver = Literal["newton", "alternation"]

_COPIES = 6  # matrix and factor of the current system and of the next


def fit_kernel(
    K: Kernels,
    r: Values,
    course: Course,
    *,
    structure: Structure,
    ridge: float,
    solver: str,
    form: str,
    memory_limit: int | None,
) -> KernelFit:
    """``fit`` on kernels."""
    call = "fit"
    check_choice(call, "solver", solver, get_args(KernelSolver))
    check_choice(call, "form", form, get_args(KernelForm))
    groups, members = _groups(K, structure)
    first = next(iter(groups.values()))
    targets = residual_targets(call, r, first)
    loss = SquaredError(targets.flatten(), ridge)
    if not first.full and targets.shape[1] > 1:
        raise TangentError(
            f"fit: targets have c = {targets.shape[1]} outputs and the kernel is (n, n); use one made with outputs='full'"
        )
    room = limit_for(memory_limit, first.device)
    dense = is_dense(call, first, form, room, copies=_COPIES)
    share, summed = cache_shares(groups.values(), room // 4 if dense else room // 2, dense=dense)
    for part in groups.values():
        check_symmetric(call, part)
    size = math.sqrt(max(largest(part.diagonal()) for part in groups.values()))
    check_moderate(call, size, targets)
    if size == 0 and ridge == 0 and not loss.trivial:
        raise TangentError(
            f"{call}: the kernel is zero, which interpolates zero targets only; scale it, or use a ridge"
        )
    held = {name: Cached(part, share) for name, part in groups.items()}
    means = {name: math.sqrt(float(part.diagonal().mean())) or 1.0 for name, part in held.items()}
    form = "dense" if dense else "matrix-free"
    problem = KernelProblem(held, structure.with_scales(means), loss, form, room // 4, summed)
    search = _Search(problem, course, newton=solver == "newton")
    converged, reason = search.run()
    return _certified(problem, course, search.state, members, converged=converged, reason=reason)


def _certified(
    problem: KernelProblem,
    course: Course,
    state: State,
    members: Mapping[str, tuple[str, ...]],
    *,
    converged: bool,
    reason: str,
) -> KernelFit:
    """The ``KernelFit`` at a state, with all certificates, and the gain of every block, including blocks of a group."""
    loss = problem.loss
    # α may not solve its system exactly, so take the dual coefficients from the loss.
    dual = state.alpha if loss.interpolates else -loss.slope(state.outputs) / 2
    images = state.images if loss.interpolates else problem.products(dual)
    sizes = (images @ dual).clamp_min(0).sqrt()
    ratio = torch.where(state.kappa > 0, state.slopes / state.kappa.sqrt().clamp_min(1e-300), 0.0)
    # ∇Ω̃(β) − 2φᵀα has blocks φ_ℓᵀe_ℓ of norm √(e_ℓᵀK_ℓe_ℓ).
    errors = ratio[:, None] * state.alpha - 2 * dual
    gap = float((errors * (ratio[:, None] * state.images - 2 * images)).sum(1).clamp_min(0).sum().sqrt())
    size = float(2 * sizes.norm())
    found = certificates(
        problem,
        course,
        state.outputs,
        dual,
        problem.matrices(sizes),
        relative(gap, size),
        problem.jitter,
        converged=converged,
        reason=reason,
    )
    gains = {name: math.sqrt(float(q)) for name, q in zip(problem.parts, state.weights, strict=True)}
    return KernelFit(**found | {
        "dual": state.alpha.reshape(problem.n, -1), "objective": state.objective,
        "residual": state.residual,
        "gains": {name: gains[group] for group, names in members.items() for name in names},
        "norms": {name: float(v) for name, v in zip(problem.parts, state.norms, strict=True)},
    })  # fmt: skip


def _groups(K: Kernels, structure: Structure) -> tuple[dict[str, Tiled], dict[str, tuple[str, ...]]]:
    """The kernels of the groups of blocks whose norms Ω̃ depends on, and the blocks in each group."""
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
            f"fit: {structure} depends on more than norms of blocks, and kernels give no more; fit it to "
            "tangent_features(model, x), or use Fixed, Full or LayerScale"
        )
    if not found:
        raise TangentError(
            f"fit: {structure} needs the kernel of every block; make the store with by_block=True, or give a mapping of "
            "block names to kernels"
        )
    if not blocks:
        return {name: tiled(request, K) for name in found}, dict.fromkeys(found, ("",))
    return {name: Sum([blocks[block] for block in names]) for name, names in found.items()}, found


class _Search(Continuation):
    """The search for the norms v of blocks, from stage to stage."""

    def __init__(self, problem: KernelProblem, course: Course, *, newton: bool) -> None:
        super().__init__(problem, course)
        self.problem, self.newton = problem, newton
        self.state: State

    def run(self) -> tuple[bool, str]:
        """Start where nothing adapts; returns whether the optimum at τ = 1 was reached, and why the search stopped."""
        problem = self.problem
        if problem.loss.trivial:
            self.state = problem.nothing()
            self._record(self.state, solved=False)
            return True, ZERO_TARGETS
        problem.temper = math.inf
        self.state = problem.state(problem.like)
        self._record(self.state)
        return self.follow(stages(problem, problem.matrices(self.state.norms)))

    def enter(self) -> None:
        self.state = self.problem.state(self.state.norms)  # the alternation's step

    def begin(self) -> None:
        self._record(self.state)

    def measure(self) -> tuple[float, float]:
        return self.gained, self.state.stationarity

    def step(self) -> float:
        """Newton's step if it lowers the objective, else the alternation's."""
        before, slack = self.state, 1e-13 * abs(self.state.objective)
        moved = self._newton() if self.newton else None
        tried = [] if moved is None else [before.planned + length * moved for length in (1.0, 0.25)]
        for planned in (*tried, before.norms):
            found = self.problem.state(planned.clamp_min(0))
            self._record(found)
            if found.objective <= before.objective + slack:
                self.state = found
                break
        return abs(before.objective - self.state.objective) / max(abs(self.state.objective), 1e-300)

    def _newton(self) -> Norms | None:
        """The step of the norms v that solves ω̃′(v)/2 = √κ to first order."""
        state = self.state
        bend = self.problem.bends(state.aim)
        if bend is None:
            return None
        v, q, root = state.planned, state.weights, state.kappa.sqrt()
        # q = 2v/ω̃′, so dq/dv = q(2 − qω̃″)/(2v), and dκ_ℓ/dq_j = −2 (K_ℓα)ᵀ(K + ρI)⁻¹(K_jα).
        gain = torch.where(v > 0, q * (2 - q * bend) / (2 * v), 0.0)
        across = state.images @ state.solve(state.images.mT)
        jacobian = torch.diag(bend / 2) + across / root.clamp_min(1e-300)[:, None] * gain
        step, failed = torch.linalg.solve_ex(jacobian, root - slopes(state.aim) / 2)
        usable = not int(failed) and bool(torch.isfinite(step).all())
        return step if usable else None

    def _record(self, state: State, *, solved: bool = True) -> None:
        self.course.record(self.problem, state.objective, state.stationarity, solved=solved, products=state.steps)
