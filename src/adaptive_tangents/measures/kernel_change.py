"""How adapting the features changes the kernel, K_M − K₀: closed forms, and the change split by block and by side.

A side M = I + U diag(g − 1) Uᵀ adds Σ_j (g_j² − 1) times the Gram matrix of u_jᵀΦ; two sides also add an interaction; a scale
multiplies; the joint transform of ``Full`` adds a multiple of f fᵀ, f = φβ. Parts are computed this way, never as a
difference of two large kernels, and only a few kernels are held at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.checks import Values, as_tensor, check_choice, check_finite, check_real
from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.tangent_features import TangentFeatures, check_features
from adaptive_tangents.features.transforms import Entrywise, Joint, LowRank, Matrix, Side, Sides, Transform
from adaptive_tangents.kernels.derived_kernels import in_range, largest, power_of_two
from adaptive_tangents.linalg.factor_products import times
from adaptive_tangents.measures.alignment import alignment
from adaptive_tangents.runtime.memory import limit_for, require_memory

Outputs = Literal["full", "trace"]

_KERNELS = 11  # held at a time: the totals, one block's kernel and its parts, and the work space to contract them


@dataclass(frozen=True)
class KernelPart:
    """Measures of one part Δ of the change ΔK = K_M − K₀ of a kernel; all are zero if Δ is.

    Growth, contribution and target weight of the parts add up to those of the whole.

    Attributes:
        norm: ‖Δ‖/‖K₀‖.
        growth: tr Δ/tr K₀.
        contribution: ⟨Δ, ΔK⟩/‖ΔK‖², the part's share of the whole change.
        target_cosine: ⟨Δ, K_y⟩/(‖Δ‖‖K_y‖), how far Δ points along the target kernel.
        target_weight: ⟨Δ, K_y⟩/‖K_y‖², the multiple of K_y in Δ.
    """

    norm: float
    growth: float
    contribution: float
    target_cosine: float
    target_weight: float


@dataclass(frozen=True, eq=False)
class KernelChange:
    """The change K_M − K₀ of a kernel, by block and by side. Sides add up to their block, blocks to the whole.

    Attributes:
        whole: the whole change.
        blocks: the change of each block's kernel.
        sides: the parts of each block that its transform has: "left" (M_L alone, M_R = I), "right", "scale", "entries" or
            "joint", and with several of them "interaction", the remainder.
        alignment: of the kernel with the targets, before and after.
        centered: the same for centered kernels; None if one of them is zero.
        kernels: every side's Δ, (n, c, n, c), or (n, n) for outputs="trace"; None unless ``keep`` was set.
    """

    whole: KernelPart
    blocks: Mapping[str, KernelPart]
    sides: Mapping[str, Mapping[str, KernelPart]]
    alignment: tuple[float, float]
    centered: tuple[float, float] | None
    kernels: Mapping[str, Mapping[str, Tensor]] | None = field(default=None, repr=False)

    def summary(self) -> str:
        """The change as a table to read."""
        before, after = self.alignment
        also = "" if self.centered is None else f" (centered {self.centered[0]:.3f} → {self.centered[1]:.3f})"
        width = max(12, *(len(name) for name in self.blocks))
        heads = ("of the change", "norm", "growth", "along K_y", "times K_y")
        rows = [
            f"kernel change, alignment with the targets {before:.3f} → {after:.3f}{also}",
            f"{'block':<{width}}  {'side':<12}" + "".join(f"{head:>15}" for head in heads),
            _row(width, "all", "", self.whole),
        ]
        for name, part in self.blocks.items():
            sides = self.sides[name]
            only = next(iter(sides)) if len(sides) == 1 else ""
            rows.append(_row(width, name, only, part))
            if not only:
                rows += [_row(width, "", side, share) for side, share in sides.items()]
        return "\n".join(rows)


def kernel_change(
    feats: TangentFeatures,
    transforms: Mapping[str, Transform],
    y: Values,
    *,
    outputs: Outputs = "full",
    keep: bool = False,
) -> KernelChange:
    r"""How transforms M of the blocks change the kernel of features, K_M − K₀, split by block and by side.

    The target kernel is K_y = vec(y)vec(y)ᵀ, or Σ_c y_c y_cᵀ for outputs="trace". Computed in float64.
    ``fit.kernel_change()`` calls this with the fit's own features, transforms and targets.

    Args:
        feats: tangent features φ of n samples with c outputs.
        transforms: M by block; a block without one does not change.
        y: targets, (n, c), or (n,) where c = 1.
        outputs: "full" for (n, c, n, c), "trace" for its trace over outputs, (n, n).
        keep: also return every part's kernel. Otherwise parts are computed twice, one block at a time, to save memory.

    Raises:
        TangentError: when blocks are unknown, a joint transform is mixed with others, targets do not fit, are not finite or
            are zero, the kernel is zero, or there is not enough memory.

    Source: theory in the docs, §5; LeJeune & Alemohammad, CPAL 2024, §3.

    >>> import torch, adaptive_tangents as at
    >>> feats = at.tangent_features(torch.nn.Linear(3, 1), torch.randn(6, 3))
    >>> found = kernel_change(feats, {"weight": at.features.transforms.Sides(scale=2.0)}, torch.randn(6, 1))
    >>> round(found.whole.norm, 6), list(found.sides["weight"])  # (s² − 1)K₀
    (3.0, ['scale'])
    """
    check_features("kernel_change", feats)
    check_choice("kernel_change", "outputs", outputs, ("full", "trace"))
    joint = _check_transforms(feats, transforms)
    targets = _check_targets(feats, y)
    unit = power_of_two(largest(targets), 32)
    shape = (feats.n, feats.c) if outputs == "full" else (feats.n,)
    size = torch.Size(shape).numel()
    kept = 4 * len(feats.blocks) if keep else 0
    require_memory(
        "kernel_change", (_KERNELS + kept) * 8 * size**2, limit_for(feats.limit, feats.device),
        remedy="use outputs='trace', keep=False, or fewer samples",
    )  # fmt: skip
    along = None if joint is None else _along(feats, joint)

    def sides_of(name: str) -> dict[str, Tensor]:
        return _sides_of(_alone(feats, name), transforms.get(name), along, outputs)

    kernel = torch.zeros(*shape, *shape, dtype=torch.float64, device=feats.device)
    for name in feats.blocks:
        kernel += _alone(feats, name).kernel(outputs=outputs)
    if not bool(kernel.any()):
        raise TangentError("kernel_change: the initial kernel is zero, so its change has no scale")
    scale = power_of_two(largest(kernel))
    held = {name: sides_of(name) for name in feats.blocks} if keep else {}
    change = torch.zeros_like(kernel)
    for name in feats.blocks:
        change += _sum(held.get(name) or sides_of(name), kernel)
    kernel, change = kernel.div_(scale), change.div_(scale)
    measure = _Measure(kernel, change, targets.reshape(size, -1) / unit, scale, unit)
    measured = {name: measure.sides(held.get(name) or sides_of(name)) for name in feats.blocks}
    whole = measure(change)
    before = _aligned(kernel, targets)
    kernel += change
    del change, measure  # free memory for centering
    after = _aligned(kernel, targets)
    return KernelChange(
        whole,
        {name: block for name, (block, _) in measured.items()},
        {name: sides for name, (_, sides) in measured.items()},
        (before[0], after[0]),
        None if before[1] is None or after[1] is None else (before[1], after[1]),
        held if keep else None,
    )


def side_change(
    feats: TangentFeatures, left: Mapping[str, LowRank], right: Mapping[str, LowRank], *, outputs: Outputs = "full"
) -> Tensor:
    r"""The change K_M − K₀ by low-rank sides; with left sides only, Σ_ℓ Σ_j (a_j² − 1)·gram(u_jᵀΦ_ℓ).

    A block with both sides adds its left part, its right part, and Σ_jk (a_j² − 1)(b_k² − 1)·gram(u_jᵀΦv_k).

    Args:
        feats: tangent features φ of n samples with c outputs.
        left: M_L = I + U diag(a − 1) Uᵀ, by block.
        right: M_R = I + V diag(b − 1) Vᵀ, by block.
        outputs: "full" for (n, c, n, c), "trace" for its trace over outputs, (n, n).

    Raises TangentError for unknown blocks. Source: theory in the docs, §5.

    >>> import torch, adaptive_tangents as at
    >>> feats = at.tangent_features(torch.nn.Linear(3, 1, bias=False), torch.eye(3))
    >>> side_change(feats, {}, {"weight": LowRank(torch.eye(3)[:, :1], torch.tensor([2.0]))}, outputs="trace").diagonal()
    tensor([3., 0., 0.])
    """
    _check_names(feats, {**left, **right})
    total = _nothing(feats, outputs)
    for name in {**left, **right}:
        one = _alone(feats, name, feats.dtype)
        for part in _sides_of(one, Sides(left.get(name), right.get(name)), None, outputs).values():
            total = total + part
    return total


def scale_change(feats: TangentFeatures, scales: Mapping[str, float], *, outputs: Outputs = "full") -> Tensor:
    r"""The change K_M − K₀ by one factor s_ℓ for each block: Σ_ℓ (s_ℓ² − 1)K_ℓ.

    Args:
        feats: tangent features φ of n samples with c outputs.
        scales: s_ℓ by block.
        outputs: "full" for (n, c, n, c), "trace" for its trace over outputs, (n, n).

    Raises TangentError for unknown blocks. Source: theory in the docs, §5.

    >>> import torch, adaptive_tangents as at
    >>> feats = at.tangent_features(torch.nn.Linear(3, 1), torch.randn(4, 3))
    >>> bool(torch.allclose(scale_change(feats, {"weight": 2.0}), 3 * feats.kernel()))
    True
    """
    _check_names(feats, scales)
    total = _nothing(feats, outputs)
    for name, scale in scales.items():
        total = total + (scale**2 - 1) * _alone(feats, name, feats.dtype).kernel(outputs=outputs)
    return total


def joint_change(feats: TangentFeatures, joint: Joint, *, outputs: Outputs = "full") -> Tensor:
    r"""The change K_M − K₀ by the joint transform M = I + (z − 1)bbᵀ, ‖b‖ = 1: (z² − 1)(φb)(φb)ᵀ.

    For a fit with ``Full``, b = β/‖β‖, this is ((z² − 1)/‖β‖²)·f fᵀ with f = φβ the fitted function on these samples. On the
    samples of an interpolating fit it is a multiple of the target kernel r rᵀ.

    Args:
        feats: tangent features φ of n samples with c outputs.
        joint: b and z.
        outputs: "full" for (n, c, n, c), "trace" for its trace over outputs, (n, n).

    Raises TangentError for unknown blocks. Source: theory in the docs, §5.

    >>> import torch, adaptive_tangents as at
    >>> feats = at.tangent_features(torch.nn.Linear(2, 1, bias=False), torch.eye(2))
    >>> joint_change(feats, Joint({"weight": torch.tensor([[1.0, 0.0]])}, 2.0), outputs="trace")
    tensor([[3., 0.],
            [0., 0.]])
    """
    _check_names(feats, joint.direction)
    along = _along(feats, joint, feats.dtype)
    return (joint.gain**2 - 1) * _outer(along, along, outputs)


@dataclass(frozen=True)
class _Projection(Matrix):
    """The rows √|g_j² − 1|·u_jᵀ of a side: with k directions, that side of the features becomes k wide."""

    values: Float[Tensor, "k d"]

    def apply(self, rows: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch k"]:
        return times(rows, self.values.to(rows.dtype).mT)

    def matrix(self) -> Float[Tensor, "k d"]:
        return self.values


def _signed(side: LowRank | None) -> list[tuple[float, _Projection | None]]:
    """MᵀM − I as a sum of ±WᵀW; the identity if there is no side."""
    if side is None:
        return [(1.0, None)]
    weights = side.gains**2 - 1
    found: list[tuple[float, _Projection | None]] = []
    for sign in (1.0, -1.0):
        kept = sign * weights > 0
        if bool(kept.any()):
            rows = side.directions[:, kept] * (sign * weights[kept]).sqrt()
            found.append((sign, _Projection(rows.mT)))
    return found


def _projected(one: TangentFeatures, left: LowRank | None, right: LowRank | None, outputs: Outputs) -> Tensor:
    """The kernel of one block with M_LᵀM_L − I and M_RᵀM_R − I between its features."""
    ((name, block),) = one.blocks.items()
    total: Tensor | None = None
    for sign, first in _signed(left):
        for other, second in _signed(right):
            shape = (
                block.shape[0] if first is None else len(first.values),
                block.shape[1] if second is None else len(second.values),
            )
            moved = replace(block.transformed(first, second), shape=shape)
            kernel = replace(one, blocks={name: moved}).kernel(outputs=outputs).mul_(sign * other)
            total = kernel if total is None else total.add_(kernel)
    return _nothing(one, outputs) if total is None else total


def _sides_of(
    one: TangentFeatures, transform: Transform | None, along: Float[Tensor, "n c"] | None, outputs: Outputs
) -> dict[str, Tensor]:
    """The change of one block's kernel, side by side."""
    ((name, block),) = one.blocks.items()
    if transform is None:
        return {}
    if isinstance(transform, Joint):
        # Φ_ℓ becomes Φ_ℓ + (z − 1) f b_ℓ, f = φb over all blocks.
        assert along is not None
        direction = transform.direction[name].to(along)
        own, step = block.inner(direction[None])[..., 0], transform.gain - 1
        both = _outer(own, along, outputs) + _outer(along, own, outputs)
        return {"joint": step * both + (step**2 * float((direction**2).sum())) * _outer(along, along, outputs)}
    if isinstance(transform, Entrywise):
        return {"entries": one.transformed({name: transform}).kernel(outputs=outputs) - one.kernel(outputs=outputs)}
    found: dict[str, Tensor] = {}
    if transform.left is not None:
        found["left"] = _both(one, transform.left, None, outputs)
    if transform.right is not None:
        found["right"] = _both(one, None, transform.right, outputs)
    sides = dict(found)
    interaction = _both(one, transform.left, transform.right, outputs) if len(sides) == 2 else _nothing(one, outputs)
    if transform.scale != 1:
        square = transform.scale**2
        found["scale"] = (square - 1) * one.kernel(outputs=outputs)
        # s²(K₀ + sides + interaction) − K₀, minus the parts.
        interaction = square * interaction + (square - 1) * _sum(sides, interaction)
    if len(found) > 1:
        found["interaction"] = interaction
    return found


