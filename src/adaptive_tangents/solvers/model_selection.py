"""Paths of fits over structures and ridges, with warm starts, and the choice among them by held-out error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from adaptive_tangents.checks import Values, as_tensor
from adaptive_tangents.errors import TangentError, raised_as
from adaptive_tangents.features.tangent_features import TangentFeatures, check_features
from adaptive_tangents.runtime.memory import limit_for, require_memory
from adaptive_tangents.runtime.progress import shown
from adaptive_tangents.solvers.fit import fit
from adaptive_tangents.solvers.results import Fit
from adaptive_tangents.structures.base import Fixed, Structure
from adaptive_tangents.structures.mixed import Mixed, as_structure
from adaptive_tangents.structures.spectral import TWO_SIDED

_FOLDS = 5


@dataclass(frozen=True)
class FitPath:
    """Fits of one problem with their held-out errors.

    Attributes:
        fits: the fits, for each ridge in the order of the structures.
        errors: the held-out error of each, a mean over samples.
        criterion: "leave-one-out squared error", exact where nothing adapts; or "k-fold squared error" or "k-fold
            cross-entropy", transforms and coefficients refitted without each fold.
    """

    fits: tuple[Fit, ...] = field(repr=False)
    errors: tuple[float, ...]
    criterion: str

    @property
    def best(self) -> Fit:
        """The fit with the least held-out error."""
        return self.fits[min(range(len(self.errors)), key=self.errors.__getitem__)]

    def summary(self) -> str:
        """What the errors have seen, and one line for each fit, the best marked with a star."""
        seen = "exact: nothing adapts, so no transform has seen the sample left out"
        if not self.criterion.startswith("leave-one-out"):
            seen = "transforms and coefficients are refitted without the samples of each fold"
        lines = [f"held out: {self.criterion}; {seen}"]
        if len(self.fits) > 1:
            lines.append(
                f"the least of {len(self.fits)} errors has seen all samples, by the choice: test the best on others"
            )
        for found, error in zip(self.fits, self.errors, strict=True):
            mark = "*" if found is self.best else " "
            state = "" if found.converged else ", NOT converged"
            lines.append(
                f"{mark} {error:.6g}  {found.structure}, ridge {found.ridge:g}, {found.rounds} kernel solves{state}"
            )
        return "\n".join(lines)


def fit_path(
    feats: TangentFeatures,
    r: Values,
    *,
    structures: Structure | Mapping[str, Structure] | Sequence[Structure | Mapping[str, Structure]] = TWO_SIDED,
    ridges: Sequence[float] = (0.0,),
    folds: int | None = None,
    seed: int = 0,
    **options: Any,
) -> FitPath:
    r"""Fit a grid of structures and ridges ρ with warm starts, and measure held-out errors.

    For each ridge, the structures are fitted in the order given, each from the solution of the one before. The held-out error
    is the mean loss of samples left out of a refit, fold by fold. Where nothing adapts (``Fixed`` alone) it is that of
    leave-one-out residuals, which have an exact closed form.

    Args:
        feats: tangent features φ of n samples with c outputs.
        r: targets minus f(x; θ₀), (n, c), or (n,) where c = 1; for cross-entropy integer labels (n,), 0 or 1 where c = 1.
        structures: one or more structures, such as one with penalties of falling strength λ.
        ridges: one or more ρ ≥ 0; 0 interpolates.
        folds: how many folds; None is leave-one-out for squared error where nothing adapts, else 5 folds.
        seed: of the shuffle that makes the folds.
        options: other keyword arguments of ``fit``; ``progress=True`` shows one bar for all fits.

    Raises:
        TangentError: for an empty grid, folds outside 2..n, one ridge= or structure=, and as ``fit`` does.

    >>> import torch, adaptive_tangents as at
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> x, y = torch.randn(20, 3), torch.randn(20, 1)
    >>> structures = [at.TwoSided(at.Quadratic(strength)) for strength in (10.0, 1.0)]
    >>> path = at.fit_path(at.tangent_features(model, x), y, structures=structures, ridges=(0.1, 1.0))
    >>> len(path.fits), len(path.errors)
    (4, 4)
    """
    check_features("fit_path", feats)
    for name in options.keys() & {"ridge", "structure", "start"}:
        instead = "every fit starts from the one before" if name == "start" else f"give one or more as {name}s="
        raise TangentError(f"fit_path: {name} is no option: {instead}")
    given = structures if isinstance(structures, Sequence) and not isinstance(structures, str) else [structures]
    chosen = [as_structure("fit_path", structure) for structure in given]
    if not chosen or not ridges:
        raise TangentError("fit_path: give one or more structures, and one or more ridges")
    entropy = options.get("loss") == "cross-entropy"
    if folds is None and (entropy or any(map(_adapts, chosen))):
        folds = min(_FOLDS, feats.n)
    if folds is not None and not 2 <= folds <= feats.n:
        raise TangentError(f"fit_path: folds are 2..n = {feats.n}, got {folds}")
    r = as_tensor("fit_path", "labels" if entropy else "targets", r, feats.device)
    if options.get("offset") is not None:
        options["offset"] = as_tensor("fit_path", "offset", options["offset"], feats.device)
    fits: list[Fit] = []
    errors: list[float] = []
    bar = options.pop("progress") if options.get("progress") is True else None
    with raised_as("fit_path", "fit", "leave_one_out"), shown(bar) as tell:
        for ridge in ridges:
            start: Fit | None = None
            for structure in chosen:
                if tell is not None:
                    tell(f"{structure}, ridge {ridge:g}", len(fits) / len(ridges) / len(chosen))
                start = fit(feats, r, structure=structure, ridge=ridge, start=start, **options)
                fits.append(start)
                if folds is None:
                    errors.append(float((leave_one_out(start) ** 2).sum(1).mean()))
                else:
                    errors.append(_folded(feats, r, structure, ridge, folds, seed, options))
    what = "leave-one-out" if folds is None else f"{folds}-fold"
    return FitPath(tuple(fits), tuple(errors), f"{what} {'cross-entropy' if entropy else 'squared error'}")


def _adapts(structure: Structure) -> bool:
    """Whether transforms depend on the targets, so that those of a whole fit have seen every sample."""
    if isinstance(structure, Mixed):
        return any(map(_adapts, structure.structures.values()))
    return not isinstance(structure, Fixed)


def leave_one_out(found: Fit) -> Float[Tensor, "n c"]:
    r"""r_k minus the prediction of a fit without sample k, with M held: [((K_M + ρI)⁻¹)_kk]⁻¹ α_k, with blocks c × c.

    Exact for ``Fixed``. For other structures M has seen the sample, so they are too small: ``fit_path`` uses folds.

    Args:
        found: a fit on features, with squared error.

    Raises:
        TangentError: for cross-entropy, when constraints follow from each other, or when there is not enough memory.

    Source: theory in the docs, §4.

    >>> import torch, adaptive_tangents as at
    >>> feats = at.tangent_features(torch.nn.Linear(3, 1), torch.randn(6, 3))
    >>> leave_one_out(at.fit(feats, torch.randn(6, 1), ridge=0.1)).shape
    torch.Size([6, 1])
    """
    if not isinstance(found, Fit):
        raise TangentError(f"leave_one_out: takes a fit on features, got {type(found).__name__}")
    found.check_whole("leave_one_out")
    if found.targets is None:
        raise TangentError("leave_one_out: the closed form is for squared error; use fit_path(..., folds=5)")
    if found.dropped:
        raise TangentError("leave_one_out: some constraints follow from others; use a positive ridge, or folds")
    feats = found.features.to(torch.float64)
    size = feats.n * feats.c
    require_memory("leave_one_out", 4 * 8 * size**2, limit_for(feats.limit, feats.device), remedy="use folds")
    kernel = found.transform(feats).kernel().reshape(size, size)
    kernel.diagonal().add_(found.ridge + found.jitter)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel)).reshape(feats.n, feats.c, feats.n, feats.c)
    own = inverse.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    residuals: Tensor = torch.linalg.solve(own, found.dual)
    return residuals


def _folded(
    feats: TangentFeatures,
    r: Tensor,
    structure: Structure,
    ridge: float,
    folds: int,
    seed: int,
    options: dict[str, Any],
) -> float:
    """The mean loss of held-out samples over all folds."""
    order = torch.randperm(feats.n, generator=torch.Generator().manual_seed(seed), device="cpu").to(feats.device)
    offset, total = options.get("offset"), 0.0
    for held in order.tensor_split(folds):
        rest = torch.ones(feats.n, dtype=torch.bool, device=feats.device)
        rest[held] = False
        kept = rest.nonzero().flatten()
        some = options | ({"offset": offset[kept]} if offset is not None else {})
        found = fit(feats[kept], r[kept], structure=structure, ridge=ridge, **some)
        predicted = found.predict(feats[held])
        if offset is None:
            total += float(((r[held].double().reshape(predicted.shape) - predicted) ** 2).sum())
            continue
        logits = offset[held].double() + predicted
        logits = torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits
        total += float(functional.cross_entropy(logits, r[held].long(), reduction="sum"))
    return total / feats.n
