"""fit() and certify(): the exact adaptive model, from the user's arguments to the certified solution."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args, overload

import torch

from adaptive_tangents.checks import Values, check_choice
from adaptive_tangents.errors import TangentError, TangentWarning, raised_as
from adaptive_tangents.features.tangent_features import TangentFeatures, check_features
from adaptive_tangents.kernels.tiles import Kernels
from adaptive_tangents.linalg.conjugate_gradients import Progress
from adaptive_tangents.runtime.memory import limit_for, require_memory
from adaptive_tangents.runtime.progress import Asked, shown, silent
from adaptive_tangents.runtime.progress import Progress as Watch
from adaptive_tangents.solvers.continuation import Course
from adaptive_tangents.solvers.kernel_fit import fit_kernel
from adaptive_tangents.solvers.losses import Loss, LossName
from adaptive_tangents.solvers.problem import Problem
from adaptive_tangents.solvers.results import Fit, KernelFit
from adaptive_tangents.solvers.search import Solver, examined, searched
from adaptive_tangents.solvers.subspaces import compressed
from adaptive_tangents.solvers.targets import check_features_or_kernel, check_results, goal_of
from adaptive_tangents.structures.base import Matrices, Structure, check_sketch
from adaptive_tangents.structures.mixed import as_structure
from adaptive_tangents.structures.spectral import TWO_SIDED

Form = Literal["auto", "dense", "primal", "matrix-free"]

_DENSE_COPIES = 6  # matrix and factor of the current system and of the next
_ROUNDED_COPIES = 3  # the current factor and the next


@overload
def fit(
    feats: TangentFeatures, r: Values, *,
    structure: Structure | Mapping[str, Structure] = TWO_SIDED, loss: LossName = "squared",
    offset: Values | None = None, ridge: float = 0.0, tol: float = 1e-8, max_rounds: int = 200,
    solver: Solver = "newton", form: Form = "auto", start: Fit | None = None, memory_limit: int | None = None,
    progress: Progress | bool | None = None, watch: Asked = None,
) -> Fit: ...  # fmt: skip
@overload
def fit(
    feats: Kernels, r: Values, *,
    structure: Structure | Mapping[str, Structure] = TWO_SIDED, loss: LossName = "squared",
    offset: Values | None = None, ridge: float = 0.0, tol: float = 1e-8, max_rounds: int = 200,
    solver: Solver = "newton", form: Form = "auto", start: Fit | None = None, memory_limit: int | None = None,
    progress: Progress | bool | None = None, watch: Asked = None,
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
    progress: Progress | bool | None = None,
    watch: Asked = None,
) -> Fit | KernelFit:
    r"""Fit β and the feature transform M jointly: min over M ∈ 𝓜, θ of ‖θ‖² + Ω(M) subject to φ(x_k)Mᵀθ = r_k.

    β = Mᵀθ is the change of the weights. A ridge ρ > 0 replaces the constraint by the loss (1/ρ)Σ‖r_k − φ(x_k)β‖², or for
    cross-entropy by (1/ρ)Σ CE(f(x_k; θ₀) + φ(x_k)β, r_k). A fit that stops early has ``converged=False`` and warns with
    TangentWarning. A kernel instead of features gives a ``KernelFit``; this works for squared error and structures whose Ω̃
    depends only on norms of blocks (``Fixed``, ``Full``, ``LayerScale``).

    Args:
        feats: tangent features φ of n samples with c outputs; or their kernel, as a store, a tensor, or a mapping from blocks
            to tensors.
        r: targets minus f(x; θ₀), (n, c), or (n,) where c = 1; for cross-entropy integer labels (n,), 0 or 1 where c = 1.
        structure: which transforms M are allowed; a mapping gives structures by patterns of block names, as in ``Mixed``.
        loss: "squared" or "cross-entropy" (logistic where c = 1).
        offset: f(x; θ₀), (n, c), for cross-entropy only.
        ridge: ρ ≥ 0; 0 interpolates. Cross-entropy needs ρ > 0.
        tol: stop when the expected relative decrease of the objective is below this, and the stationarity below √tol.
        max_rounds: stop after this many steps at the latest.
        solver: "newton"; "alternation" of the closed forms for β and M; or "anderson", the alternation extrapolated. On
            features, structures without a curvature use "anderson" for "newton"; kernels do not take "anderson".
        form: of the linear systems. "dense" factorizes K_M (nc, nc), "primal" (features only) a matrix (p, p), "matrix-free"
            neither; "auto" takes "primal" where p < nc and ρ > 0, else "dense", else "matrix-free", as memory allows.
        start: a fit of the same features to start from, such as the previous one on a path; None starts at M = I.
        memory_limit: bytes that may be used; None is the features' own limit, or half of what is free.
        progress: called with the number of rounds so far and the objective; True shows a bar, of what ``watch`` is told.
        watch: called with the name of a stage, such as "τ = 9", and the fraction of all stages done; True shows a bar.

    Raises:
        TangentError: when shapes do not fit, targets are not finite, labels are out of range, ρ is negative, patterns do not
            divide the blocks, constraints contradict each other, or there is not enough memory.

    Source: LeJeune & Alemohammad, CPAL 2024, §3; certificates in docs/architecture.md.

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
    if isinstance(feats, TangentFeatures):
        check_choice("fit", "solver", solver, get_args(Solver))
        check_choice("fit", "form", form, get_args(Form))
    with shown(True if progress is True and not watch else watch) as told:
        found = unwarned(
            feats, r, structure=structure, loss=loss, offset=offset, ridge=ridge, tol=tol, max_rounds=max_rounds,
            solver=solver, form=form, start=start, memory_limit=memory_limit,
            progress=None if isinstance(progress, bool) else progress, watch=told,
        )  # fmt: skip
    if not found.converged:
        warnings.warn(f"fit did not converge: {found.reason}", TangentWarning, stacklevel=2)
    return found


