"""What penalties on the transform do to coefficients: v² for small ones, less for large ones, and which stay convex.

ω₁ = λ(z − 1)², ω₂ = λ|z − 1| and ω₃ = ω₁ ⊕ ω₂ on a singular value z of the transform, and the penalties ω̃₁, ω̃₂, ω̃₃ they
induce on a singular value v of the coefficients, beside the v² of the fixed kernel.
Source: LeJeune & Alemohammad, CPAL 2024, §3 and its figure of penalties.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.claims import claim
from adaptive_tangents.experiments.penalties import NAME
from adaptive_tangents.experiments.study import Asked
from adaptive_tangents.induced import Penalty
from adaptive_tangents.penalties import Absolute, Quadratic
from adaptive_tangents.runs.record import Clock, Progress, RunResult, flatten, heading, settings, silent
from adaptive_tangents.runs.units import Units

# The log-log slope far out, 2/(1 + 2e) where log z rises e times as fast as the log of the level; and whether ω̃ is convex.
EXPECTED = {"omega1": (1.0, True), "omega2": (2 / 3, False), "omega3": (1 / 2, False)}
FORMULAS = {"omega1": "λ(z − 1)²", "omega2": "λ|z − 1|", "omega3": "ω₁ ⊕ ω₂"}
SYMBOLS = {"omega1": "ω̃₁", "omega2": "ω̃₂", "omega3": "ω̃₃"}

# A measured slope is taken as the stated one within this, and ω̃ as v² within this share.
SLOPE_TOLERANCE, NEAR_TOLERANCE = 0.01, 1e-3


@dataclass(frozen=True)
class PenaltiesConfig:
    """The strength λ of both penalties, the panels' ends, and (in units of √λ) where v counts as near 0 and as far out."""

    strength: float = 1.0
    largest_z: float = 4.0
    largest_v: float = 4.0
    points: int = 401
    near: float = 0.01
    far: tuple[float, float] = (1e8, 1e10)

    def __post_init__(self) -> None:
        if self.points < 3 or not self.largest_z > 1 or not self.largest_v > 0 or not 0 < self.near < self.far[0]:
            raise TangentError(
                f"{NAME}: at least 3 points, largest_z above 1, largest_v positive and near below far, got {self}"
            )
        if not self.far[0] < self.far[1]:
            raise TangentError(f"{NAME}: far goes from a smaller v to a larger one, got {self.far}")


def configured(asked: Asked) -> PenaltiesConfig:
    """The settings for what was asked: always the same."""
    return PenaltiesConfig()


def run(
    config: PenaltiesConfig,
    *,
    device: str = "cpu",
    progress: Progress = silent,
    units: Units | None = None,
) -> RunResult:
    """Evaluate the three penalties and judge what is claimed of them.

    Raises TangentError where the config does, and for a strength that is not positive and finite.

    >>> all(claim["holds"] for claim in run(PenaltiesConfig()).results["claims"].values())
    True
    """
    clock = Clock(progress, len(EXPECTED))
    one, two = Quadratic(config.strength), Absolute(config.strength)
    penalties: dict[str, Penalty] = {"omega1": one, "omega2": two, "omega3": one.compose(two)}
    z = torch.linspace(1, config.largest_z, config.points, dtype=torch.float64)
    v = torch.linspace(0, config.largest_v, config.points, dtype=torch.float64)
    arrays = {"z": z.numpy(), "v": v.numpy(), "square": (v**2).numpy()}
    measured: dict[str, Any] = {}
    for name, penalty in penalties.items():
        with clock.stage(name, 1):
            arrays[f"{name}.value"] = penalty.value(z).numpy()
            arrays[f"{name}.induced"] = penalty.induced().value(v).numpy()
            measured[name] = {"formula": FORMULAS[name], **_measure(penalty, config)}
    results = {
        **heading(NAME, settings(config), clock),
        "penalties": measured,
        "claims": _claims(measured, config),
        "metrics": flatten(measured),
    }
    return RunResult(results, arrays)


def _measure(penalty: Penalty, config: PenaltiesConfig) -> dict[str, Any]:
    """Departure from v² near 0, log-log slope far out, and the least change of slope over the panel and beyond."""
    induced, scale = penalty.induced(), math.sqrt(config.strength)
    near = torch.logspace(-8, 0, 81, dtype=torch.float64) * config.near * scale
    far = torch.tensor(config.far, dtype=torch.float64) * scale
    v = torch.cat([torch.linspace(0, config.largest_v, 2001), torch.logspace(0, 4, 401) * config.largest_v * 1.001])
    v = v.double()
    values = induced.value(v)
    slopes = values.diff() / v.diff()
    low, high = induced.value(far).log().tolist()
    return {
        "departure_near_zero": float((induced.value(near) / near**2 - 1).abs().max()),
        "slope": (high - low) / math.log(config.far[1] / config.far[0]),
        "share_of_square": float(induced.value(far[:1])[0] / far[0] ** 2),
        "least_rise_of_slope": float((slopes.diff() / slopes[1:]).min()),
        "convex": bool((slopes.diff() >= -1e-10 * slopes[1:]).all()),
        "convexity": induced.convexity,
    }


def _claims(measured: dict[str, Any], config: PenaltiesConfig) -> dict[str, dict[str, Any]]:
    """Each claim in words, whether the numbers bear it out, and the numbers."""
    claims = {
        "near": claim(
            "Near 0 the induced penalties are v², as for the fixed kernel",
            all(numbers["departure_near_zero"] < NEAR_TOLERANCE for numbers in measured.values()),
            refuted_by=f"a departure from v² above {NEAR_TOLERANCE:g} relative",
            published="figure: the curves touch v² at 0",
            evidence=f"up to v = {config.near:g}·√λ they differ from v² by at most "
            + _listed(measured, "departure_near_zero", ".1e"),
        ),
        "far": claim(
            "For large v they grow more slowly than v²",
            all(n["slope"] < 2 and n["share_of_square"] < 0.01 for n in measured.values()),
            refuted_by="a log-log slope of 2, or a hundredth of v² far out",
            published="figure: the curves bend away from v²",
            evidence=f"at v = {config.far[0]:g}·√λ their share of v² is " + _listed(measured, "share_of_square", ".1e"),
        ),
    }
    for name, (slope, convex) in EXPECTED.items():
        found = measured[name]
        claims[f"{name}.slope"] = claim(
            f"{SYMBOLS[name]} grows like v to the power {slope:.3g}",
            abs(found["slope"] - slope) < SLOPE_TOLERANCE,
            refuted_by=f"a log-log slope off by {SLOPE_TOLERANCE:g}",
            evidence=f"log-log slope {found['slope']:.4f} from v = {config.far[0]:g}·√λ to {config.far[1]:g}·√λ",
        )
        claims[f"{name}.convex"] = claim(
            f"{SYMBOLS[name]} is {'convex' if convex else 'not convex'}",
            found["convex"] == convex,
            refuted_by="a slope that falls between neighbouring points"
            if convex
            else "a slope that never falls between neighbouring points",
            evidence=f"its slope {'never falls' if found['convex'] else 'falls'} between neighbouring points "
            f"(least relative change {found['least_rise_of_slope']:.1e}); {found['convexity']}",
        )
    return claims


def _listed(measured: dict[str, Any], key: str, form: str) -> str:
    return ", ".join(f"{numbers[key]:{form}} ({SYMBOLS[name]})" for name, numbers in measured.items())