def _both(one: TangentFeatures, left: Side | None, right: Side | None, outputs: Outputs) -> Tensor:
    """What one side adds to a block's kernel; for two sides, their interaction only."""
    if isinstance(left, LowRank | None) and isinstance(right, LowRank | None):
        return _projected(one, left, right, outputs)
    moved = one.transformed(dict.fromkeys(one.blocks, Sides(left, right))).kernel(outputs=outputs)
    change: Tensor = moved - one.kernel(outputs=outputs)
    if left is not None and right is not None:
        change = change - _both(one, left, None, outputs) - _both(one, None, right, outputs)
    return change


def _alone(feats: TangentFeatures, name: str, dtype: torch.dtype = torch.float64) -> TangentFeatures:
    """The features of one block."""
    block = feats.blocks[name].map(dtype=dtype)
    return TangentFeatures(feats.n, feats.c, {name: block}, feats.parameters, feats.limit)


def _along(feats: TangentFeatures, joint: Joint, dtype: torch.dtype = torch.float64) -> Float[Tensor, "n c"]:
    """φb of the joint direction b, one block at a time."""
    parts = (_alone(feats, name, dtype).inner({name: b.to(feats.device, dtype)}) for name, b in joint.direction.items())
    return sum(parts, torch.zeros(feats.n, feats.c, dtype=dtype, device=feats.device))


