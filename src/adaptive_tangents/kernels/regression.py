"""Kernel ridge regression on a kernel in memory or on disk: by a factor if it fits, or by products tile by tile."""

import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.checks import OF_CLASSES, Values, as_tensor, check_finite, check_real
from adaptive_tangents.errors import TangentError, TangentWarning, raised_as
from adaptive_tangents.kernels.derived_kernels import check_symmetric, in_range, largest, power_of_two
from adaptive_tangents.kernels.products import KernelProducts
from adaptive_tangents.kernels.tiles import Cached, Kernels, Request, Sum, Tiled, View, tiled
from adaptive_tangents.linalg.conjugate_gradients import Iterated, Progress, Solve, iterate
from adaptive_tangents.linalg.kernel_systems import DenseKernel, PivotedKernel, RoundedKernel
from adaptive_tangents.runtime.memory import limit_for, require_memory
from adaptive_tangents.runtime.progress import counted

KernelForm = Literal["auto", "dense", "matrix-free"]

DENSE_COPIES = 4  # of the kernel: itself, with the ridge, its factor, and working memory of the solves
ROUNDED_COPIES = 2  # of the kernel in float32, for a preconditioner
_MOST_RANK, _COLUMN_COPIES = 1000, 4
_CHUNK = 128  # samples chosen at a time: each choice takes one pass over the tiles


@dataclass(frozen=True, eq=False)
class KernelRegression:
    """A solution α of (K + ρI)α = r with its certificates; ``kernel_regression`` makes it.

    Attributes:
        dual: α (n, c).
        ridge: ρ.
        objective: rᵀα; at a solution it is ‖β‖² + (1/ρ)‖r − φβ‖², or ‖β‖² if ρ = 0.
        residual: ‖(K + ρI)α − r‖/‖r‖ in float64.
        feasibility: ‖Kα − r‖/‖r‖.
        converged: whether the residual is at most the tolerance.
        reason: the residual, the tolerance, and what to do if it did not converge.
        form: "dense" or "matrix-free".
        steps: the steps of conjugate gradients; 0 if dense.
        jitter: what was added to the diagonal so that a factor exists.
    """

    dual: Float[Tensor, "n c"] = field(repr=False)
    ridge: float
    objective: float
    residual: float
    feasibility: float
    converged: bool
    reason: str
    form: str
    steps: int
    jitter: float

    def predict(self, K: Kernels) -> Float[Tensor, "m c"]:
        r"""K(x, x_train) α (m, c): what the model adds to f(x; θ₀) at other samples.

        Args:
            K: the kernel of the m new samples with the n training samples, ``tangent_kernel(model, x, x_train)`` or a
                store of it, with the same ``outputs`` as the regression's kernel.

        Raises:
            TangentError: when the kernel does not fit the regression.

        >>> import torch
        >>> found = kernel_regression(torch.eye(3), torch.ones(3), ridge=1.0)
        >>> found.predict(torch.ones(1, 3))
        tensor([[1.5000]], dtype=torch.float64)
        """
        kernel = tiled(Request("predict", rectangular=True, diagonal=True), K)
        outputs = max(kernel.width, kernel.batch)
        if kernel.m != len(self.dual) or outputs not in (1, self.dual.shape[1]):
            raise TangentError(
                f"predict: the kernel is of {kernel.n} samples with {kernel.m} others, c = {outputs}; the regression was of "
                f"n = {len(self.dual)} samples, c = {self.dual.shape[1]}: give the kernel of new samples with those"
            )
        operator = KernelProducts(kernel)
        if outputs == 1:
            return operator.apply(self.dual)
        return operator.apply(self.dual.flatten()).reshape(kernel.n, -1)


