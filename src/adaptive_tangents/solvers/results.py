"""What a fit returns: the adaptive model with the certificates of its solution."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.features.transforms import Transform
from adaptive_tangents.kernels.products import KernelProducts
from adaptive_tangents.kernels.tiles import Kernels, Request, Sum, blocks_of, tiled
from adaptive_tangents.measures.kernel_change import KernelChange, kernel_change
from adaptive_tangents.solvers.losses import LossName
from adaptive_tangents.solvers.targets import check_features
from adaptive_tangents.structures.base import Structure


@dataclass(frozen=True)
class Round:
    """One point of the search: objective, relative stationarity residual, seconds since the start.

    ``temper`` τ: the objective is that of the penalty τΩ, ∞ where nothing adapts yet; it never rises from round to round.
    ``solved`` tells whether a kernel was made and factorized here; ``products`` is how many products with the curvature the
    step to this point took, for a fit on kernels how many products with the kernel its system took; ``accelerated`` whether
    an extrapolation was kept.
    """

    objective: float
    stationarity: float
    seconds: float
    temper: float = 1.0
    solved: bool = True
    products: int = 0
    accelerated: bool = False


@dataclass(frozen=True, kw_only=True)
class Certified:
    """What every fit tells of its solution: the fields are described in ``Fit``."""

    _products_with: ClassVar[str] = "curvature"  # what ``products`` of the rounds count

    structure: Structure
    loss: LossName
    ridge: float
    objective: float
    feasibility: float | None
    stationarity: float
    lower_bound: float | None
    lower_bound_reason: str
    converged: bool
    reason: str
    history: tuple[Round, ...] = field(repr=False)
    smallest_eigenvalue: float
    jitter: float
    dropped: int
    form: str
    dual: Float[Tensor, "n c"] = field(repr=False)
    targets: Float[Tensor, "n c"] | None = field(repr=False)
    timings: Mapping[str, float] = field(repr=False)

    @property
    def rounds(self) -> int:
        """Kernel solves: how often a system was made and factorized, or preconditioned."""
        return sum(entry.solved for entry in self.history)

    @property
    def gap(self) -> float | None:
        """(objective − lower bound)/objective, or None where there is no bound."""
        return None if self.lower_bound is None else (self.objective - self.lower_bound) / max(self.objective, 1e-300)

    def summary(self) -> str:
        """The solution and its certificates, for a person."""
        bound = self.lower_bound_reason if self.lower_bound is None else f"{self.lower_bound:.8g} (gap {self.gap:.1e})"
        loss = {"squared": "squared error"}.get(self.loss, self.loss)
        task = "interpolation" if self.ridge == 0 else f"{loss}, ridge {self.ridge:g}"
        lines = [
            f"{self.structure}, {task}: {'converged' if self.converged else 'NOT converged'}, {self.reason}",
            f"  objective     {self.objective:.8g}",
            f"  lower bound   {bound}",
        ]
        if self.feasibility is not None:
            lines.append(
                f"  feasibility   {self.feasibility:.1e}" + ("" if self.ridge == 0 else " (not asked for: ridge)")
            )
        products = sum(entry.products for entry in self.history)
        lines += [
            f"  stationarity  {self.stationarity:.1e}",
            f"  kernel        {self.form}, smallest eigenvalue {self.smallest_eigenvalue:.2e}, jitter {self.jitter:.1e}",
            f"  rounds        {self.rounds} kernel solves, {len(self.history)} steps, {products} products with the "
            f"{self._products_with} in {self.history[-1].seconds:.2f} s",
        ]
        if self.dropped:
            lines.append(f"  constraints   {self.dropped} follow from the others and were left out")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Fit(Certified):
    """A fitted adaptive tangent model with the certificates of its solution. Solved in float64.

    - ``coefficients``: B (o, i) of each block
    - ``transforms``: M of each block
    - ``features``: those fitted
    - ``structure``, ``loss`` ("squared" or "cross-entropy"), ``ridge`` ρ: what was fitted
    - ``objective``: Ω̃(β) + loss
    - ``feasibility``: ‖φβ − r‖/‖r‖, None for cross-entropy
    - ``stationarity``: ‖∇Ω̃(β) − 2φᵀα‖/‖2φᵀα‖
    - ``lower_bound``: a bound on every model's objective, None where the penalty gives none; ``lower_bound_reason`` says why
    - ``converged`` and ``reason``: whether the search met ``tol``, and why it stopped
    - ``history``: its rounds, one ``Round`` each
    - ``smallest_eigenvalue``: that of K₀, NaN where it was never formed
    - ``jitter``: what was added to the diagonal of the last kernel solved with
    - ``dropped``: how many constraints follow from the others and were left out
    - ``form``: how systems were solved, "dense", "primal" or "matrix-free"
    - ``dual``: α (n, c)
    - ``targets``: r (n, c), None for cross-entropy
    - ``timings``: seconds by kind of work
    """

    coefficients: Mapping[str, Float[Tensor, "_o _i"]] = field(repr=False)
    transforms: Mapping[str, Transform] = field(repr=False)
    features: TangentFeatures = field(repr=False)

    def transform(self, feats: TangentFeatures) -> TangentFeatures:
        """Adapted features Mφ, TangentFeatures again: their kernel is the adapted kernel K_M."""
        check_features("transform", feats)
        self.features.check_origin("transform", feats)
        return feats.transformed(self.transforms)

    def predict(self, feats: TangentFeatures) -> Float[Tensor, "m c"]:
        """φβ for features of any samples, in float64; add f(x; θ₀) for the model's output."""
        check_features("predict", feats)
        self.features.check_origin("predict", feats)
        return feats.to(torch.float64).inner(self.coefficients)

    def kernel_change(self, y: Float[Tensor, "n c"] | None = None, *, keep: bool = False) -> KernelChange:
        """K_M − K₀ on the samples fitted, by block and side, along the targets r, or others y: see ``kernel_change``.

        For cross-entropy, without y, it is along the fitted φβ.
        """
        if y is None:
            y = self.predict(self.features) if self.targets is None else self.targets
        return kernel_change(self.features, self.transforms, y, keep=keep)


