"""Measures of kernels, blocks and weight changes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.plans import WORKING_BYTES, plan_block
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.measures.alignment import EffectiveRank, alignment, cka, decompose, effective_rank
from adaptive_tangents.measures.explain import explain_operations, explanations
from adaptive_tangents.penalties.closed_forms import Quadratic
from adaptive_tangents.solvers.fit import unwarned
from adaptive_tangents.solvers.results import Fit, KernelFit
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
_GROUPS = 6


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
    kernels: Mapping[str, Kernels], change: Tensor, target: Tensor | None, matrices: Kernels, start: Kernels,
    values: Kernels,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """For every block: shares of the trace and the change, growth, alignment, CKA of start and end, the weight change.

    ``kernels`` maps a stage to its kernels by block; ``matrices`` are the weight changes, ``values`` their singular values,
    and ``start`` the weights.
    """
    traces = {s: {name: float(K.trace()) for name, K in parts.items()} for s, parts in kernels.items()}
    shares = change_shares(kernels["initial"], kernels["final"])
    sums = {stage: sum(parts.values()) for stage, parts in traces.items()}
    found = {}
    for name, matrix in matrices.items():
        of = {stage: kernels[stage][name] if stage in kernels else None for stage in STAGES}
        own = {stage: traces[stage][name] if stage in traces else None for stage in STAGES}
        found[name] = {
            "change_share": shares[name],
            "trace_change_share": _trace_change(own, sums),
            "trace_share": {stage: _ratio(own[stage], sums.get(stage, 0.0)) for stage in STAGES},
            "growth": {stage: _ratio(own[stage], traces["initial"][name]) for stage in ("average", "final")},
            "alignment": {stage: defined(alignment, K, change) for stage, K in of.items()},
            "alignment_labels": {s: defined(alignment, K, target) for s, K in of.items()} if target is not None else {},
            "cka": defined(cka, of["initial"], of["final"]),
            "change_norm": float(matrix.norm()),
            "change_relative": _ratio(float(matrix.norm()), float(start[name].norm())),
            "effective_rank": asdict(effective_rank(values[name])),
            "rank_90": rank_of(values[name]),
        }
    return found


def change_shares(initial: Kernels, final: Kernels) -> dict[str, float | None]:
    """Every part's share of the change of a kernel that is their sum, s_ℓ = ⟨ΔK_ℓ, ΔK⟩ / ‖ΔK‖²; they sum to 1.

    A share is negative where a part changed against the whole. All are None if the kernel did not change.

    >>> shares = change_shares({"a": torch.eye(2), "b": torch.eye(2)}, {"a": 4 * torch.eye(2), "b": 2 * torch.eye(2)})
    >>> {name: round(share, 6) for name, share in shares.items()}
    {'a': 0.75, 'b': 0.25}
    """
    turns = {name: final[name].double() - initial[name].double() for name in initial}
    whole = torch.stack([*turns.values()]).sum(0)
    size = float(whole.norm())  # before it is squared, which may underflow
    if not size > 0 or not math.isfinite(size):
        return dict.fromkeys(turns)
    return {name: float(((turn / size) * (whole / size)).sum()) for name, turn in turns.items()}


def _trace_change(own: Mapping[str, float | None], sums: Mapping[str, float]) -> float | None:
    """A part's share of the change of the trace; None where the traces of start and end are nearly equal."""
    change = sums["final"] - sums["initial"]
    if own["initial"] is None or own["final"] is None or abs(change) <= 1e-3 * (sums["final"] + sums["initial"]):
        return None
    return (own["final"] - own["initial"]) / change


def rank_of(values: Tensor, share: float = 0.9) -> int:
    """How many of the largest singular values hold a share of the sum of squares; 0 if all are zero.

    >>> rank_of(torch.tensor([3.0, 1.0, 1.0]))
    2
    """
    squares = values.double().square().sort(descending=True).values
    if not float(squares.sum()) > 0:
        return 0
    held = squares.cumsum(0) / squares.sum()
    return int((held < share - 1e-12).sum()) + 1


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


def explain_groups(one: TangentFeatures, average: TangentFeatures, n: int) -> list[tuple[list[str], float]]:
    """The blocks in groups of about equal work, each with its operations, from features of one sample.

    Every group is a stage of its own, which an interruption does not undo.
    """
    works = {
        name: sum(explain_operations(block, average.blocks[name], structure, n) for structure in STRUCTURES.values())
        for name, block in one.blocks.items()
    }
    groups: list[tuple[list[str], float]] = [([], 0.0)]
    for name, work in works.items():
        if groups[-1][0] and groups[-1][1] + work / 2 > sum(works.values()) / _GROUPS:
            groups.append(([], 0.0))
        names, before = groups[-1]
        groups[-1] = ([*names, name], before + work)
    return groups


def explained(
    start: TangentFeatures, average: TangentFeatures, names: list[str], tick: Callable[[float], None]
) -> dict[str, dict[str, list[float]]]:
    """The squared error and change that every structure leaves of the named blocks, on samples held out."""
    try:
        found = explanations(
            only(start, names), only(average, names), STRUCTURES, progress=lambda stage, fraction: tick(fraction)
        )
    except TangentError:  # too few samples, or features that did not move
        return {}
    return {key: {name: list(pair) for name, pair in each.squares.items()} for key, each in found.items()}


