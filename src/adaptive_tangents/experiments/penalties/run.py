"""What do penalties on the transform cost small and large coefficients, and which induced penalties are convex?

The penalties on a singular value z of the transform are ω₁ = λ(z − 1)², ω₂ = λ|z − 1| and ω₃ = ω₁ ⊕ ω₂. They induce ω̃₁, ω̃₂
and ω̃₃ on a singular value v of the coefficients, which are compared with the v² of the fixed kernel.
Source: LeJeune & Alemohammad, CPAL 2024, §3 and its figure of penalties.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.penalties import NAME
from adaptive_tangents.experiments.penalties.claims import EXPECTED, claims
from adaptive_tangents.experiments.study import Asked
from adaptive_tangents.penalties.closed_forms import Absolute, Quadratic
from adaptive_tangents.penalties.penalty import Penalty
from adaptive_tangents.runs.record import Clock, RunResult, flatten, heading, settings
from adaptive_tangents.runs.units import Units
from adaptive_tangents.runtime.progress import Progress, silent

FORMULAS = {"omega1": "λ(z − 1)²", "omega2": "λ|z − 1|", "omega3": "ω₁ ⊕ ω₂"}


@dataclass(frozen=True)
class PenaltiesConfig:
    """The strength λ of both penalties, the panels' limits, and the ranges of small and large v, in units of √λ."""

    strength: float = 1.0
    largest_z: float = 4.0
    largest_v: float = 4.0
    points: int = 401
    near: float = 0.01
    far: tuple[float, float] = (1e8, 1e10)

    def __post_init__(self) -> None:
        if self.points < 3 or not self.largest_z > 1 or not self.largest_v > 0 or not 0 < self.near < self.far[0]:
            raise TangentError(
                f"{NAME}: needs at least 3 points, largest_z above 1, positive largest_v and near below far, got {self}"
            )
        if not self.far[0] < self.far[1]:
            raise TangentError(f"{NAME}: far goes from a smaller v to a larger one, got {self.far}")


def configured(asked: Asked) -> PenaltiesConfig:
    """The settings, the same for every request."""
    return PenaltiesConfig()


def run(
    config: PenaltiesConfig,
    *,
    device: str = "cpu",
    progress: Progress = silent,
    units: Units | None = None,
) -> RunResult:
    """Evaluate the three penalties and judge the claims about them.

    Raises TangentError if the config does, and for a strength that is not positive and finite.

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
        "claims": claims(measured, near=config.near, far=config.far),
        "metrics": flatten(measured),
    }
    return RunResult(results, arrays)


def _measure(penalty: Penalty, config: PenaltiesConfig) -> dict[str, Any]:
    """Departure from v² near 0, log-log slope for large v, and the least change of slope over the panel and beyond."""
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
