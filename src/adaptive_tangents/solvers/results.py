"""The results of ``fit``: the adaptive model and the certificates of its solution."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.tangent_features import TangentFeatures, check_features
from adaptive_tangents.features.transforms import Transform
from adaptive_tangents.kernels.products import KernelProducts
from adaptive_tangents.kernels.tiles import Kernels, Request, Sum, blocks_of, tiled
from adaptive_tangents.measures.alignment import effective_rank
from adaptive_tangents.measures.kernel_change import KernelChange, kernel_change
from adaptive_tangents.runtime.figures import MOST_LINES, bars, lines, panels
from adaptive_tangents.runtime.told import few_digits, html, short
from adaptive_tangents.solvers.files import read_fit, write_fit
from adaptive_tangents.solvers.losses import LossName
from adaptive_tangents.structures.base import Structure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEASIBLE = 1e-6  # constraints with a larger relative error are not met
_SMALLEST = 1e-10  # singular values below this share of the largest are rounding


@dataclass(frozen=True)
class Round:
    """One point of the search.

    Attributes:
        objective: with the penalty τΩ. It never rises from round to round, but fits on kernels record rejected steps too.
        stationarity: ‖∇Ω̃(β) − 2φᵀα‖/‖2φᵀα‖.
        seconds: since the start.
        temper: τ ≥ 1, falling to 1 during the search; at τ = ∞ nothing adapts.
        solved: whether a kernel was made and factorized for this round.
        products: products with the curvature in the step to this point; for a fit on kernels, products with the kernel.
        accelerated: whether an extrapolation was kept.
    """

    objective: float
    stationarity: float
    seconds: float
    temper: float = 1.0
    solved: bool = True
    products: int = 0
    accelerated: bool = False


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Certified:
    """The certificates that every fit has; ``Fit`` describes the fields."""

    _products_with: ClassVar[str] = "curvature"  # what ``products`` of the rounds count
    _columns: ClassVar[tuple[str, ...]] = ("‖B‖", "effective rank")  # of the table of blocks

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
    def _named(self) -> dict[str, tuple[float, ...]]:
        """Numbers of each block, for tables; the first is ‖B‖."""
        return {}

    @property
    def rounds(self) -> int:
        """Kernel solves: how many systems were made and factorized, or preconditioned."""
        return sum(entry.solved for entry in self.history)

    @property
    def gap(self) -> float | None:
        """(objective − lower bound)/objective; None without a bound, or where interpolation misses its targets."""
        if self.lower_bound is None or (self.ridge == 0 and (self.feasibility or 0.0) > FEASIBLE):
            return None
        return (self.objective - self.lower_bound) / max(self.objective, 1e-300)

    def _bound(self, digits: int) -> str:
        """The lower bound and the gap to it in words."""
        if self.lower_bound is None:
            return self.lower_bound_reason
        gap = "no gap: the targets are missed" if self.gap is None else f"gap {self.gap:.1e}"
        return f"{self.lower_bound:.{digits}g} ({gap})"

    def __repr__(self) -> str:
        task = "interpolation" if self.ridge == 0 else f"{self.loss}, ridge {self.ridge:g}"
        state = "converged" if self.converged else "NOT converged"
        return (
            f"{type(self).__name__}({short(few_digits(self.structure))}, {task}, {len(self._named)} blocks, "
            f"{len(self.dual)} samples: objective {self.objective:.6g}, stationarity {self.stationarity:.1e}, {state})"
        )

    def _repr_html_(self) -> str:
        facts = {
            "structure": few_digits(self.structure), "loss": self.loss, "ridge": f"{self.ridge:g}",
            "state": f"{'converged' if self.converged else 'NOT converged'}: {self.reason}",
            "objective": f"{self.objective:.6g}", "lower bound": self._bound(6), "stationarity": f"{self.stationarity:.1e}",
            "rounds": self.rounds,
        }  # fmt: skip
        rows = sorted(self._named.items(), key=lambda row: -float(row[1][0]))
        return html(type(self).__name__, facts, ("block", *self._columns), ((name, *row) for name, row in rows))

    def _search(self) -> dict[str, tuple[list[float], list[float]]]:
        """The stationarity of every round, for a figure."""
        values = {k: entry.stationarity for k, entry in enumerate(self.history) if 0 < entry.stationarity < math.inf}
        return {"": (list(values), list(values.values()))}

    def summary(self) -> str:
        """The solution and its certificates as text to read."""
        loss = {"squared": "squared error"}.get(self.loss, self.loss)
        task = "interpolation" if self.ridge == 0 else f"{loss}, ridge {self.ridge:g}"
        lines = [
            f"{few_digits(self.structure)}, {task}: {'converged' if self.converged else 'NOT converged'}, {self.reason}",
            f"  objective     {self.objective:.8g}",
            f"  lower bound   {self._bound(8)}",
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


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Fit(Certified):
    """A fitted adaptive tangent model with the certificates of its solution. Solved in float64.

    Attributes:
        structure: the structure fitted, with all that it learned from the features.
        loss: "squared" or "cross-entropy".
        ridge: ρ ≥ 0; 0 is interpolation.
        objective: Ω̃(β) + loss.
        feasibility: ‖φβ − r‖/‖r‖; None for cross-entropy.
        stationarity: ‖∇Ω̃(β) − 2φᵀα‖/‖2φᵀα‖; infinite if the latter alone is zero.
        lower_bound: no model has a lower objective than this; None if the penalty gives no bound.
        lower_bound_reason: how the bound was found, or why there is none.
        converged: whether the search met ``tol``.
        reason: why it stopped.
        history: its rounds.
        smallest_eigenvalue: of K₀; NaN if K₀ was never formed.
        jitter: added to the diagonal of the last kernel that was solved with.
        dropped: how many constraints follow from the others and were left out.
        form: of the linear systems, "dense", "primal" or "matrix-free".
        dual: α, (n, c).
        targets: r, (n, c); None for cross-entropy.
        timings: seconds by kind of work.
        coefficients: β, one matrix B (o, i) for each block.
        transforms: M of each block.
        features: the features fitted.
    """

    coefficients: Mapping[str, Float[Tensor, "_o _i"]] = field(repr=False)
    transforms: Mapping[str, Transform] = field(repr=False)
    features: TangentFeatures = field(repr=False)

    @property
    def _named(self) -> dict[str, tuple[float, ...]]:
        made = ((name, matrix) for name, matrix in self.coefficients.items())
        return {name: (float(B.norm()), effective_rank(B).participation if bool(B.any()) else 0.0) for name, B in made}

    def plot(self) -> "Figure":
        """The stationarity along the search, each block's share of ‖β‖², and the singular values of the largest blocks."""
        sizes = {name: float((B**2).sum()) for name, B in self.coefficients.items()}
        names, whole = sorted(sizes, key=lambda name: -sizes[name]), sum(sizes.values()) or 1.0
        figure, (left, middle, right) = panels("plot", 3, len(names))
        lines(left, self._search(), "Search", ("round", "stationarity"), log="y")
        ranks = {name: f"rank {row[1]:.1f}" for name, row in self._named.items()}
        bars(middle, {name: 100 * sizes[name] / whole for name in names}, "Blocks", "share of ‖β‖², %", ranks)
        curves = {}
        for name in names[:MOST_LINES]:
            values = torch.linalg.svdvals(self.coefficients[name])
            kept = values[values > _SMALLEST * values.max()].tolist()
            curves[name] = (list(range(1, len(kept) + 1)), kept)
        lines(right, curves, "Coefficients", ("index", "singular value"), log="y")
        return figure

    def transform(self, feats: TangentFeatures) -> TangentFeatures:
        """Adapted features Mφ, as TangentFeatures; their kernel is the adapted kernel K_M.

        Args:
            feats: tangent features φ of any samples, of the same model.

        Raises:
            TangentError: when the features are of other blocks, or one is a sketch.
        """
        check_features("transform", feats)
        self.features.check_origin("transform", feats)
        feats.check_matrices("transform", self.coefficients)
        return feats.transformed(self.transforms)

    def predict(self, feats: TangentFeatures) -> Float[Tensor, "m c"]:
        """φβ at any samples, in float64; add f(x; θ₀) for the model's output.

        Args:
            feats: tangent features φ of any m samples, of the same model.

        Raises:
            TangentError: when the features are of other blocks, or one is a sketch.
        """
        check_features("predict", feats)
        self.features.check_origin("predict", feats)
        feats.check_matrices("predict", self.coefficients)
        return feats.to(torch.float64).inner(self.coefficients)

    def kernel_change(self, y: Float[Tensor, "n c"] | None = None, *, keep: bool = False) -> KernelChange:
        """K_M − K₀ on the fitted samples, split by block and side: see ``measures.kernel_change``.

        Args:
            y: targets of the target kernel, (n, c); None is r, or the fitted φβ for cross-entropy.
            keep: also return every part's kernel.

        Raises:
            TangentError: when the fit was loaded without its features.
        """
        self.check_whole("kernel_change")
        if y is None:
            y = self.predict(self.features) if self.targets is None else self.targets
        return kernel_change(self.features, self.transforms, y, keep=keep)

    def check_whole(self, call: str) -> None:
        """Raise TangentError if the fit was kept without the features of its samples.

        Args:
            call: the name of the calling function, for the message.
        """
        if self.features.n != len(self.dual):
            raise TangentError(
                f"{call}: this fit was kept without the features of its {len(self.dual)} samples; use "
                "load_fit(path, features=feats), or save(path, features=True)"
            )

    def save(self, path: str | Path, *, features: bool = False, without_structure: bool = False) -> None:
        """Write the fit as a safetensors file with all but tensors as JSON in its header; ``load_fit`` reads it.

        Args:
            path: of the file; one that is there is replaced.
            features: whether to keep the features fitted, too. They may take much space, and only ``kernel_change`` and
                ``leave_one_out`` need them.
            without_structure: keep only the structure's name, as where a penalty is a function of your own.

        Raises:
            TangentError: when the structure cannot be described, or the file cannot be written.
        """
        kept = replace(self.features if features else self.features[:1], limit=None)
        write_fit(Path(path), replace(self, features=kept), _KINDS, without_structure=without_structure)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class KernelFit(Certified):
    """A model fitted to kernels alone, with the certificates of a ``Fit``; ``fit`` on a store or on tensors returns it.

    Attributes:
        structure, loss, ridge, objective, feasibility, stationarity, lower_bound, lower_bound_reason: as in ``Fit``.
        converged, reason, history, smallest_eigenvalue, jitter, dropped, form, dual, targets, timings: as in ``Fit``.
        gains: z of each block: B_ℓ = z_ℓ²φ_ℓᵀα. The key is "" for one kernel without blocks.
        norms: ‖B_ℓ‖; blocks that share a transform have their joint norm, under the first of their names.
        residual: relative residual of the last linear system.
    """

    _products_with: ClassVar[str] = "kernel"

    gains: Mapping[str, float]
    norms: Mapping[str, float]
    residual: float

    _columns: ClassVar[tuple[str, ...]] = ("‖B‖", "gain")

    @property
    def _named(self) -> dict[str, tuple[float, ...]]:
        return {name: (self.norms.get(name, 0.0), gain) for name, gain in self.gains.items()}

    def plot(self) -> "Figure":
        """The stationarity along the search, and the gain of each block."""
        figure, (left, right) = panels("plot", 2, len(self.gains))
        lines(left, self._search(), "Search", ("round", "stationarity"), log="y")
        gains = dict(sorted(self.gains.items(), key=lambda row: -row[1]))
        bars(right, {name or "all blocks": gain for name, gain in gains.items()}, "Blocks", "gain z")
        return figure

    def predict(self, K: Kernels) -> Float[Tensor, "m c"]:
        """φβ = Σ_ℓ z_ℓ² K_ℓ(x, x_train) α at new samples, in float64; add f(x; θ₀) for the model's output.

        Args:
            K: kernels of the m new samples with the training samples, in this order, such as
                ``tangent_kernel(model, x, x_train, by_block=True)`` or a store of it; by block if the fit was.

        Raises:
            TangentError: when the kernels are of other blocks or shapes.
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

    def save(self, path: str | Path, *, without_structure: bool = False) -> None:
        """Write the fit as a safetensors file with all but tensors as JSON in its header; ``load_fit`` reads it.

        Args:
            path: of the file; one that is there is replaced.
            without_structure: keep only the structure's name, as where a penalty is a function of your own.

        Raises:
            TangentError: when the structure cannot be described, or the file cannot be written.
        """
        write_fit(Path(path), self, _KINDS, without_structure=without_structure)


_KINDS = (Fit, KernelFit, Round)


def load_fit(path: str | Path, *, features: TangentFeatures | None = None) -> Fit | KernelFit:
    """A fit that ``Fit.save`` or ``KernelFit.save`` wrote, on the CPU; it predicts the same numbers, to the last bit.

    Args:
        path: of the file.
        features: the features that were fitted, where the file was written without them and ``kernel_change`` is wanted.

    Raises:
        TangentError: when the file cannot be read, is no fit, or was changed, and when the features are of other samples or
            blocks.

    >>> import tempfile, torch, adaptive_tangents as at
    >>> feats = at.tangent_features(torch.nn.Linear(3, 1), torch.randn(6, 3))
    >>> found = at.fit(feats, torch.randn(6, 1), ridge=0.1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found.save(f"{folder}/fit.safetensors")
    ...     again = at.load_fit(f"{folder}/fit.safetensors")
    >>> torch.equal(again.predict(feats), found.predict(feats)), again.summary() == found.summary()
    (True, True)
    """
    found: Fit | KernelFit = read_fit(Path(path), _KINDS)
    if features is None:
        return found
    shapes = {name: block.shape for name, block in features.blocks.items()}
    if isinstance(found, KernelFit):
        raise TangentError(f"load_fit: {path} holds a fit to kernels, which has no features; leave features out")
    wanted = {name: tuple(matrix.shape) for name, matrix in found.coefficients.items()}
    if (features.n, features.c) != tuple(found.dual.shape) or shapes != wanted:
        raise TangentError(
            f"load_fit: the fit was of {tuple(found.dual.shape)} samples and outputs and blocks {wanted}, these features "
            f"are of {(features.n, features.c)} and {shapes}; give those that were fitted"
        )
    found.features.check_origin("load_fit", features)
    return replace(found, features=features)
