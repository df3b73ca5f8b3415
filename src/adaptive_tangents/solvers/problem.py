"""The problem (E) of a fit, Ω̃(β) + loss(φβ), with the points, steps and systems that its solvers use."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.features.transforms import Transform, squared, transform_matrices
from adaptive_tangents.linalg.conjugate_gradients import Solve
from adaptive_tangents.linalg.kernel_systems import DenseKernel, KernelSystem, PivotedKernel, RoundedKernel
from adaptive_tangents.solvers.constraints import Constraints, examined
from adaptive_tangents.solvers.feature_systems import FeatureProducts, PrimalKernel
from adaptive_tangents.solvers.held_features import Coefficients, HeldFeatures, Layout, Vector, held
from adaptive_tangents.solvers.losses import Loss, SquaredError
from adaptive_tangents.structures.base import Fixed, Matrices, Solution, Structure


@dataclass(frozen=True)
class Point:
    """Coefficients β, the outputs φβ (nc,), the inner minimum over M at β, and the objective Ω̃(β) + loss.

    ``vector`` is β as one vector, ``gradient`` ∇Ω̃(β); ``coefficients`` are views of it.
    """

    vector: Coefficients
    coefficients: dict[str, Tensor]
    outputs: Vector
    solution: Solution
    gradient: Coefficients
    objective: float


@dataclass(frozen=True)
class Reduced:
    """The step −v for a held transform at a point, from w₀ = ∇Ω̃ and the gradient η of the loss: see ``feature_systems``.

    ``step`` is −v; ``outputs`` −φv; ``multipliers`` u; ``gradient`` w₀ + φᵀu; ``size`` ⟨w, v⟩, twice the expected decrease.
    """

    step: Coefficients
    outputs: Vector
    multipliers: Vector
    gradient: Coefficients
    size: float


@dataclass(frozen=True)
class System:
    """A held transform with its kernel K_M and the inverse for the loss."""

    transforms: Mapping[str, Transform]
    kernel: KernelSystem
    root: "Float[Tensor, 'n c c'] | None"
    inverse: Solve
    layout: Layout
    metric: Solve | None = None  # 2E₀⁻¹ in place of MᵀM: see ``curved_systems``

    @cached_property
    def _squared(self) -> Mapping[str, Transform]:
        return squared(self.transforms)

    def square(self, x: Coefficients) -> Coefficients:
        """MᵀM x."""
        if self.metric is not None:
            return self.metric(x)
        if not self.transforms:
            return x
        return self.layout.join(transform_matrices(self.layout.split(x), self._squared))


class Tempered(ABC):
    """A problem of n samples with the penalty τΩ on transforms; ``temper`` is τ ≥ 1.

    min over M of ‖M⁻ᵀβ‖² + τΩ(M) is τΩ̃(β/√τ), so every structure can be tempered. At τ = ∞ nothing adapts.
    """

    structure: Structure
    loss: Loss
    form: str  # of the linear systems
    temper: float
    constraints: Constraints  # found from K₀ in the dense form
    timings: dict[str, float]  # seconds by kind of work

    @property
    @abstractmethod
    def n(self) -> int:
        """How many samples there are."""

    def solution(self, coefficients: Matrices) -> Solution:
        """The inner minimum over M of the tempered penalty."""
        if math.isinf(self.temper):
            return Fixed().solution(coefficients)
        if self.temper == 1:
            return self.structure.solution(coefficients)
        root = math.sqrt(self.temper)
        found = self.structure.solution({name: matrix / root for name, matrix in coefficients.items()})
        gradient = {name: root * matrix for name, matrix in found.gradient.items()}
        return Solution(found.transforms, self.temper * found.penalty, gradient, found.curvature)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent within to ``timings``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - started


@dataclass
class Problem(Tempered):
    """Features in float64, a structure, a loss, and the form of the systems."""

    feats: TangentFeatures
    structure: Structure
    loss: Loss
    form: str
    rank: int | None
    room: float = math.inf
    temper: float = 1.0
    constraints: Constraints = field(default_factory=Constraints)
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return self.feats.n

    @cached_property
    def held(self) -> HeldFeatures:
        """The features as the fit multiplies with them."""
        with self.timed("products"):
            return held(self.feats, self.room)

    @property
    def zeros(self) -> Coefficients:
        """β = 0."""
        return torch.zeros(sum(self.held.layout.sizes), dtype=torch.float64, device=self.feats.device)

    def inner(self, x: Coefficients) -> Vector:
        """φx."""
        with self.timed("products"):
            return self.held.inner(x)

    def combine(self, a: Vector) -> Coefficients:
        """φᵀa."""
        with self.timed("products"):
            return self.held.combine(a)

    def point(self, vector: Coefficients, outputs: Vector) -> Point:
        """The point at β with outputs φβ."""
        layout = self.held.layout
        coefficients = layout.split(vector)
        with self.timed("decompositions"):
            solution = self.solution(coefficients)
        gradient = layout.join(solution.gradient)
        return Point(vector, coefficients, outputs, solution, gradient, solution.penalty + self.loss.value(outputs))

    def first_system(self) -> System:
        """The system of K₀, after finding the independent constraints."""
        with self.timed("kernels"):
            kernel = self.kernel({})
        if isinstance(kernel, DenseKernel):
            with self.timed("constraints"):
                self.constraints = examined(kernel, self.loss, samples=self.n)
        return self.inverted(
            {}, kernel, torch.zeros(self.n * self.feats.c, dtype=torch.float64, device=self.feats.device)
        )

    def system(self, transforms: Mapping[str, Transform], outputs: Vector) -> System:
        """Make K_M and its inverse for the loss at these outputs."""
        with self.timed("kernels"):
            kernel = self.kernel(transforms)
        return self.inverted(transforms, kernel, outputs)

    def inverted(
        self,
        transforms: Mapping[str, Transform],
        kernel: KernelSystem,
        outputs: Vector,
        metric: Solve | None = None,
    ) -> System:
        """The system of a kernel, with the inverse for the loss at these outputs."""
        with self.timed("factorizations"):
            root = self.loss.root(outputs)
            inverse = kernel.shifted(self.loss.ridge) if root is None else kernel.rooted(root)
        return System(transforms, kernel, root, inverse, self.held.layout, metric)

    def kernel(self, transforms: Mapping[str, Transform]) -> KernelSystem:
        """K_M in the form chosen."""
        adapted = self.feats.transformed(transforms) if transforms else self.feats
        if self.form == "dense":
            size = adapted.n * adapted.c
            return DenseKernel(adapted.kernel().reshape(size, size), self.constraints.kept)
        if self.form == "primal":
            return PrimalKernel(adapted)
        products = FeatureProducts(adapted)
        return RoundedKernel(products) if self.rank is None else PivotedKernel(products, self.rank)

    def reduce(self, system: System, gradient: Coefficients, slope: Vector) -> Reduced:
        """The step for w = w₀ + φᵀη, with w₀ = ``gradient`` and η = ``slope``."""
        pulled = self.inner(system.square(gradient))
        with self.timed("systems"):
            if system.root is None:
                multipliers = system.inverse(self.loss.ridge * slope - pulled)
                moved = (self.loss.ridge / 2) * (slope - multipliers)
            else:
                n, c = self.feats.n, self.feats.c
                right = (pulled + system.kernel.apply(slope)).reshape(n, c, 1) / 2
                inside = system.inverse((system.root.mT @ right).flatten()).reshape(n, c, 1)
                multipliers = slope - (system.root @ inside).flatten()
                moved = (pulled + system.kernel.apply(multipliers)) / 2
        whole = gradient + self.combine(multipliers)
        step = system.square(whole) / -2
        # ⟨w, v⟩ = ⟨D v, v⟩ + ⟨L″φv, φv⟩, both sums of squares.
        size = float(moved @ (slope - multipliers) - whole @ step)
        return Reduced(step, -moved, multipliers, whole, size)

    def restored(self, system: System, vector: Coefficients, outputs: Vector) -> tuple[Coefficients, Vector]:
        """The nearest coefficients with φβ = r, in the held transform's metric; unchanged without constraints."""
        if not self.loss.interpolates:
            return vector, outputs
        targets = self.targets
        outputs = self.inner(vector)  # outputs tracked through the steps miss rounding
        for _ in range(3):
            missing = targets - outputs
            if float(missing.norm()) <= 1e-12 * float(targets.norm()):
                break
            with self.timed("systems"):
                alpha = system.inverse(missing)
            vector = vector + system.square(self.combine(alpha))
            outputs = self.inner(vector)
        return vector, outputs

    @property
    def targets(self) -> Vector:
        """The targets r of squared error and interpolation."""
        assert isinstance(self.loss, SquaredError)
        return self.loss.targets

    def dual(self, point: Point, reduced: Reduced) -> Vector:
        """α, with ∇Ω̃(β) = 2φᵀα at an optimum: from the loss's gradient, or for constraints from the system."""
        return -(reduced.multipliers if self.loss.interpolates else self.loss.slope(point.outputs)) / 2

    def stationarity(self, point: Point, alpha: Vector) -> float:
        """‖∇Ω̃(β) − 2φᵀα‖/‖2φᵀα‖."""
        generators = 2 * self.combine(alpha)
        size = float(generators.norm())
        return relative(float((point.gradient - generators).norm()), size)


def relative(error: float, size: float) -> float:
    """An error over a size; where that is zero, only no error is none."""
    return error / size if size > 0 else 0.0 if error == 0 else math.inf
