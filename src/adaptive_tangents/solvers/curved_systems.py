"""Systems whose metric is the curvature of Ω̃ at a point, not the held transform's: for kernels of few coefficients.

With E₀ the curvature, made positive, the step for w = w₀ + φᵀη minimizes ⟨E₀v, v⟩/2 + L″(φv)/2 − ⟨w, v⟩. This is the held
system with 2E₀⁻¹ in place of MᵀM, and its kernel is φ·2E₀⁻¹·φᵀ. Since E₀ = 2I where nothing adapts, that is K₀ + CCᵀ, with
one column of C for each direction in which E₀ is less than 2.
"""

from collections.abc import Callable, Mapping
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

Entries = Callable[[Tensor, Tensor], Tensor]  # of Y, at rows and columns
_LEAST = 0.3  # eigenvalues of E₀ are at least this share of the smaller of 2/z_i² and 2/z_j²
_LITTLE = 1.3  # directions in which 2E₀⁻¹ is below this are taken to be unadapted
_ROWS = 128  # of the kernel at once


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

    def columns(self, features: Tensor | Factored) -> Float[Tensor, "k m"]:
        """C of this block, from its features (nc, o, i)."""
        first, (k, i) = self.adapted, (self.u.shape[1], self.v.shape[0])
        basis = torch.cat([self.v, torch.linalg.qr(self.v, mode="complete").Q[:, k:]], 1) if k < i else self.v
        entries = self._entries(features, basis)
        a, b = torch.triu_indices(first, k, device=basis.device)
        parts = [self._pairs(entries, a, b, self.symmetric, 1), self._pairs(entries, a, b, self.antisymmetric, -1)]
        rows = torch.arange(first, device=basis.device).repeat_interleave(i - k)
        beside = torch.arange(k, i, device=basis.device).repeat(first)
        return torch.cat([*parts, entries(rows, beside) * (self.outside[rows] - 1).sqrt()], 1)

    def _entries(self, features: Tensor | Factored, basis: Float[Tensor, "i i"]) -> Entries:
        """The entries (nc, m) of Y at given rows and columns, of which one is among those that adapt."""
        first = self.adapted
        if isinstance(features, Factored):
            sides = features.signals, features.inputs[:, None]
            outer, inner = sides[::-1] if self.turned else sides
            left, right = outer @ self.u, inner @ basis
            return lambda a, b: (left[..., a] * right[..., b]).flatten(0, 1)
        features = features.mT if self.turned else features
        rows = (self.u[:, :first].mT @ features) @ basis
        columns = self.u.mT @ (features @ self.v[:, :first])
        return lambda a, b: rows[:, a, b] if not len(a) or int(a.max()) < first else columns[:, a, b]

    def _pairs(self, entries: Entries, a: Tensor, b: Tensor, factors: Tensor, sign: int) -> Float[Tensor, "k m"]:
        """The columns of the symmetric or antisymmetric parts of the pairs (a, b)."""
        more = factors[a, b] - 1
        kept = (more > 0) & ((a < b) | (sign > 0))
        a, b, more = a[kept], b[kept], more[kept]
        # A pair of one entry is twice that entry.
        return torch.add(entries(a, b), entries(b, a), alpha=sign) * (more / torch.where(a == b, 4.0, 2.0)).sqrt()


def _thresholded(factors: Tensor) -> Tensor:
    return torch.where(factors < _LITTLE, 1.0, factors)


def serves(problem: Problem, solution: Solution) -> bool:
    """Whether steps of this problem are to be preconditioned by the curvature of a solution like this."""
    if not costs.curved(problem.feats, problem.form, problem.room) or _curvatures(solution) is None:
        return False
    return all(isinstance(part, Factored) for part in problem.held.rest.values())


def curved_system(problem: Problem, point: Point, plain: KernelSystem) -> System | None:
    """The system with the curvature at a point as its metric, from K₀; None where nothing is tempered."""
    curvatures = _curvatures(point.solution)
    if curvatures is None or not isinstance(plain, DenseKernel):
        return None
    with problem.timed("kernels"):
        inverses = {name: InverseCurvature(curvature) for name, curvature in curvatures.items()}
        columns = torch.cat([inverses[k].columns(part) for k, part in _features(problem.held).items()], 1)
        kernel = DenseKernel(_added(plain.matrix, columns), problem.constraints.kept)
    layout = problem.held.layout

    def metric(x: Coefficients) -> Coefficients:
        return layout.join({name: inverses[name](matrix) for name, matrix in layout.split(x).items()})

    return problem.inverted(point.solution.transforms, kernel, point.outputs, metric)


def _curvatures(solution: Solution) -> Mapping[str, SpectralCurvature] | None:
    """The curvature of each block, if all are spectral."""
    if not isinstance(solution.curvature, JoinedCurvature):
        return None
    found = {k: part for k, part in solution.curvature.blocks.items() if isinstance(part, SpectralCurvature)}
    return found if len(found) == len(solution.gradient) else None


def _features(held: HeldFeatures) -> dict[str, Tensor | Factored]:
    """Each block's features: (nc, o, i), or factors."""
    found: dict[str, Tensor | Factored] = {k: part for k, part in held.rest.items() if isinstance(part, Factored)}
    start = 0
    for name, shape in held.layout.shapes.items():
        if name not in found and held.rows is not None:
            size = shape[0] * shape[1]
            found[name] = held.rows[:, start : start + size].reshape(-1, *shape)
            start += size
    return found


def _added(kernel: Float[Tensor, "k k"], columns: Float[Tensor, "k m"]) -> Float[Tensor, "k k"]:
    """K + CCᵀ; the product is made below the diagonal only."""
    found = kernel.clone()
    for k in range(0, len(kernel), _ROWS):
        rows = slice(k, k + _ROWS)
        found[rows, : k + _ROWS].addmm_(columns[rows], columns[: k + _ROWS].mT)
        found[:k, rows] = found[rows, :k].mT
    return found
