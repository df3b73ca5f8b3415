"""Systems whose metric is the curvature of Ω̃ at a point, not the held transform's: for kernels of few coefficients.

With E₀ the curvature, made positive, the step for w = w₀ + φᵀη minimizes ⟨E₀v, v⟩/2 + L″(φv)/2 − ⟨w, v⟩. This is the held
system with 2E₀⁻¹ in place of MᵀM, and its kernel is φ·2E₀⁻¹·φᵀ. Since E₀ = 2I where nothing adapts, that is K₀ + CCᵀ, with
one column of C for each direction in which E₀ is less than 2. From factors, CCᵀ is made without C.
"""

import math
from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.linalg.kernel_systems import DenseKernel, KernelSystem
from adaptive_tangents.solvers import costs
from adaptive_tangents.solvers.held_features import Coefficients, Factored, HeldFeatures
from adaptive_tangents.solvers.problem import Point, Problem, System
from adaptive_tangents.structures.base import JoinedCurvature, Solution
from adaptive_tangents.structures.spectral import SpectralCurvature

_LEAST = 0.3  # eigenvalues of E₀ are at least this share of the smaller of 2/z_i² and 2/z_j²
_LITTLE = 1.3  # directions in which 2E₀⁻¹ is below this are taken to be unadapted
_ROWS = 128  # of the kernel at once
_BUFFER = 4_000_000  # bytes of what is made from factors at once, so that it stays in a processor's cache