def _outer(a: Float[Tensor, "n c"], b: Float[Tensor, "n c"], outputs: Outputs) -> Tensor:
    """The kernel a bᵀ."""
    return a @ b.mT if outputs == "trace" else torch.einsum("ka,lb->kalb", a, b)


def _nothing(feats: TangentFeatures, outputs: Outputs) -> Tensor:
    shape = (feats.n, feats.c) if outputs == "full" else (feats.n,)
    return torch.zeros(*shape, *shape, dtype=feats.dtype, device=feats.device)


def _sum(sides: Mapping[str, Tensor], like: Tensor) -> Tensor:
    total = torch.zeros_like(like)
    for kernel in sides.values():
        total += kernel
    return total


class _Measure:
    """The measures of a part Δ, given K₀/s, ΔK/s and Y/t with K_y = Y Yᵀ."""

    def __init__(
        self, initial: Tensor, change: Tensor, target: Float[Tensor, "N k"], scale: float, unit: float
    ) -> None:
        self.unit, self.unscaled = (scale, 1 / unit, 1 / unit), scale
        size, self.shape = len(target), change.shape
        initial, self.change, self.target = initial.reshape(size, size), change.reshape(size, size), target
        self.scale, self.trace = float(initial.norm()), float(initial.trace())
        self.size, self.target_size = float(change.norm()), float((target.mT @ target).norm())

    def sides(self, kernels: Mapping[str, Tensor]) -> tuple[KernelPart, dict[str, KernelPart]]:
        """The measures of the sum of the kernels, and of each."""
        parts = {side: kernel / self.unscaled for side, kernel in kernels.items()}
        return self(_sum(parts, self.change.reshape(self.shape))), {side: self(part) for side, part in parts.items()}

    def __call__(self, kernel: Tensor) -> KernelPart:
        part = kernel.reshape(self.change.shape)
        size = float(part.norm())
        if size == 0:
            return KernelPart(0.0, 0.0, 0.0, 0.0, 0.0)
        along = float(((part @ self.target) * self.target).sum()) / self.target_size
        return KernelPart(
            norm=size / self.scale,
            growth=float(part.trace()) / self.trace,
            contribution=float((part * self.change).sum()) / self.size**2 if self.size > 0 else 0.0,
            target_cosine=along / size,
            target_weight=in_range("kernel_change", "the target weight", along / self.target_size, *self.unit),
        )


