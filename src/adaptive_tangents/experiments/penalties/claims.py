"""The claims of penalties: v² near 0, slower growth for large v, the slope of each, and which are convex."""

from typing import Any

from adaptive_tangents.experiments.claims import claim

# The log-log slope for large v, 2/(1 + 2e) if log z grows e times as fast as the log of the level; whether ω̃ is convex.
EXPECTED = {"omega1": (1.0, True), "omega2": (2 / 3, False), "omega3": (1 / 2, False)}
SYMBOLS = {"omega1": "ω̃₁", "omega2": "ω̃₂", "omega3": "ω̃₃"}
# Tolerances: of a slope, absolute; of ω̃ against v² near 0, relative.
SLOPE_TOLERANCE, NEAR_TOLERANCE = 0.01, 1e-3


def claims(measured: dict[str, Any], *, near: float, far: tuple[float, float]) -> dict[str, dict[str, Any]]:
    """Every claim in words, its verdict and numbers; ``near`` and ``far`` are in units of √λ."""
    made = {
        "near": claim(
            "Near 0 the induced penalties are v², as for the fixed kernel",
            all(numbers["departure_near_zero"] < NEAR_TOLERANCE for numbers in measured.values()),
            refuted_by=f"a departure from v² above {NEAR_TOLERANCE:g} relative",
            published="figure: the curves touch v² at 0",
            evidence=f"up to v = {near:g}·√λ they differ from v² by at most "
            + _listed(measured, "departure_near_zero", ".1e"),
        ),
        "far": claim(
            "For large v they grow more slowly than v²",
            all(n["slope"] < 2 and n["share_of_square"] < 0.01 for n in measured.values()),
            refuted_by="a log-log slope of 2, or a hundredth of v² far out",
            published="figure: the curves bend away from v²",
            evidence=f"at v = {far[0]:g}·√λ their share of v² is " + _listed(measured, "share_of_square", ".1e"),
        ),
    }
    for name, (slope, convex) in EXPECTED.items():
        found = measured[name]
        made[f"{name}.slope"] = claim(
            f"{SYMBOLS[name]} grows like v to the power {slope:.3g}",
            abs(found["slope"] - slope) < SLOPE_TOLERANCE,
            refuted_by=f"a log-log slope off by {SLOPE_TOLERANCE:g}",
            evidence=f"log-log slope {found['slope']:.4f} from v = {far[0]:g}·√λ to {far[1]:g}·√λ",
        )
        made[f"{name}.convex"] = claim(
            f"{SYMBOLS[name]} is {'convex' if convex else 'not convex'}",
            found["convex"] == convex,
            refuted_by="a slope that falls between neighboring points"
            if convex
            else "a slope that never falls between neighboring points",
            evidence=f"its slope {'never falls' if found['convex'] else 'falls'} between neighboring points "
            f"(least relative change {found['least_rise_of_slope']:.1e}); {found['convexity']}",
        )
    return made


def _listed(measured: dict[str, Any], key: str, form: str) -> str:
    return ", ".join(f"{numbers[key]:{form}} ({SYMBOLS[name]})" for name, numbers in measured.items())