class InverseCurvature:
    r"""2E₀⁻¹ of one block, from its curvature at B = U diag(σ) Vᵀ; E₀ has the absolute values of the curvature's eigenvalues.

    In the singular basis, Y = UᵀXV, it multiplies the symmetric and the antisymmetric part of each pair Y_ij, Y_ji, and what
    is outside the row or column space, by numbers from 1 on.
    """

    def __init__(self, curvature: SpectralCurvature) -> None:
        u, v = curvature.u, curvature.vt.mT
        self.turned = u.shape[0] > v.shape[0]  # a tall block is treated as its transpose
        self.u, self.v = (v, u) if self.turned else (u, v)
        slope = curvature.inner.slope
        least = _LEAST * torch.minimum(slope[:, None], slope)
        symmetric, antisymmetric = (_thresholded(2 / torch.maximum(e.abs(), least)) for e in curvature.multipliers)
        self.outside = _thresholded(2 / slope)
        # Singular values fall, so that the first rows and columns are those that adapt.
        self.adapted = int((self.outside > 1).sum())
        for part in (symmetric, antisymmetric):
            part[self.adapted :, self.adapted :] = 1.0
        self.symmetric, self.antisymmetric = symmetric, antisymmetric

    @cached_property
    def _inside(self) -> tuple[Tensor, Tensor]:
        """The multipliers of Y, less those outside, and of Yᵀ."""
        same, crossed = (self.symmetric + self.antisymmetric) / 2, (self.symmetric - self.antisymmetric) / 2
        return same - self.outside[:, None], crossed

    def __call__(self, x: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        same, crossed = self._inside
        part = self.u.mT @ (x.mT if self.turned else x)
        inside = part @ self.v
        found = self.u @ ((same * inside + crossed * inside.mT) @ self.v.mT + self.outside[:, None] * part)
        return found.mT if self.turned else found

    def columns(self, features: Float[Tensor, "k o i"]) -> Float[Tensor, "k m"]:
        """C of this block."""
        features = features.mT if self.turned else features
        first, (k, i) = self.adapted, (self.u.shape[1], self.v.shape[0])
        basis = torch.cat([self.v, torch.linalg.qr(self.v, mode="complete").Q[:, k:]], 1) if k < i else self.v
        # The entries of Y in the first rows and in the first columns.
        above = (self.u[:, :first].mT @ features) @ basis
        below = self.u.mT @ (features @ self.v[:, :first])
        a, b = torch.triu_indices(first, k, device=basis.device)
        parts = [self._pairs(above[:, a, b], below[:, b, a], a, b, sign) for sign in (1, -1)]
        beside = above[:, :, k:] * (self.outside[:first, None] - 1).sqrt()
        return torch.cat([*parts, beside.flatten(1)], 1)

    def _pairs(self, one: Tensor, other: Tensor, a: Tensor, b: Tensor, sign: int) -> Float[Tensor, "k m"]:
        """The columns of the symmetric or antisymmetric parts of the pairs Y_ab, Y_ba."""
        more = (self.symmetric if sign > 0 else self.antisymmetric)[a, b] - 1
        kept = (more > 0) & ((a < b) | (sign > 0))
        # A pair of one entry is twice that entry.
        scale = (more / torch.where(a == b, 4.0, 2.0)).sqrt()
        return (torch.add(one, other, alpha=sign) * scale)[:, kept]

    def contracted(self, features: Factored) -> Iterator[tuple[slice, Float[Tensor, "r m"]]]:
        """CCᵀ of this block from its factors, some rows at a time up to their last diagonal entry.

        Each sample has c projections L on one of U, V and one, R, on the other. With S, T the multipliers of Y, Yᵀ, entries
        are Σ_m L_m L'_m Σ_j S_mj R_j R'_j + Σ_j R_j L'_j Σ_m T_mj L_m R'_m, and what is outside the singular basis.
        """
        signals, inputs, (same, crossed), outside = features.signals, features.inputs, self._inside, self.outside - 1
        if self.turned:
            several, one, same = signals @ self.v, inputs @ self.u, same.mT
            beside = (one * outside) @ one.mT
        else:
            several, one = signals @ self.u, inputs @ self.v
            beside = inputs @ inputs.mT
        n, c, k = several.shape
        turns = one.mT[:, :, None] * crossed[:, None]  # T_mj R'_m, for all samples
        step = max(1, _BUFFER // (8 * n * c * k))
        for start in range(0, n, step):
            stop = min(n, start + step)
            left, right, before = several[start:stop], one[start:stop, None], one[:stop]
            weights = before @ (right * same).mT
            if not self.turned:
                weights += beside[start:stop, :stop, None] * outside
            made = (left.flatten(0, 1) @ turns[:, :stop].flatten(1)).view(-1, c, stop, k)
            made.mul_(right[:, None]).addcmul_(weights[:, None], left[:, :, None])
            block = (made.flatten(0, 1).transpose(0, 1) @ several[:stop].mT).transpose(0, 1).flatten(1)
            if self.turned:
                products = signals[start:stop].flatten(0, 1) @ signals[:stop].flatten(0, 1).mT
                shares = beside[start:stop, :stop].repeat_interleave(c, 0).repeat_interleave(c, 1)
                block = block.addcmul(products, shares)
            yield slice(start * c, stop * c), block


def _thresholded(factors: Tensor) -> Tensor:
    return torch.where(factors < _LITTLE, 1.0, factors)


def effort(held: HeldFeatures) -> float:
    """What a system costs, as in ``costs``; ∞ where it cannot be made."""
    sides = [min(held.layout.shapes[name]) for name in held.rest]
    made = all(isinstance(part, Factored) for part in held.rest.values())
    return costs.curved_kernel(held.n, held.c, _width(held), sides) if made else math.inf


def serves(problem: Problem, solution: Solution) -> bool:
    """Whether steps of this problem are to be preconditioned by the curvature of a solution like this."""
    if _curvatures(solution) is None:
        return False
    held = problem.held
    return costs.curved(problem.feats, problem.form, problem.room, _width(held), effort(held))


def curved_system(problem: Problem, point: Point, plain: KernelSystem) -> System | None:
    """The system with the curvature at a point as its metric, from K₀; None where nothing is tempered."""
    curvatures = _curvatures(point.solution)
    if curvatures is None or not isinstance(plain, DenseKernel):
        return None
    with problem.timed("kernels"):
        inverses = {name: InverseCurvature(curvature) for name, curvature in curvatures.items()}
        matrix = plain.matrix.clone()
        for rows, part in _parts(problem.held, inverses):
            matrix[rows, : rows.stop] += part
        kernel = DenseKernel(matrix.tril() + matrix.tril(-1).mT, problem.constraints.kept)
    layout = problem.held.layout

    def metric(x: Coefficients) -> Coefficients:
        return layout.join({name: inverses[name](matrix) for name, matrix in layout.split(x).items()})

    return problem.inverted(point.solution.transforms, kernel, point.outputs, metric)


def _width(held: HeldFeatures) -> int:
    """How many coefficients have columns."""
    return 0 if held.rows is None else held.rows.shape[1]


def _curvatures(solution: Solution) -> Mapping[str, SpectralCurvature] | None:
    """The curvature of each block, if all are spectral."""
    if not isinstance(solution.curvature, JoinedCurvature):
        return None
    found = {k: part for k, part in solution.curvature.blocks.items() if isinstance(part, SpectralCurvature)}
    return found if len(found) == len(solution.gradient) else None


def _parts(
    held: HeldFeatures, inverses: Mapping[str, InverseCurvature]
) -> Iterator[tuple[slice, Float[Tensor, "r m"]]]:
    """CCᵀ of all blocks, some rows at a time up to their last diagonal entry."""
    columns, start = [], 0
    for name, (o, i) in held.layout.shapes.items():
        part = held.rest.get(name)
        if isinstance(part, Factored):
            yield from inverses[name].contracted(part)
        elif held.rows is not None:
            columns.append(inverses[name].columns(held.rows[:, start : start + o * i].reshape(-1, o, i)))
            start += o * i
    if columns:
        joined = torch.cat(columns, 1)
        for first in range(0, len(joined), _ROWS):
            rows = slice(first, min(len(joined), first + _ROWS))
            yield rows, joined[rows] @ joined[: rows.stop].mT