def _row(width: int, block: str, side: str, part: KernelPart) -> str:
    return (
        f"{block:<{width}}  {side:<12}{100 * part.contribution:>13.1f} %{part.norm:>15.3g}{100 * part.growth:>+13.1f} %"
        f"{part.target_cosine:>15.3f}{part.target_weight:>15.3g}"
    )


def _check_names(feats: TangentFeatures, named: Mapping[str, object]) -> None:
    for name in named:
        if name not in feats.blocks:
            raise TangentError(f"kernel_change: there is no block {name!r}; blocks are {', '.join(feats.blocks)}")


def _check_transforms(feats: TangentFeatures, transforms: Mapping[str, Transform]) -> Joint | None:
    """The joint transform, if it is one."""
    _check_names(feats, transforms)
    joints = {id(t): t for t in transforms.values() if isinstance(t, Joint)}
    if not joints:
        return None
    if len(joints) > 1 or not all(isinstance(t, Joint) for t in transforms.values()):
        raise TangentError(
            "kernel_change: a joint transform moves all of its blocks together and cannot be combined with others; "
            "pass it alone, the same for every block"
        )
    (joint,) = joints.values()
    if set(joint.direction) != set(transforms):
        raise TangentError(
            f"kernel_change: the joint transform moves blocks {', '.join(joint.direction)} and was given for "
            f"{', '.join(transforms)}; give it for each block that it moves"
        )
    return joint


def _check_targets(feats: TangentFeatures, y: object) -> Float[Tensor, "n c"]:
    call = "kernel_change"
    given = as_tensor(call, "targets", y, feats.device)
    y = given[:, None] if given.ndim == 1 and feats.c == 1 else given
    if tuple(y.shape) != (feats.n, feats.c):
        raise TangentError(
            f"{call}: targets have shape {tuple(given.shape)}, features are of n = {feats.n} samples, c = {feats.c} outputs"
        )
    if y.device != feats.device:
        raise TangentError(
            f"{call}: targets are on {y.device} and features on {feats.device}; move one with .to(device)"
        )
    check_real(call, y, "real numbers, e.g. y.double()")
    check_finite(call, "the target", [y])
    if not bool(y.any()):
        raise TangentError(f"{call}: the targets are zero, so there is no target kernel")
    return y.detach().double()


def _aligned(kernel: Tensor, y: Float[Tensor, "n c"]) -> tuple[float, float | None]:
    """Alignment, and that of centered kernels; None if centering leaves only rounding of the kernel or the targets."""
    plain = alignment(kernel, y)
    try:
        return plain, alignment(kernel, y, centered=True)
    except TangentError:
        return plain, None