def r2_of(squares: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, float | None]]:
    """R² of every structure, for each block and in "total", from the squares of some blocks."""
    found: dict[str, dict[str, float | None]] = {}
    for key in STRUCTURES:
        pairs = squares.get(key, {})
        error, change = (math.fsum(pair[k] for pair in pairs.values()) for k in (0, 1))
        found[key] = {"total": _share(error, change), **{name: _share(*pair) for name, pair in pairs.items()}}
    return found


def _share(error: float, change: float) -> float | None:
    return 1 - error / change if change > 0 and math.isfinite(error) else None


def only(feats: TangentFeatures, names: list[str]) -> TangentFeatures:
    """The features of the named blocks."""
    blocks = {name: feats.blocks[name] for name in names}
    held = {slot.parameter for block in blocks.values() for slot in block.slots}
    parameters = {name: shape for name, shape in feats.parameters.items() if name in held}
    return TangentFeatures(feats.n, feats.c, blocks, parameters, feats.limit)


# The exact adaptive model of the network's own change.


def fit_operations(one: TangentFeatures, n: int) -> float:
    """Operations of all rounds of `fit` with TwoSided at all strengths, from features of one sample.

    A round takes a kernel, the coefficients, and one decomposition per block.
    """
    pairs = (
        plan_block(b, b, n, n, one.c, "full", symmetric=True, budget=WORKING_BYTES, itemsize=8)
        for b in one.blocks.values()
    )
    each = sum(20.0 * min(b.shape) ** 2 * max(b.shape) for b in one.blocks.values())
    return (each + 2.0 * sum(p.operations for p in pairs) + (n * one.c) ** 3 / 3) * _FIT_ROUNDS * len(_STRENGTHS)


def model_operations(one: TangentFeatures, n: int, limit: float) -> float:
    """Operations of `fit_models`: of the fixed model, and of the adaptive ones if they stay within the limit."""
    adaptive = fit_operations(one, n)
    coefficients = sum(2.0 * n * max(1, b.positions) * b.outputs * b.shape[0] * b.shape[1] for b in one.blocks.values())
    values = sum(2.0 * min(b.shape) ** 2 * (max(b.shape) + 5 * min(b.shape)) for b in one.blocks.values())
    return coefficients + values + (adaptive if adaptive <= limit else 0.0)


@dataclass(frozen=True)
class Models:
    """Fits of the network's change in the initial features, singular values of their coefficients, and what was left out."""

    numbers: dict[str, Any]
    values: Mapping[str, Kernels]
    left_out: str | None


def fixed_model(feats: TangentFeatures, kernels: Kernels, change: Tensor) -> tuple[dict[str, Any], Kernels] | None:
    """Kernel regression of the change with K₀, and its coefficients' singular values; None if constraints contradict.

    ``kernels`` are those of the blocks, summed over outputs, in float64.
    """
    whole = total(kernels) if feats.c == 1 else feats.kernel(precision="float64")
    found = _fitted(whole if feats.c > 1 else whole[:, None, :, None], change, Fixed())
    if found is None:
        return None
    values = {
        name: singular_values(block.map(dtype=torch.float64).combine(found.dual.to(feats.device)))
        for name, block in feats.blocks.items()
    }
    return _model_numbers(found, total(kernels), change, values), values


def fit_models(
    feats: TangentFeatures, kernels: Kernels, change: Tensor, goal: float | None, limit: float, planned: float,
    tick: Callable[[float], None],
) -> Models:  # fmt: skip
    """Kernel regression with K₀ and, if affordable, TwoSided at the strength whose alignment is nearest to K̄'s."""
    fixed = fixed_model(feats, kernels, change)
    if fixed is None:
        return Models({}, {}, "the constraints of two samples contradict each other")
    numbers, values = {"fixed": fixed[0]}, {"fixed": fixed[1]}
    if planned > limit:
        return Models(numbers, values, f"it may take {planned:.0e} operations, but the limit is {limit:.0e}")
    top = max(float(each[0]) for each in fixed[1].values())
    wide = feats.to(torch.float64)
    described: dict[float, tuple[dict[str, Any], Kernels]] = {}
    for k, share in enumerate(_STRENGTHS):
        tick((k + 0.2) / (len(_STRENGTHS) + 0.2))
        made = _fitted(wide, change, TwoSided(Quadratic(share * top**2)))
        if isinstance(made, Fit):
            kernel = made.transform(wide).kernel(outputs="trace")
            ranks = {name: singular_values(B) for name, B in made.coefficients.items()}
            described[share] = _model_numbers(made, kernel, change, ranks), ranks
    if described:
        best = min(described, key=lambda share: abs((described[share][0]["alignment"] or 0) - (goal or 0)))
        numbers["two_sided"] = described[best][0] | {"strength": best * top**2, "relative_strength": best}
        values["two_sided"] = described[best][1]
    return Models(numbers, values, None)


def _fitted(source: TangentFeatures | Tensor, change: Tensor, structure: Structure) -> Fit | KernelFit | None:
    try:
        return unwarned(source, change.double(), structure=structure, max_rounds=_FIT_ROUNDS)
    except TangentError:
        return None


def _model_numbers(found: Fit | KernelFit, kernel: Tensor, change: Tensor, values: Kernels) -> dict[str, Any]:
    certificates = ("objective", "feasibility", "stationarity", "rounds", "converged", "reason")
    return {
        "alignment": defined(alignment, kernel, change),
        **{name: getattr(found, name) for name in certificates},
        "effective_rank": {name: asdict(effective_rank(each)) for name, each in values.items()},
    }
