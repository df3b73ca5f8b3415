"""One factor for each mode of a convolution's kernel: output channels, input channels, window."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.features.transforms import LowRank, Modal, Sides
from adaptive_tangents.penalties.closed_forms import Penalty, Quadratic
from adaptive_tangents.structures.base import BlockSolution, BlockStructure, Fixed
from adaptive_tangents.structures.inner import Inner
from adaptive_tangents.structures.spectral import Left, Right, TwoSided

_OUT, _IN = "out", "in"
_SWEEPS = 500
_STILL = 1e-13  # relative change of the gradient over a sweep
_ROUNDING = 1e-9  # a smaller change that no longer shrinks is rounding


@dataclass(frozen=True)
class Modes(BlockStructure):
    r"""M = M_out ⊗ M_in ⊗ M_spatial: one factor for each mode of a convolution's kernel W (out, in, spatial).

    The window is one mode ("spatial", of size kh·kw); ``Block.modes`` names the modes of a block's input side. M_out also
    acts on the bias column; the input side's factors do not. The block of a linear layer has no modes; it gets the sides of
    ``TwoSided``, "out" on the left and "in" on the right, with the bias as one more input.

    With a penalty on one mode, this is ``Left`` of that mode's unfolding. With several there is no closed form. The modes are
    updated in turn, each exactly with the others held (from the singular values of its unfolding of the coefficients,
    whitened by the other modes), until nothing changes. No update raises the objective, and at the end no single mode can
    lower it. There is then no curvature and no dual bound, and ∇Ω̃ = 2 M⁻¹M⁻ᵀβ at the M found.

    Args:
        penalties: one penalty for all modes, or a mapping from modes' names; modes without a penalty are not transformed.
        scale_invariant, scales: as in ``BlockStructure``.
        modes: names and sizes of each block's modes, set by ``prepared``.

    Raises:
        TangentError: when a penalty names a mode that no block has, or ``prepared`` has not seen the blocks.

    >>> import torch, adaptive_tangents as at
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(27, 1))
    >>> feats = at.tangent_features(model, torch.randn(6, 2, 5, 5))
    >>> found = at.fit(feats, torch.randn(6), structure=at.Modes({"out": at.Quadratic(1.0), "spatial": at.Quadratic(4.0)}))
    >>> found.transforms["0"].right.sizes  # in × spatial
    (2, 9)
    """

    penalties: Penalty | Mapping[str, Penalty] = field(default_factory=Quadratic)
    modes: Mapping[str, tuple[tuple[str, int], ...]] | None = field(default=None, kw_only=True, repr=False, hash=False)

    def prepared(self, feats: TangentFeatures) -> "Modes":
        modes = {name: block.modes for name, block in feats.blocks.items()}
        known = [_OUT, _IN, *dict.fromkeys(mode for found in modes.values() for mode, _ in found if mode != _IN)]
        if not isinstance(self.penalties, Penalty):
            unknown = [mode for mode in self.penalties if mode not in known]
            if unknown or not self.penalties:
                raise TangentError(
                    f"Modes: give penalties by the names of modes, got {sorted(self.penalties)}; modes of these features "
                    f"are {', '.join(known)}"
                )
        return replace(self, modes=modes, scales=super().prepared(feats).scales)

    def for_block(self, name: str) -> BlockStructure:
        if self.modes is None or name not in self.modes:
            raise TangentError(
                f"Modes: the modes of block {name!r} are not known; use structure.prepared(feats), as fit does"
            )
        modes, given = self.modes[name], self.penalties
        names = (_OUT, *(mode for mode, _ in modes)) if modes else (_OUT, _IN)
        chosen = (
            dict.fromkeys(names, given) if isinstance(given, Penalty) else {k: given[k] for k in names if k in given}
        )
        axes = [k for k, mode in enumerate(names) if mode in chosen]
        if not axes:
            return Fixed()
        if axes == [0]:
            return Left(chosen[_OUT])
        if not modes:
            return TwoSided(chosen[_OUT], chosen[_IN]) if _OUT in chosen else Right(chosen[_IN])
        sizes = tuple(size for _, size in modes)
        if len(axes) == 1:
            return OneMode(sizes, axes[0], chosen[names[axes[0]]])
        return ManyModes(sizes, {axis: chosen[names[axis]] for axis in axes})

    def block_solution(self, matrix: Tensor) -> BlockSolution:
        return replace(self, modes={"": ()}).for_block("").block_solution(matrix)

    def block_dual(self, matrix: Tensor) -> float:
        return replace(self, modes={"": ()}).for_block("").block_dual(matrix)

    def block_proximal(self, matrix: Tensor, step: float) -> Tensor:
        return replace(self, modes={"": ()}).for_block("").block_proximal(matrix, step)


@dataclass(frozen=True)
class OneMode(BlockStructure):
    """One factor, on one mode of the input side: ``Left`` of that unfolding, and ‖·‖² of the bias."""

    sizes: tuple[int, ...]
    axis: int
    penalty_on_mode: Penalty

    def block_solution(self, matrix: Tensor) -> BlockSolution:
        flat, rest = self._unfold(matrix)
        found = Left(self.penalty_on_mode).block_solution(flat)
        assert isinstance(found.transform, Sides)
        assert isinstance(found.transform.left, LowRank)

        def curvature(x: Tensor) -> Tensor:
            part, beside = self._unfold(x)
            assert found.curvature is not None
            return self._fold(found.curvature(part), 2 * beside)

        factors = tuple(found.transform.left if k + 1 == self.axis else None for k in range(len(self.sizes)))
        return BlockSolution(
            Sides(right=Modal(self.sizes, factors)),
            found.penalty + float((rest**2).sum()),
            self._fold(found.gradient, 2 * rest),
            curvature,
        )

    def block_dual(self, matrix: Tensor) -> float:
        flat, rest = self._unfold(matrix)
        return Left(self.penalty_on_mode).block_dual(flat) + float((rest**2).sum()) / 4

    def block_proximal(self, matrix: Tensor, step: float) -> Tensor:
        flat, rest = self._unfold(matrix)
        return self._fold(Left(self.penalty_on_mode).block_proximal(flat, step), Fixed().block_proximal(rest, step))

    def _unfold(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        kernel, rest = _split(matrix, self.sizes)
        return kernel.movedim(self.axis, 0).flatten(1), rest

    def _fold(self, flat: Tensor, rest: Tensor) -> Tensor:
        shape = [rest.shape[0], *self.sizes]
        first = shape.pop(self.axis)
        return _merged(flat.reshape(first, *shape).movedim(0, self.axis), rest)


@dataclass(frozen=True)
class ManyModes(BlockStructure):
    """Two or more factors, on axes of the kernel W (out, *sizes), updated exactly in turn."""

    sizes: tuple[int, ...]
    penalties: Mapping[int, Penalty]

    def block_solution(self, matrix: Tensor) -> BlockSolution:
        kernel, rest = _split(matrix, self.sizes)
        factors: dict[int, LowRank] = {}
        spent: dict[int, float] = {}
        gradient, change = 2 * matrix, float("inf")
        for _ in range(_SWEEPS):
            for axis, penalty in self.penalties.items():
                flat = _whitened(kernel, {k: f for k, f in factors.items() if k != axis}).movedim(axis, 0).flatten(1)
                flat = torch.cat([flat, rest], 1) if axis == 0 else flat
                factors[axis], spent[axis] = _best_factor(flat, penalty)
            before, doubled = gradient, {axis: factor.squared() for axis, factor in factors.items()}
            beside = _whitened(rest, {k: f for k, f in doubled.items() if k == 0})
            gradient = 2 * _merged(_whitened(kernel, doubled), beside)
            last, change = change, float((gradient - before).norm()) / max(float(gradient.norm()), 1e-300)
            if change <= _STILL or last <= change <= _ROUNDING:
                break
        sides = tuple(factors.get(k + 1) for k in range(len(self.sizes)))
        right = Modal(self.sizes, sides) if any(side is not None for side in sides) else None
        value = sum(spent.values()) + float((matrix * gradient).sum()) / 2
        return BlockSolution(Sides(factors.get(0), right), value, gradient)

    def block_dual(self, matrix: Tensor) -> float:
        return 0.0 if float(matrix.abs().max()) == 0 else float("inf")

    def block_proximal(self, matrix: Tensor, step: float) -> Tensor:
        raise TangentError("proximal: Modes has a proximal operator with one mode only; use fit")


def _best_factor(flat: Float[Tensor, "d k"], penalty: Penalty) -> tuple[LowRank, float]:
    """The M with the least ‖M⁻¹T‖² + Ω(M), and its Ω(M)."""
    # T = RᵀQᵀ has R's singular values, and its left singular vectors are R's right ones: Q is not needed.
    small = torch.linalg.qr(flat.mT, mode="r").R if flat.shape[1] > flat.shape[0] else flat.mT
    _, values, vt = torch.linalg.svd(small, full_matrices=False)
    inner = Inner((penalty,), values)
    moved = inner.gains - 1 > torch.finfo(values.dtype).eps
    return LowRank(vt[moved].mT, inner.gains[moved]), inner.spent


def _whitened(kernel: Tensor, factors: Mapping[int, LowRank]) -> Tensor:
    """Apply M⁻¹ along each axis."""
    for axis, factor in factors.items():
        kernel = factor.inverse().apply(kernel.movedim(axis, -1)).movedim(-1, axis)
    return kernel


def _split(matrix: Float[Tensor, "o i"], sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The kernel (o, *sizes) and the columns after it (the bias)."""
    total = torch.Size(sizes).numel()
    return matrix[:, :total].reshape(-1, *sizes), matrix[:, total:]


def _merged(kernel: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([kernel.flatten(1), rest], 1)
