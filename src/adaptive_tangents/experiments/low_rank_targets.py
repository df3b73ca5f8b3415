"""Where adapting features saves samples: targets that depend on one or two directions of the inputs.

Inputs x ~ N(0, I_d); the product (u·x)(u₂·x) and the square (u·x)² − 1, u and u₂ random unit vectors. The features are the
tangent features of the first layer of a ReLU network of two layers at initialisation, weights N(0, 2/d), readout ±1/√m, no
biases; the model is φ(x)β, whose coefficients of the product are nearly of rank one or two. What is measured is the relative
test error ‖φβ − y‖²/‖y‖² of exact fits, over the number of samples.

The figures in ``EARLIER`` were measured for this project before it had this experiment, in a set-up of which no more is known
than the network's width, the inputs, the targets and λ. Readout weights and ridge are those of several tried that agree with
them: at ρ = 0 normal or uniform readout weights give two-sided errors 1.1 to 1.7 times as large (6 seeds), and the error of
``Fixed`` for the square at n = 800 is 0.46 (20 seeds), 20% below theirs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_tangents.capture import tangent_features
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.common import (
    Asked,
    Clock,
    ExperimentResult,
    Progress,
    Units,
    claim,
    flatten,
    heading,
    settings,
)
from adaptive_tangents.penalties import Quadratic
from adaptive_tangents.solvers import fit
from adaptive_tangents.spectral import Left, Right, TwoSided
from adaptive_tangents.structures import Fixed, Structure

NAME = "low-rank-targets"
FORMULAS = {"product": "(u·x)(u₂·x)", "square": "(u·x)² − 1"}
STRUCTURES: dict[str, Callable[[float], Structure]] = {
    "Fixed": lambda strength: Fixed(),
    "Right": lambda strength: Right(Quadratic(strength)),
    "Left": lambda strength: Left(Quadratic(strength)),
    "TwoSided": lambda strength: TwoSided(Quadratic(strength)),
}
# Relative test errors by number of samples: Fixed, TwoSided.
EARLIER: dict[str, dict[int, tuple[float, float]]] = {
    "product": {200: (0.92, 0.21), 400: (0.77, 0.09), 800: (0.41, 0.065)},
    "square": {400: (0.78, 0.19), 800: (0.58, 0.13)},
}
WITHIN = 0.2  # relative; what counts as the same figure
LEVELS = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2)  # of the error, at which samples are counted


@dataclass(frozen=True)
class LowRankConfig:
    """Sizes of data and network; ``product`` and ``square`` are the strength λ of each target's penalty, ``ridge`` is ρ.

    Every seed draws its own network, directions and samples; ``sizes`` are nested, and the errors are means over seeds.
    """

    sizes: tuple[int, ...] = (100, 200, 400, 800, 1600)
    structures: tuple[str, ...] = tuple(STRUCTURES)
    seeds: int = 5
    inputs: int = 40
    units: int = 500
    test_samples: int = 2000
    product: float = 0.01
    square: float = 1.0
    ridge: float = 1.0

    def __post_init__(self) -> None:
        counts = (self.seeds, self.inputs - 1, self.units, self.test_samples, *self.sizes)
        if min(counts) < 1 or any(a >= b for a, b in pairwise(self.sizes)) or not self.sizes:
            raise TangentError(f"{NAME}: counts are positive, inputs at least 2 and sizes rise, got {self}")
        unknown = [name for name in self.structures if name not in STRUCTURES]
        if unknown or not self.structures:
            raise TangentError(f"{NAME}: structures are {', '.join(STRUCTURES)}, got {self.structures}")

    def quick(self) -> "LowRankConfig":
        """One seed and few samples."""
        return LowRankConfig(sizes=(100, 200, 400), structures=self.structures, seeds=1, test_samples=1000)


@dataclass(frozen=True)
class Draw:
    """A network and its samples: what one seed decides."""

    model: nn.Module
    directions: Tensor
    train: Tensor
    test: Tensor

    def target(self, name: str, x: Tensor) -> Tensor:
        """The target's values, (n, 1)."""
        along = x @ self.directions
        values: Tensor = along.prod(1) if name == "product" else along[:, 0] ** 2 - 1
        return values[:, None]


