"""Checks of what users pass to a fit: features or a kernel; and targets, labels and offsets, made into a loss."""

import math
from collections.abc import Mapping
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from adaptive_tangents.checks import as_tensor, check_choice, check_finite, check_real
from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.blocks import check_finite_blocks
from adaptive_tangents.features.tangent_features import TangentFeatures, described
from adaptive_tangents.kernels.derived_kernels import largest
from adaptive_tangents.kernels.tiles import StoredKernel
from adaptive_tangents.solvers.losses import CrossEntropy, Loss, LossName, SquaredError

_LEAST = 1e-60  # features, targets and coefficients from 1e-60 to 1e60 have squares and products within 1e±240


def check_features_or_kernel(call: str, given: object) -> None:
    """Raise TangentError unless features or a kernel are given (not, say, the samples themselves)."""
    kernel = isinstance(given, TangentFeatures | Mapping | StoredKernel) or hasattr(given, "opened")
    if isinstance(given, Tensor | np.ndarray):
        shape = tuple(given.shape)
        kernel = (len(shape) == 2 and shape[0] == shape[1]) or (len(shape) == 4 and shape[:2] == shape[2:])
    if not kernel:
        raise TangentError(
            f"{call}: takes features, such as at.tangent_features(model, x), or a kernel: a store, a tensor (n, n) or "
            f"(n, c, n, c), or a mapping of blocks to tensors; got {described(given)}"
        )


def goal_of(feats: TangentFeatures, r: object, *, loss: str, offset: object, ridge: float) -> Loss:
    """The loss on the outputs of these features; raises TangentError when shapes, dtypes or values do not fit."""
    check_choice("fit", "loss", loss, get_args(LossName))
    r = as_tensor("fit", "targets" if loss == "squared" else "labels", r, feats.device)
    offset = None if offset is None else as_tensor("fit", "offset", offset, feats.device)
    return (_cross_entropy if loss == "cross-entropy" else _squared)(feats, r, offset, ridge)


def check_moderate(call: str, size: float, targets: Tensor) -> None:
    """Raise TangentError if float64 does not hold squares of features of this size, of targets, or of coefficients."""
    aim = largest(targets)
    sizes = {"features": size, "targets": aim, "coefficients": aim / size if size else 0.0}
    for what, found in sizes.items():
        if found != 0 and not _LEAST <= found <= 1 / _LEAST:
            raise TangentError(
                f"{call}: {what} are of size {found:.0e} (features {size:.0e}, targets {aim:.0e}), whose squares leave too "
                "little of float64's range; scale both, e.g. output_fn=lambda out: out / scale and r / scale"
            )


def size_of(call: str, feats: TangentFeatures) -> float:
    """The size of features, from a sum of them with signs; raises TangentError unless they are finite."""
    check_finite_blocks(call, feats.blocks)
    signs = torch.ones(feats.n, feats.c, dtype=feats.dtype, device=feats.device)
    signs[::2] = -1
    sizes = [largest(matrix) for matrix in feats.combine(signs).values()]
    return max(sizes) if all(map(math.isfinite, sizes)) else math.inf  # max hides NaN


def check_results(call: str, *values: float) -> None:
    """Raise TangentError if a result is not finite."""
    if not all(map(math.isfinite, values)):
        raise TangentError(
            f"{call}: the objective is beyond float64's range; scale features and targets, or use a larger ridge "
            "or another penalty"
        )


def _squared(feats: TangentFeatures, r: Tensor, offset: Tensor | None, ridge: float) -> SquaredError:
    if offset is not None:
        raise TangentError("fit: offset is for cross-entropy; for squared error give r = y − f(x;θ₀)")
    given = tuple(r.shape)
    r = r[:, None] if r.ndim == 1 and feats.c == 1 else r
    if tuple(r.shape) != (feats.n, feats.c):
        numbers = given == (feats.n,) and not r.is_floating_point()
        raise TangentError(
            f"fit: targets have shape {given}, features are of n = {feats.n} samples, c = {feats.c} outputs"
            + ("; class numbers need loss='cross-entropy', offset=f(x;θ₀) and a ridge" if numbers else "")
        )
    _check_device(feats, "targets", r)
    check_real("fit", r)
    check_finite("fit", "the target", [r])
    check_moderate("fit", size_of("fit", feats), r)
    return SquaredError(r.detach().to(torch.float64, copy=True).flatten(), ridge)  # y may change in place later


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
    check_moderate("fit", size_of("fit", feats), torch.ones(1, device="cpu"))
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
