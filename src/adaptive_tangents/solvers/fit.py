"""fit() and certify(): the exact adaptive model, from what users hand in to the certified solution."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from adaptive_tangents.checks import Values, check_choice
from adaptive_tangents.errors import TangentError, TangentWarning, raised_as
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.kernels.tiles import Kernels
from adaptive_tangents.linalg.conjugate_gradients import Progress
from adaptive_tangents.runtime.memory import limit_for, require_memory
from adaptive_tangents.solvers.continuation import Course
from adaptive_tangents.solvers.kernel_fit import fit_kernel
from adaptive_tangents.solvers.losses import Loss, LossName
from adaptive_tangents.solvers.problem import Problem
from adaptive_tangents.solvers.results import Fit, KernelFit
from adaptive_tangents.solvers.search import Solver, examined, searched
from adaptive_tangents.solvers.subspaces import compressed
from adaptive_tangents.solvers.targets import check_features, check_features_or_kernel, goal_of
from adaptive_tangents.structures.base import Matrices, Structure, check_sketch
from adaptive_tangents.structures.mixed import as_structure
from adaptive_tangents.structures.spectral import TWO_SIDED

Form = Literal["auto", "dense", "primal", "matrix-free"]

_DENSE_COPIES = 6  # the system in use, matrix and factor, while the next is made
_ROUNDED_COPIES = 3  # the factor in use, while the next is made


@overload
def fit(
    feats: TangentFeatures, r: Values, *,
    structure: Structure | Mapping[str, Structure] = TWO_SIDED, loss: LossName = "squared",
    offset: Values | None = None, ridge: float = 0.0, tol: float = 1e-8, max_rounds: int = 200,
    solver: Solver = "newton", form: Form = "auto", start: Fit | None = None, memory_limit: int | None = None,
    progress: Progress | None = None,
) -> Fit: ...  # fmt: skip
@overload
def fit(
    feats: Kernels, r: Values, *,
    structure: Structure | Mapping[str, Structure] = TWO_SIDED, loss: LossName = "squared",
    offset: Values | None = None, ridge: float = 0.0, tol: float = 1e-8, max_rounds: int = 200,
    solver: Solver = "newton", form: Form = "auto", start: Fit | None = None, memory_limit: int | None = None,
    progress: Progress | None = None,
) -> KernelFit: ...  # fmt: skip
def fit(
    feats: TangentFeatures | Kernels,
    r: Values,
    *,
    structure: Structure | Mapping[str, Structure] = TWO_SIDED,
    loss: LossName = "squared",
    offset: Values | None = None,
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
    factorizes K_M (nc, nc), "primal" a matrix (p, p), "matrix-free" neither; "auto" the first of them that memory allows.
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
    check_features_or_kernel("fit", feats)
    structure = as_structure("fit", structure)
    check_choice("fit", "loss", loss, get_args(LossName))
    course = Course(tol, max_rounds, progress)
    found: Fit | KernelFit
    if isinstance(feats, TangentFeatures):
        check_choice("fit", "solver", solver, get_args(Solver))
        check_choice("fit", "form", form, get_args(Form))
        feats = feats if memory_limit is None else replace(feats, limit=memory_limit)
        goal = goal_of(feats, r, loss=loss, offset=offset, ridge=ridge)
        found = _fit_features(feats, goal, course, structure=structure, solver=solver, form=form, start=start)
    else:
        _check_for_kernels(loss, offset, start)
        found = fit_kernel(
            feats, r, course, structure=structure, ridge=ridge, solver=solver, form=form, memory_limit=memory_limit
        )
    if not found.converged:
        warnings.warn(f"fit did not converge: {found.reason}", TangentWarning, stacklevel=2)
    return found


def certify(
    feats: TangentFeatures,
    r: Values,
    *,
    coefficients: Matrices,
    structure: Structure | Mapping[str, Structure] = TWO_SIDED,
    loss: LossName = "squared",
    offset: Values | None = None,
    ridge: float = 0.0,
    tol: float = 1e-8,
    form: Form = "auto",
) -> Fit:
    r"""The fit at given coefficients β, from wherever they come, with the best M for them and all certificates.

    Arguments as of ``fit``; ``coefficients`` holds one matrix a block. Nothing is optimized but M: objective Ω̃(β) + loss,
    stationarity, feasibility and lower bound are those of β. ``converged`` says whether the stationarity is below √tol.
    Source: LeJeune & Alemohammad, CPAL 2024, §3.

    Raises TangentError as ``fit`` does, and where the coefficients are of other blocks.

    >>> import torch, adaptive_tangents as at
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> x, r = torch.randn(20, 3), torch.randn(20, 1)
    >>> feats = at.tangent_features(model, x)
    >>> plain = at.fit(feats, r, structure=at.Fixed(), ridge=0.1)
    >>> found = at.certify(
    ...     feats, r, coefficients=plain.coefficients, structure=at.TwoSided(at.Quadratic(0.1)), ridge=0.1
    ... )
    >>> found.converged, found.objective < plain.objective
    (False, True)
    """
    with raised_as("certify", "fit"):
        check_features("fit", feats)
        structure = as_structure("fit", structure)
        check_sketch("fit", structure, feats)
        check_choice("fit", "form", form, get_args(Form))
        goal = goal_of(feats, r, loss=loss, offset=offset, ridge=ridge)
        given = _of_blocks("the coefficients are of", coefficients, feats)
        doubled = feats.to(torch.float64)
        chosen, rank = _form(feats, form, interpolates=goal.interpolates)
        problem = Problem(doubled, structure.prepared(doubled), goal, chosen, rank)
        matrices = {name: matrix.detach().to(feats.device, torch.float64) for name, matrix in given.items()}
        return replace(examined(problem, Course(tol, 1), matrices), features=feats)


def _fit_features(
    feats: TangentFeatures,
    goal: Loss,
    course: Course,
    *,
    structure: Structure,
    solver: Solver,
    form: Form,
    start: Fit | None,
) -> Fit:
    """``fit`` on features: in the subspaces that they span, and back."""
    check_sketch("fit", structure, feats)
    doubled = feats.to(torch.float64)
    structure = structure.prepared(doubled)
    within = compressed(doubled, structure)
    chosen, rank = _form(within.features, form, interpolates=goal.interpolates)
    problem = Problem(within.features, structure, goal, chosen, rank)
    began = None if start is None else within.down(_of_blocks("start was fitted to", start.coefficients, feats))
    found = searched(problem, course, solver, began)
    coefficients, transforms = within.up(found.coefficients), within.up_transforms(found.transforms)
    return replace(found, features=feats, coefficients=coefficients, transforms=transforms)


def _check_for_kernels(loss: str, offset: Values | None, start: Fit | None) -> None:
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
    size, limit = feats.n * feats.c, limit_for(feats.limit, feats.device)
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