def kernel_regression(
    K: Kernels,
    r: Values,
    *,
    ridge: float = 0.0,
    form: KernelForm = "auto",
    tol: float = 1e-10,
    max_steps: int = 2000,
    memory_limit: int | None = None,
    progress: Progress | bool | None = None,
) -> KernelRegression:
    r"""Kernel ridge regression (K + ρI)α = r, which minimizes ‖β‖² + (1/ρ)Σ‖r_k − φ(x_k)β‖² by β = φᵀα.

    Every result has its residual. If that is above ``tol``, ``converged`` is False and a TangentWarning is given.

    Args:
        K: a kernel: a tensor, or a store. With outputs "full" (n, c, n, c) it couples the outputs; "trace" (n, n) is used
            for each output; "diagonal" (n, n, c) gives each output its own. A kernel by block counts as the sum.
        r: targets minus f(x;θ₀), (n, c), or (n,) for one output.
        ridge: ρ, at least 0; 0 interpolates.
        form: "dense" factorizes K + ρI. "matrix-free" runs conjugate gradients on products tile by tile, preconditioned by
            a factor in float32, or by some of its columns if memory is short. "auto" is dense if the memory limit allows.
        tol: the largest relative residual to accept.
        max_steps: the most steps of conjugate gradients.
        memory_limit: bytes that may be used; None is half of what is free.
        progress: called with the steps of conjugate gradients so far, and the relative residual there; True shows a bar.

    Raises:
        TangentError: when targets do not fit or are not finite, ρ is negative, a store is incomplete, or memory would
            exceed the limit.

    Source: docs/theory.md, §4.

    >>> import torch, adaptive_tangents as at
    >>> K = at.tangent_kernel(torch.nn.Linear(3, 1), torch.randn(20, 3))
    >>> found = at.kernel_regression(K, torch.randn(20), ridge=0.1)
    >>> found.converged, found.residual < 1e-12
    (True, True)
    """
    call = "kernel_regression"
    kernel = tiled(Request(call, diagonal=True), K)
    check_solver(call, ridge, form, tol, max_steps)
    targets = residual_targets(call, r, kernel)
    scale = power_of_two(max(largest(kernel.diagonal()), ridge))
    unit = power_of_two(largest(targets))
    kernel, ridge, targets = kernel if scale == 1 else Sum([kernel], [1 / scale]), ridge / scale, targets / unit
    check_symmetric(call, kernel)
    room = limit_for(memory_limit, kernel.device)
    dense = is_dense(call, kernel, form, room)
    # Outputs that are not coupled are solved one by one.
    parts = [_Output(kernel, k) for k in range(kernel.batch)] if kernel.batch > 1 else [kernel]
    found = []
    with raised_as(call, "fit"), counted(progress, "residual", max_steps) as tell:
        for part, right in zip(parts, _columns(kernel, targets), strict=True):
            operator = KernelProducts(part if dense else Cached(part, room // 2 // len(parts)), ridge=ridge)
            solution, steps, jitter = (
                dense_solved(call, part, right, ridge)
                if dense
                else _by_products(operator, right, room // 2, tol, max_steps, tell)
            )
            found.append(_Solved(right, solution, operator.apply(solution), steps, jitter))
    size = float(targets.norm()) or 1.0
    residual = _norm(part.image - part.right for part in found) / size
    steps, jitter = sum(part.steps for part in found), max(part.jitter for part in found)
    reason = f"residual {residual:.1e} (asked: {tol:g}), " + (f"jitter {jitter:.1e}" if dense else f"{steps} products")
    if residual > tol:
        reason += "; use a positive ridge or raise " + ("tol" if dense else "max_steps, memory_limit or tol")
        warnings.warn(f"{call} did not converge: {reason}", TangentWarning, stacklevel=2)
    objective = sum(float((part.solution * part.right).sum()) for part in found)
    return KernelRegression(
        dual=_samples(kernel, [part.solution for part in found]) / scale * unit, ridge=ridge * scale,
        objective=in_range(call, "the objective", objective, unit, unit, 1 / scale), residual=residual,
        feasibility=_norm(part.image - ridge * part.solution - part.right for part in found) / size,
        converged=residual <= tol, reason=reason, form="dense" if dense else "matrix-free", steps=steps,
        jitter=jitter * scale,
    )  # fmt: skip


@dataclass(frozen=True)
class _Solved:
    """A right side, its solution, (K + ρI) times the solution, and the effort."""

    right: Tensor
    solution: Tensor
    image: Tensor
    steps: int
    jitter: float


class _Output(View):
    """One output of a kernel with outputs="diagonal"."""

    def __init__(self, of: Tiled, output: int) -> None:
        super().__init__(of)
        self.output, self.batch = output, 1

    def read(self, rows: slice, columns: slice) -> Tensor:
        return self.of.read(rows, columns)[self.output, None]


def _columns(kernel: Tiled, targets: Float[Tensor, "n c"]) -> list[Float[Tensor, "_k _m"]]:
    """The right sides for each matrix of a kernel."""
    if kernel.batch > 1:
        return list(targets.mT[:, :, None])
    return [targets.reshape(-1, 1) if kernel.full else targets]


def _samples(kernel: Tiled, solutions: list[Tensor]) -> Float[Tensor, "n c"]:
    """The solutions as (n, c)."""
    return torch.cat(solutions, 1) if kernel.batch > 1 else solutions[0].reshape(kernel.n, -1)


def _norm(parts: Iterable[Tensor]) -> float:
    return float(torch.stack([(part**2).sum() for part in parts]).sum().sqrt())


def is_dense(call: str, kernel: Tiled, form: str, room: int, *, copies: int = DENSE_COPIES) -> bool:
    """Whether to factorize the kernel: always for "dense" (or TangentError if memory is short), if it fits for "auto"."""
    needed = copies * 8 * kernel.size**2
    if form == "dense":
        require_memory(
            call, needed, room,
            remedy=f"use form='matrix-free', or fewer samples (the kernel is {kernel.size} × {kernel.size})",
        )  # fmt: skip
    return form == "dense" or (form == "auto" and needed <= room)


def dense_solved(
    call: str, kernel: Tiled, right: Float[Tensor, "k m"], ridge: float
) -> tuple[Float[Tensor, "k m"], int, float]:
    """(K + ρI)⁻¹ times right sides by a factor; with 0 steps, and the jitter that was needed."""
    dense = DenseKernel(kernel.matrices()[0])
    try:
        solve = dense.shifted(ridge)
    except TangentError as failure:
        raise TangentError(
            f"{call}: the kernel is not positive definite even with a jitter of 1e-8 of its diagonal; use a positive ridge"
        ) from failure
    return solve(right), 0, dense.jitter


def _by_products(
    operator: KernelProducts, right: Tensor, room: int, tol: float, most: int, progress: Progress | None
) -> tuple[Tensor, int, float]:
    found = solved(operator, right, room=room, tol=tol / 10, most=most, progress=progress)
    return found.solution, found.steps, 0.0


def check_solver(call: str, ridge: float, form: str, tol: float, most: int) -> None:
    """Raise TangentError for options out of range."""
    if not 0 <= ridge < float("inf"):
        raise TangentError(f"{call}: the ridge ρ is zero (interpolation) or positive, got {ridge}")
    if form not in get_args(KernelForm):
        raise TangentError(f"{call}: form is one of {', '.join(get_args(KernelForm))}, got {form!r}")
    if not tol > 0 or most < 1:
        raise TangentError(f"{call}: tol and the steps allowed are positive, got {tol} and {most}")


def residual_targets(call: str, r: object, kernel: Tiled) -> Float[Tensor, "n c"]:
    """Targets (n, c) in float64, after checking that they fit the kernel."""
    outputs = max(kernel.width, kernel.batch)
    r = as_tensor(call, "targets", r, kernel.device)
    targets = r[:, None] if r.ndim == 1 else r
    coupled = kernel.full or kernel.batch > 1
    if targets.ndim != 2 or targets.shape[0] != kernel.n or (coupled and targets.shape[1] != outputs):
        raise TangentError(
            f"{call}: targets have shape {tuple(r.shape)}, the kernel is of n = {kernel.n} samples"
            + (f", c = {outputs} outputs" if coupled else "")
            + ("" if r.is_floating_point() or r.ndim != 1 else f"; give real targets, {OF_CLASSES}")
        )
    check_real(call, targets)
    check_finite(call, "the target", [targets])
    return targets.detach().to(kernel.device, torch.float64)


def solved(
    operator: KernelProducts,
    right: Float[Tensor, "k m"],
    *,
    room: int,
    tol: float,
    most: int = 2000,
    start: Float[Tensor, "k m"] | None = None,
    progress: Progress | None = None,
) -> Iterated:
    """(K + ρI)⁻¹ times right sides by conjugate gradients, with a preconditioner of at most ``room`` bytes."""
    near = preconditioner(operator, room)
    return iterate(operator.apply, right, near, tol=tol, most=most, start=start, progress=progress)


def preconditioner(operator: KernelProducts, room: int) -> Solve:
    """An approximate (K + ρI)⁻¹: from a factor in float32, or from as many of its columns as fit."""
    size = operator.kernel.size
    if ROUNDED_COPIES * 4 * size**2 <= room:
        with suppress(TangentError):  # not positive definite in single precision
            return RoundedKernel(operator).near_shifted(operator.ridge)
    rank = max(1, min(_MOST_RANK, size // 2, room // (_COLUMN_COPIES * 8 * size)))
    chunk = min(_CHUNK, max(1, rank // (4 * operator.c)))
    return PivotedKernel(operator, rank, chunk).near_shifted(operator.ridge)
