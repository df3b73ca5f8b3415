"""Measures of kernels, blocks and weight changes. Each expensive measure reports what it left out and why."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.measures.alignment import EffectiveRank, alignment, cka, decompose, effective_rank
from adaptive_tangents.measures.explain import explain, explain_operations
from adaptive_tangents.penalties.closed_forms import Quadratic
from adaptive_tangents.solvers.fit import fit
from adaptive_tangents.solvers.results import Fit
from adaptive_tangents.structures.base import Fixed, Structure
from adaptive_tangents.structures.grouped import LayerScale
from adaptive_tangents.structures.spectral import Left, Right, TwoSided

Kernels = Mapping[str, Tensor]
STAGES = ("initial", "average", "final")
STRUCTURES: dict[str, Structure] = {
    "layer_scale": LayerScale(), "left": Left(), "right": Right(), "two_sided": TwoSided(),
}  # fmt: skip
# Strengths of the penalty, relative to the squared largest singular value of the fixed model's coefficients.
_STRENGTHS = (1.0, 0.1, 0.01)
_FIT_ROUNDS = 100


def defined(measure: Callable[..., float], *arguments: Any, **keywords: Any) -> float | None:
    """The measure, or None if it is undefined (no kernel, a zero one, or targets that centering makes zero)."""
    if any(argument is None for argument in arguments):
        return None
    try:
        value = measure(*arguments, **keywords)
    except TangentError:
        return None
    return value if math.isfinite(value) else None


def total(blocks: Kernels) -> Tensor:
    """The sum of the kernels of all blocks, in float64."""
    return torch.stack([kernel.double() for kernel in blocks.values()]).sum(0)


def kernel_numbers(
    kernels: Kernels, change: Float[Tensor, "n k"], target: Float[Tensor, "n k"] | None
) -> dict[str, Any]:
    """Alignment of K₀, K̄, K_T, growth, CKA, decomposition, and how much of the change lies along the targets."""
    start = kernels["initial"]
    goals = {"change": change} | ({} if target is None else {"labels": target})
    held = {stage: kernels.get(stage) for stage in STAGES}
    later = {stage: held[stage] for stage in STAGES[1:]}
    none = dict.fromkeys(EffectiveRank.__dataclass_fields__)
    return {
        "growth": {s: None if K is None else _ratio(float(K.trace()), float(start.trace())) for s, K in later.items()},
        "alignment": {g: {s: defined(alignment, K, y) for s, K in held.items()} for g, y in goals.items()},
        "alignment_centered": {
            g: {s: defined(alignment, K, y, centered=True) for s, K in held.items()} for g, y in goals.items()
        },
        "cka": {stage: defined(cka, start, K) for stage, K in later.items()},
        "decomposition": {stage: _decomposed(K, start, change) for stage, K in later.items()},
        "spectrum": {s: none if K is None else asdict(effective_rank(spectrum(K))) for s, K in held.items()},
    }


def _decomposed(kernel: Tensor | None, start: Tensor, change: Tensor) -> dict[str, float | None]:
    """Weights of K ≈ w₀K₀ + w_yK_y, and the share of ‖K − K₀‖² along K_y."""
    if kernel is None:
        return dict.fromkeys(("initial_weight", "target_weight", "explained", "change_along_target"))
    turn, task = kernel - start, change.double() @ change.double().mT
    sizes = float(turn.norm() * task.norm())
    along = (float((turn * task).sum()) / sizes) ** 2 if sizes > 0 else None
    try:
        found = decompose(kernel, start, change)
    except TangentError:
        return {"initial_weight": None, "target_weight": None, "explained": None, "change_along_target": along}
    weights = {"initial_weight": found.initial_weight, "target_weight": found.target_weight}
    return {**weights, "explained": found.explained, "change_along_target": along}


def block_numbers(
    kernels: Mapping[str, Kernels], change: Tensor, target: Tensor | None, matrices: Kernels, start: Kernels
) -> dict[str, dict[str, Any]]:
    """For every block: share of the trace, growth, alignment, CKA of start and end, size and rank of the weight change.

    ``kernels`` maps a stage to its kernels by block; ``matrices`` are the weight changes, ``start`` the weights.
    """
    traces = {s: {name: float(K.trace()) for name, K in parts.items()} for s, parts in kernels.items()}
    sums = {stage: sum(parts.values()) for stage, parts in traces.items()}
    found = {}
    for name, matrix in matrices.items():
        of = {stage: kernels[stage][name] if stage in kernels else None for stage in STAGES}
        own = {stage: traces[stage][name] if stage in traces else None for stage in STAGES}
        found[name] = {
            "trace_share": {stage: _ratio(own[stage], sums.get(stage, 0.0)) for stage in STAGES},
            "growth": {stage: _ratio(own[stage], traces["initial"][name]) for stage in ("average", "final")},
            "alignment": {stage: defined(alignment, K, change) for stage, K in of.items()},
            "alignment_labels": {s: defined(alignment, K, target) for s, K in of.items()} if target is not None else {},
            "cka": defined(cka, of["initial"], of["final"]),
            "change_norm": float(matrix.norm()),
            "change_relative": _ratio(float(matrix.norm()), float(start[name].norm())),
            "effective_rank": asdict(effective_rank(singular_values(matrix))),
        }
    return found


def _ratio(a: float | None, b: float) -> float | None:
    return a / b if a is not None and b > 0 else None


def spectrum(kernel: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """Eigenvalues, largest first; negative rounding errors are set to zero."""
    values: Tensor = torch.linalg.eigvalsh(kernel.double())
    return values.flip(0).clamp_min(0)


def singular_values(matrix: Float[Tensor, "o i"]) -> Float[Tensor, " r"]:
    """Singular values, largest first, from the smaller Gram matrix in float64; below 1e-8 of the largest is rounding."""
    wide = matrix.double()
    return spectrum(wide @ wide.mT if matrix.shape[0] <= matrix.shape[1] else wide.mT @ wide).sqrt()


# How the features moved: R² of structured transforms.


@dataclass(frozen=True)
class Explained:
    """R² per structure and block, and the blocks each structure leaves out for their cost."""

    r2: dict[str, dict[str, float | None]]
    left_out: dict[str, list[str]]


def explain_blocks(
    start: TangentFeatures, average: TangentFeatures, limit: float, tick: Callable[[float], None]
) -> Explained:
    """R² of each structure on the cheapest blocks whose operations stay within the limit per structure."""
    r2: dict[str, dict[str, float | None]] = {}
    left_out: dict[str, list[str]] = {}
    for k, (key, structure) in enumerate(STRUCTURES.items()):
        costs = {
            name: explain_operations(block, average.blocks[name], structure, start.n)
            for name, block in start.blocks.items()
        }
        affordable, spent = set[str](), 0.0
        for name in sorted(costs, key=costs.__getitem__):
            spent += costs[name]
            if spent <= limit:
                affordable.add(name)
        names = [name for name in start.blocks if name in affordable]
        left_out[key] = [name for name in start.blocks if name not in affordable]
        r2[key] = _explained(only(start, names), only(average, names), structure) if names else {"total": None}
        if names and key != "layer_scale":
            # Fitted on the same blocks, so that the two can be compared.
            scale = (
                r2["layer_scale"]
                if not left_out[key]
                else _explained(only(start, names), only(average, names), LayerScale())
            )
            r2[key]["layer_scale"] = scale["total"]
        tick((k + 1) / len(STRUCTURES))
    return Explained(r2, left_out)


def nothing_explained() -> Explained:
    """The form of what was not measured."""
    return Explained({key: {"total": None} for key in STRUCTURES}, {key: [] for key in STRUCTURES})


def _explained(start: TangentFeatures, average: TangentFeatures, structure: Structure) -> dict[str, float | None]:
    try:
        found = explain(start, average, structure)
    except TangentError:  # too few samples, or features that did not move
        return {"total": None}
    return {name: value if math.isfinite(value) else None for name, value in {"total": found.total, **found.r2}.items()}


def only(feats: TangentFeatures, names: list[str]) -> TangentFeatures:
    """The features of the named blocks."""
    blocks = {name: feats.blocks[name] for name in names}
    held = {slot.parameter for block in blocks.values() for slot in block.slots}
    return TangentFeatures(
        feats.n, feats.c, blocks, {k: v for k, v in feats.parameters.items() if k in held}, feats.limit
    )


# The exact adaptive model of the network's own change.


def fit_operations(feats: TangentFeatures) -> float:
    """Operations per round of `fit` with TwoSided: kernel, coefficients, one decomposition per block."""
    rounds = sum(20.0 * min(b.shape) ** 2 * max(b.shape) for b in feats.blocks.values())
    return rounds + 2.0 * feats.plan().operations + (feats.n * feats.c) ** 3 / 3


@dataclass(frozen=True)
class Models:
    """Fits of the network's change in the initial features, and why the adaptive fit is missing, if it is."""

    numbers: dict[str, Any]
    coefficients: Mapping[str, Kernels]
    left_out: str | None