def unwarned(
    feats: TangentFeatures | Kernels, r: Any, *,
    structure: Structure = TWO_SIDED, loss: LossName = "squared",
    offset: Values | None = None, ridge: float = 0.0, tol: float = 1e-8, max_rounds: int = 200,
    solver: Solver = "newton", form: Form = "auto", start: Fit | None = None, memory_limit: int | None = None,
    progress: Progress | None = None, watch: Watch | None = None,
) -> Fit | KernelFit:  # fmt: skip
    """``fit`` for callers that read ``converged``, after checks of options.

    Warnings cannot be silenced without changing them for all threads.
    """
    course = Course(tol, max_rounds, progress, watch or silent)
    found: Fit | KernelFit
    if isinstance(feats, TangentFeatures):
        feats = feats if memory_limit is None else replace(feats, limit=memory_limit)
        goal = goal_of(feats, r, loss=loss, offset=offset, ridge=ridge)
        found = _fit_features(feats, goal, course, structure=structure, solver=solver, form=form, start=start)
    else:
        _check_for_kernels(loss, offset, start)
        found = fit_kernel(
            feats, r, course, structure=structure, ridge=ridge, solver=solver, form=form, memory_limit=memory_limit
        )
    check_results("fit", found.objective, found.stationarity)
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
    r"""The ``Fit`` at given coefficients β, from any source, with the best M for them and all certificates.

    Only M is optimized: objective, stationarity, feasibility and lower bound are those of β.

    Args:
        feats: tangent features φ of n samples with c outputs.
        r: targets minus f(x; θ₀), (n, c), or (n,) where c = 1; for cross-entropy integer labels (n,), 0 or 1 where c = 1.
        coefficients: β, one matrix B (o, i) for each block.
        structure: which transforms M are allowed; a mapping gives structures by patterns of block names, as in ``Mixed``.
        loss: "squared" or "cross-entropy" (logistic where c = 1).
        offset: f(x; θ₀), (n, c), for cross-entropy only.
        ridge: ρ ≥ 0; 0 interpolates. Cross-entropy needs ρ > 0.
        tol: ``converged`` says whether the stationarity is below √tol.
        form: of the linear systems, as in ``fit``.

    Raises:
        TangentError: as ``fit`` does, and when the coefficients belong to other blocks.

    Source: LeJeune & Alemohammad, CPAL 2024, §3.

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
        feats.check_matrices("fit", coefficients, finite=True)
        doubled = feats.to(torch.float64)
        chosen, rank, room = _form(feats, form, interpolates=goal.interpolates)
        problem = Problem(doubled, structure.prepared(doubled), goal, chosen, rank, room)
        matrices = {name: matrix.detach().to(feats.device, torch.float64) for name, matrix in coefficients.items()}
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
    """``fit`` on features: solve in the subspaces that they span, and map the solution back."""
    check_sketch("fit", structure, feats)
    doubled = feats.to(torch.float64)
    structure = structure.prepared(doubled)
    within = compressed(doubled, structure)
    chosen, rank, room = _form(within.features, form, interpolates=goal.interpolates)
    problem = Problem(within.features, structure, goal, chosen, rank, room)
    if start is not None:
        feats.check_matrices("fit", start.coefficients, "start was fitted to")
    began = None if start is None else within.down(start.coefficients)
    found = searched(problem, course, solver, began)
    coefficients, transforms = within.up(found.coefficients), within.up_transforms(found.transforms)
    return replace(found, features=feats, coefficients=coefficients, transforms=transforms)


def _check_for_kernels(loss: str, offset: Values | None, start: Fit | None) -> None:
    """Raise TangentError for options that need features."""
    for given, what in (
        (loss != "squared", f"loss={loss!r}"),
        (offset is not None, "offset"),
        (start is not None, "start"),
    ):
        if given:
            raise TangentError(
                f"fit: {what} needs features, and this is a kernel; fit to tangent_features(model, x), or leave it out"
            )


def _form(feats: TangentFeatures, form: Form, *, interpolates: bool) -> tuple[str, int | None, int]:
    """The form of the systems; a preconditioner's columns at most (None: the whole kernel, in float32); the bytes left."""
    size, limit = feats.n * feats.c, limit_for(feats.limit, feats.device)
    p = sum(block.shape[0] * block.shape[1] for block in feats.blocks.values())
    rounded = _ROUNDED_COPIES * 4 * size**2
    rank = None if rounded <= limit else max(1, min(size // 2, 2000, limit // (_DENSE_COPIES * 8 * size)))
    needed = {
        "dense": _DENSE_COPIES * 8 * size**2,
        "primal": _DENSE_COPIES * 8 * p * max(p, size),
        "matrix-free": rounded if rank is None else _DENSE_COPIES * 8 * size * rank,
    }
    if form == "primal" and interpolates:
        raise TangentError("fit: the primal form needs a ridge; interpolation is solved in the dual")
    if form == "auto":
        primal = p < size and not interpolates and needed["primal"] <= limit
        form = "primal" if primal else "dense" if needed["dense"] <= limit else "matrix-free"
    elif form != "matrix-free":
        require_memory(
            "fit", needed[form], limit,
            remedy=f"use form='matrix-free', or fewer samples (the kernel is {size} × {size})",
        )  # fmt: skip
    return form, rank, max(0, limit - needed[form])