def draw(config: LowRankConfig, seed: int) -> Draw:
    """The network, the directions and the samples of a seed, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    d, m = config.inputs, config.units
    model = nn.Sequential(nn.Linear(d, m, bias=False), nn.ReLU(), nn.Linear(m, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(normal(m, d) * math.sqrt(2 / d))  # type: ignore[operator]
        model[2].weight.copy_(normal(1, m).sign() / math.sqrt(m))  # type: ignore[operator]
    directions = normal(d, 2)
    return Draw(model, directions / directions.norm(dim=0), normal(config.sizes[-1], d), normal(config.test_samples, d))


def configured(asked: Asked) -> LowRankConfig:
    """The settings for what was asked."""
    config = LowRankConfig()
    if asked.seeds is not None:
        config = replace(config, seeds=asked.seeds)
    return config.quick() if asked.size == "quick" else config


def run(
    config: LowRankConfig,
    *,
    device: str = "cpu",
    progress: Progress = lambda stage, fraction: None,
    units: Units | None = None,
) -> ExperimentResult:
    """Fit every structure to every number of samples, and set the errors beside those measured earlier.

    Raises TangentError where the config does, and for strengths or a ridge that ``fit`` refuses.

    >>> small = LowRankConfig(sizes=(20, 40), structures=("Fixed",), seeds=1, inputs=5, units=30, test_samples=50)
    >>> sorted(run(small).arrays)
    ['product.Fixed', 'sizes', 'square.Fixed']
    """
    clock = Clock(progress, config.seeds * sum(n**1.5 for n in config.sizes))
    shape = (config.seeds, len(config.sizes))
    arrays = {f"{target}.{name}": np.full(shape, np.nan) for target in FORMULAS for name in config.structures}
    for seed in range(config.seeds):
        drawn = draw(config, seed)
        held_out = tangent_features(drawn.model, drawn.test, wrt="0.weight")
        for k, n in enumerate(config.sizes):
            with clock.stage(f"seed {seed}, n = {n}", n**1.5):
                feats = tangent_features(drawn.model, drawn.train[:n], wrt="0.weight")
                for target in FORMULAS:
                    y, wanted = (drawn.target(target, x) for x in (drawn.train[:n], drawn.test))
                    for name in config.structures:
                        structure = STRUCTURES[name](getattr(config, target))
                        found = fit(feats, y, structure=structure, ridge=config.ridge, tol=1e-7)
                        error = ((found.predict(held_out) - wanted) ** 2).sum() / (wanted**2).sum()
                        arrays[f"{target}.{name}"][seed, k] = float(error)
    arrays["sizes"] = np.array(config.sizes)
    targets = {target: _measure(target, config, arrays) for target in FORMULAS}
    results = {
        **heading(NAME, settings(config), clock),
        "targets": targets,
        "claims": _claims(targets),
        "metrics": flatten(targets),
    }
    return ExperimentResult(results, arrays)


def _measure(target: str, config: LowRankConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Mean errors and their scatter, the earlier figures beside them, and the samples saved at each level of the error."""
    errors: dict[str, dict[str, float]] = {}
    scatter: dict[str, dict[str, float]] = {}
    for name in config.structures:
        of_seeds = arrays[f"{target}.{name}"]
        errors[name] = {str(n): float(e) for n, e in zip(config.sizes, of_seeds.mean(0), strict=True)}
        spread = of_seeds.std(0, ddof=1) if config.seeds > 1 else np.full(len(config.sizes), np.nan)
        scatter[name] = {str(n): float(e) for n, e in zip(config.sizes, spread, strict=True)}
    earlier = {}
    for n, pair in EARLIER[target].items():
        for name, figure in zip(("Fixed", "TwoSided"), pair, strict=True):
            if name in errors and str(n) in errors[name]:
                measured = errors[name][str(n)]
                earlier[f"{name}, n = {n}"] = {
                    "earlier": figure, "measured": measured, "difference": measured / figure - 1,
                }  # fmt: skip
    needed = {name: {str(level): samples_needed(e, level) for level in LEVELS} for name, e in errors.items()}
    saved = {
        name: {level: _ratio(needed["Fixed"][level], n) for level, n in levels.items()}
        for name, levels in needed.items()
        if name != "Fixed" and "Fixed" in needed
    }
    return {
        "formula": FORMULAS[target], "strength": getattr(config, target), "errors": errors, "scatter": scatter,
        "earlier": earlier, "samples": needed, "saved": saved,
    }  # fmt: skip