def fit_models(
    feats: TangentFeatures, change: Tensor, goal: float | None, limit: float, tick: Callable[[float], None]
) -> Models:
    """Kernel regression with K₀ and, if affordable, TwoSided at the strength whose alignment is nearest to K̄'s."""
    wide = feats.to(torch.float64)
    fixed = _fitted(wide, change, Fixed())
    if fixed is None:
        return Models({}, {}, "the constraints of two samples contradict each other")
    numbers = {"fixed": _model_numbers(fixed, wide, change)}
    coefficients = {"fixed": dict(fixed.coefficients)}
    cost = fit_operations(wide) * _FIT_ROUNDS * len(_STRENGTHS)
    tick(0.2)
    if cost > limit:
        return Models(numbers, coefficients, f"it may take {cost:.0e} operations, but the limit is {limit:.0e}")
    top = max(float(singular_values(matrix)[0]) for matrix in fixed.coefficients.values())
    found: dict[float, Fit] = {}
    for k, share in enumerate(_STRENGTHS):
        made = _fitted(wide, change, TwoSided(Quadratic(share * top**2)))
        if made is not None:
            found[share] = made
        tick(0.2 + 0.8 * (k + 1) / len(_STRENGTHS))
    described = {share: _model_numbers(made, wide, change) for share, made in found.items()}
    best = min(described, key=lambda share: abs((described[share]["alignment"] or 0) - (goal or 0)))
    numbers["two_sided"] = described[best] | {"strength": best * top**2, "relative_strength": best}
    coefficients["two_sided"] = dict(found[best].coefficients)
    return Models(numbers, coefficients, None)


def _fitted(feats: TangentFeatures, change: Tensor, structure: Structure) -> Fit | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TangentWarning)  # `converged` already reports a fit that ran out of rounds
        try:
            return fit(feats, change.double(), structure=structure, max_rounds=_FIT_ROUNDS)
        except TangentError:
            return None


def _model_numbers(found: Fit, feats: TangentFeatures, change: Tensor) -> dict[str, Any]:
    kernel = found.transform(feats).kernel(outputs="trace")
    certificates = ("objective", "feasibility", "stationarity", "rounds", "converged", "reason")
    ranks = {name: asdict(effective_rank(singular_values(B))) for name, B in found.coefficients.items()}
    return {
        "alignment": defined(alignment, kernel, change),
        **{name: getattr(found, name) for name in certificates},
        "effective_rank": ranks,
    }
