"""What a fit returns: the adaptive model with the certificates of its solution."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.features.transforms import Transform
from adaptive_tangents.measures.kernel_change import KernelChange, kernel_change
from adaptive_tangents.structures.base import Structure


@dataclass(frozen=True)
class Round:
    """One point of the search: objective, relative stationarity residual, seconds since the start.

    ``temper`` τ: the objective is that of the penalty τΩ, ∞ where nothing adapts yet; it never rises from round to round.
    ``solved`` tells whether a kernel was made and factorised here; ``products`` is how many products with the curvature the
    step to this point took; ``accelerated`` whether an extrapolation was kept.
    """

    objective: float
    stationarity: float
    seconds: float
    temper: float = 1.0
    solved: bool = True
    products: int = 0
    accelerated: bool = False


@dataclass(frozen=True)
class Fit:
    """A fitted adaptive tangent model with the certificates of its solution.

    ``coefficients`` B and ``transforms`` M per block, ``dual`` α (n, c); ``objective`` is Ω̃(β) + loss; ``feasibility``
    ‖φβ − r‖/‖r‖, None for cross-entropy; ``stationarity`` ‖∇Ω̃(β) − 2φᵀα‖/‖2φᵀα‖; ``lower_bound`` a bound on every model's
    objective, None where the penalty gives none (``lower_bound_reason`` says why). ``smallest_eigenvalue`` is that of K₀,
    NaN where it was never formed; ``jitter`` what was added to the last kernel solved with; ``form`` how: "dense", "primal"
    or "matrix-free"; ``timings`` seconds by kind of work; ``features`` are those fitted. Solved in float64.
    """

    coefficients: Mapping[str, Float[Tensor, "_o _i"]] = field(repr=False)
    transforms: Mapping[str, Transform] = field(repr=False)
    dual: Float[Tensor, "n c"] = field(repr=False)
    structure: Structure
    loss: str
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
    timings: Mapping[str, float] = field(repr=False)
    features: TangentFeatures = field(repr=False)
    targets: Float[Tensor, "n c"] | None = field(repr=False)

    @property
    def rounds(self) -> int:
        """Kernel solves: how often a kernel was made and factorised."""
        return sum(entry.solved for entry in self.history)

    @property
    def gap(self) -> float | None:
        """(objective − lower bound)/objective, or None where there is no bound."""
        return None if self.lower_bound is None else (self.objective - self.lower_bound) / max(self.objective, 1e-300)

    def transform(self, feats: TangentFeatures) -> TangentFeatures:
        """Adapted features Mφ, TangentFeatures again: their kernel is the adapted kernel K_M."""
        self.features.check_origin("transform", feats)
        return feats.transformed(self.transforms)

    def predict(self, feats: TangentFeatures) -> Float[Tensor, "m c"]:
        """φβ for features of any samples, in float64; add f(x; θ₀) for the model's output."""
        self.features.check_origin("predict", feats)
        return feats.to(torch.float64).inner(self.coefficients)

    def kernel_change(self, y: Float[Tensor, "n c"] | None = None, *, keep: bool = False) -> KernelChange:
        """K_M − K₀ on the samples fitted, by block and side, along the targets r, or others y: see ``kernel_change``.

        For cross-entropy, without y, it is along the fitted φβ.
        """
        if y is None:
            y = self.predict(self.features) if self.targets is None else self.targets
        return kernel_change(self.features, self.transforms, y, keep=keep)

    def summary(self) -> str:
        """The solution and its certificates, for a person."""
        bound = self.lower_bound_reason if self.lower_bound is None else f"{self.lower_bound:.8g} (gap {self.gap:.1e})"
        task = "interpolation" if self.ridge == 0 else f"{self.loss}, ridge {self.ridge:g}"
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
            f"  rounds        {self.rounds} kernel solves, {len(self.history)} steps, {products} products with the curvature "
            f"in {self.history[-1].seconds:.2f} s",
        ]
        if self.dropped:
            lines.append(f"  constraints   {self.dropped} follow from the others and were left out")
        return "\n".join(lines)
