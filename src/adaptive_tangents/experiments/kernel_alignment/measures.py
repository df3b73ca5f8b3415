"""The measures of one trained network: its kernels, its path, and where on the path they equal the average."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.measures.alignment import alignment, decompose, representability

Checkpoint = Mapping[str, Tensor]


def sign(y: Tensor) -> Tensor:
    """−1 below zero, else 1, in the same dtype."""
    return torch.where(y < 0, -1.0, 1.0).to(y.dtype)


def kernels(
    feats: Mapping[str, TangentFeatures], change: Tensor, y: Tensor, near: Tensor, far: Tensor
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Alignments, parts and weights of the three kernels, and the kernels; ``near`` and ``far`` select samples."""
    blocks = {kind: f.kernel(outputs="trace", by_block=True) for kind, f in feats.items()}
    kernels = {kind: torch.stack(list(parts.values())).sum(0) for kind, parts in blocks.items()}
    diagonal = kernels["average"].diagonal()
    around = {"near": float(diagonal[near].mean()), "far": float(diagonal[far].mean())}
    found = representability(kernels["initial"], y[:, 0])
    decomposed = {kind: decompose(kernels[kind], kernels["initial"], change) for kind in ("average", "final")}
    measured: dict[str, Any] = {
        "alignment": {kind: alignment(kernel, change) for kind, kernel in kernels.items()},
        "alignment_centered": {kind: alignment(kernel, change, centered=True) for kind, kernel in kernels.items()},
        "alignment_target": {kind: alignment(kernel, y) for kind, kernel in kernels.items()},
        "block": {
            block: {
                "alignment": {kind: alignment(parts[block], change) for kind, parts in blocks.items()},
                "trace_share": {
                    kind: float(parts[block].trace() / kernels[kind].trace()) for kind, parts in blocks.items()
                },
            }
            for block in feats["initial"].blocks
        },
        "diagonal": around,
        "diagonal_ratio": around["near"] / around["far"],
        "decomposition": {
            kind: {"initial_weight": d.initial_weight, "target_weight": d.target_weight, "explained": d.explained}
            for kind, d in decomposed.items()
        },
        "representability": {
            "rkhs_norm": found.rkhs_norm,
            "top10_energy": float(found.energy[min(10, len(found.energy)) - 1]),
            "leave_one_out_rmse": found.leave_one_out_rmse,
        },
    }
    return measured, kernels


def places(
    model: nn.Module,
    start: Checkpoint,
    end: Checkpoint,
    x: Tensor,
    mean: Tensor,
    near: Tensor,
    far: Tensor,
    *,
    points: int,
) -> tuple[Tensor, dict[str, float]]:
    """Where on the path K_s(x, x) first passes K̄(x, x), by linear interpolation; NaN if it never does."""
    positions = torch.linspace(0, 1, points, device=mean.device, dtype=mean.dtype)
    rows = []
    for s in positions.tolist():
        between = {key: torch.lerp(start[key], end[key], s) for key in start}
        rows.append(tangent_features(model, x, params=between).kernel(outputs="trace").diagonal())
    place = first_crossing(positions, torch.stack(rows), mean)
    found = ~place.isnan()
    told = {"share": float(found.double().mean())}
    for key, which in (("all", found), ("near", near & found), ("far", far & found)):
        told[key] = float(place[which].median()) if bool(which.any()) else float("nan")
    return place, told


def first_crossing(
    positions: Float[Tensor, " k"], values: Float[Tensor, "k n"], levels: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Where each column first reaches its level, by linear interpolation; NaN if it never does.

    >>> first_crossing(torch.tensor([0.0, 1.0]), torch.tensor([[1.0, 2.0], [3.0, 2.5]]), torch.tensor([1.5, 9.0]))
    tensor([0.2500,    nan])
    """
    above = values - levels
    passed = (above[:-1] * above[1:]) <= 0
    k = passed.to(torch.int64).argmax(0)[None]
    low, high = above.gather(0, k)[0], above.gather(0, k + 1)[0]
    share = torch.where(low == high, torch.zeros_like(low), low / (low - high))
    place = positions[k[0]] + share * (positions[k[0] + 1] - positions[k[0]])
    return torch.where(passed.any(0), place, torch.full_like(place, torch.nan))


def vector(feats: TangentFeatures, parameters: Checkpoint) -> Tensor:
    """The parameters of the features, as one vector."""
    return torch.cat([parameters[name].flatten() for name in feats.parameters])


def linearization(
    model: nn.Module,
    start: Checkpoint,
    end: Checkpoint,
    x: Tensor,
    initial: TangentFeatures,
    *,
    points: int,
) -> tuple[Tensor, Tensor]:
    """Relative error of f(x;θ₀) + φ₀(x)(θ_s − θ₀) against f(x;θ_s), for s from 0 to 1 on the straight path."""
    step = initial.matvec(vector(initial, end) - vector(initial, start))
    positions = torch.linspace(0, 1, points)
    first, errors = outputs(model, start, x), [0.0]
    for s in positions[1:].tolist():
        between = {key: torch.lerp(start[key], end[key], s) for key in start}
        moved = outputs(model, between, x) - first
        errors.append(float((moved - s * step).norm() / moved.norm()))
    return positions, torch.tensor(errors)


def outputs(model: nn.Module, parameters: Checkpoint, x: Tensor) -> Tensor:
    """f(x) without gradients."""
    with torch.no_grad():
        return torch.func.functional_call(model, dict(parameters), (x,))  # type: ignore[no-any-return]


def errors(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """Mean squared error, and the share of samples with the wrong sign."""
    wrong = sign(prediction) != sign(target)
    return {"mse": float(((prediction - target) ** 2).mean()), "error": float(wrong.double().mean())}