def samples_needed(errors: Mapping[str, float], level: float) -> float | None:
    """The n at which the error first falls to a level, straight between sizes in log n and log error; None if beyond them.

    >>> samples_needed({"100": 0.8, "400": 0.2}, 0.4)
    200.0
    """
    for (n, e), (n_next, e_next) in pairwise((int(n), e) for n, e in errors.items()):
        if e >= level >= e_next and e > e_next:
            # rounded, so that a level met at a size gives that size
            share = math.log(e / level) / math.log(e / e_next)
            return round(float(n * (n_next / n) ** share), 9)
    return None


def _ratio(fixed: float | None, adaptive: float | None) -> float | None:
    return None if fixed is None or adaptive is None else fixed / adaptive


def _claims(targets: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each claim in words, whether the numbers bear it out, and the numbers; only of what was measured."""
    claims: dict[str, dict[str, Any]] = {}
    for target, found in targets.items():
        formula, errors, earlier = found["formula"], found["errors"], found["earlier"]
        if {"Fixed", "TwoSided"} <= set(errors):
            pairs = {n: (errors["Fixed"][n], errors["TwoSided"][n]) for n in errors["Fixed"]}
            claims[f"{target}.lower"] = claim(
                f"Adapting both sides lowers the test error of {formula} at every number of samples",
                all(two < fixed for fixed, two in pairs.values()),
                refuted_by="a number of samples at which it does not",
                evidence="; ".join(f"n = {n}: {fixed:.2f} → {two:.3f}" for n, (fixed, two) in pairs.items()),
            )
        saved = {level: factor for level, factor in found["saved"].get("TwoSided", {}).items() if factor is not None}
        if saved:
            claims[f"{target}.saved"] = claim(
                f"It reaches the same error of {formula} with fewer samples",
                min(saved.values()) > 1,
                refuted_by="a level of the error that takes as many",
                evidence="; ".join(f"error {level}: {factor:.1f} times fewer" for level, factor in saved.items()),
            )
        for key, pair in earlier.items():
            claims[f"{target}.{key}"] = claim(
                f"{formula}, {key}: the error is the {pair['earlier']:g} measured earlier, within {WITHIN:.0%}",
                abs(pair["difference"]) <= WITHIN,
                refuted_by=f"a mean error off by more than {WITHIN:.0%}",
                published=f"{pair['earlier']:g} (this project, earlier)",
                evidence=f"{pair['measured']:.3f}, {pair['difference']:+.0%}".replace("-", "−"),
            )
    one_sided = [
        abs(found["errors"]["Left"][n] / e - 1)
        for found in targets.values()
        if {"Left", "Right"} <= set(found["errors"])
        for n, e in found["errors"]["Right"].items()
    ]
    if one_sided:
        claims["sides"] = claim(
            "Left and Right have the same fit, as they induce the same penalty",
            max(one_sided) < 1e-3,
            refuted_by="errors a thousandth apart",
            evidence=f"errors differ by at most {max(one_sided):.1e} relative",
        )
    return claims