@dataclass(frozen=True, kw_only=True)
class KernelFit(Certified):
    """A model fitted to kernels alone, with the certificates of a ``Fit``; made by ``fit`` on a store or on tensors.

    - ``gains``: z of each block, "" where blocks are not told apart: B_ℓ = z_ℓ²φ_ℓᵀα
    - ``norms``: ‖B_ℓ‖, of blocks that move together under the first of their names
    - ``residual``: that of the last linear system, relative
    - the rest is as in ``Fit``; ``products`` of a round are those with the kernel that its system took
    """

    _products_with: ClassVar[str] = "kernel"

    gains: Mapping[str, float]
    norms: Mapping[str, float]
    residual: float

    def predict(self, K: Kernels) -> Float[Tensor, "m c"]:
        """φβ = Σ_ℓ z_ℓ² K_ℓ(x, x_train) α at other samples, in float64; add f(x; θ₀) for the model's output.

        ``K`` holds the kernels of those samples with the training samples, in this order and by block where the fit was:
        ``tangent_kernel(model, x, x_train, by_block=True)``, or a store of it. Raises TangentError for others.
        """
        request = Request("predict", rectangular=True)
        parts = {"": tiled(request, K)} if set(self.gains) == {""} else blocks_of(request, K)
        if set(parts) != set(self.gains):
            raise TangentError(
                f"predict: the kernels are of blocks {list(parts)}, the fit was of {list(self.gains)}; make them by block"
            )
        whole = Sum(list(parts.values()), [self.gains[name] ** 2 for name in parts])
        if (whole.m, whole.width) != tuple(self.dual.shape):
            raise TangentError(
                f"predict: the kernel is of {whole.n} samples with {whole.m} others, c = {whole.width}; the fit was of "
                f"n = {len(self.dual)} samples, c = {self.dual.shape[1]}: give the kernel of new samples with those"
            )
        return KernelProducts(whole).apply(self.dual.flatten()).reshape(whole.n, -1)
