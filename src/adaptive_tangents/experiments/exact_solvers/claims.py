"""The claims of exact-solvers: one certified optimum, and coefficients of lower rank than the fixed kernel's."""

from typing import Any

from adaptive_tangents.experiments.claims import claim

SOLVER_NAMES = {"newton": "Newton’s method", "anderson": "Anderson", "alternation": "alternation"}

# Relative: objectives within AGREEMENT are one optimum; a rise of the objective within ROUNDING is rounding.
AGREEMENT, ROUNDING = 1e-6, 1e-12
# Relative: the largest violation of a constraint, and the largest gap between a convex objective and its lower bound.
FEASIBLE, GAP = 1e-6, 1e-6


def claims(measured: dict[str, Any], *, tol: float) -> dict[str, dict[str, Any]]:
    """Every claim in words, its verdict, and the numbers behind it."""
    solver, model = measured["solver"], measured["model"]
    objectives = [found["objective"] for found in solver.values()]
    spread = max(objectives) / min(objectives) - 1
    rise = max(found["largest_rise"] for found in (*solver.values(), *model.values()))
    wide = [layer for layer, shape in measured["layers"].items() if min(shape) > 1]  # a single row has no rank to lower
    made = {
        "agree": claim(
            "All three solvers end at one optimum",
            spread <= AGREEMENT,
            refuted_by=f"objectives more than {AGREEMENT:g} apart, relative",
            evidence=f"objectives {_listed(solver, 'objective', '.8g')}: {spread:.1e} apart, relative",
        ),
        "certified": claim(
            f"Each is stationary to {tol**0.5:.0e} and meets the targets",
            all(f["stationarity"] <= tol**0.5 and f["feasibility"] <= FEASIBLE for f in solver.values()),
            refuted_by="a larger gradient, or a target missed",
            evidence=f"stationarity {_listed(solver, 'stationarity', '.1e')}; targets missed by at most "
            f"{max(found['feasibility'] for found in solver.values()):.1e}, relative",
        ),
        "monotone": claim(
            "The objective never rises on the way",
            rise <= ROUNDING,
            refuted_by=f"a step that raises it by more than {ROUNDING:g}, relative",
            evidence="no step of any fit raised it" if rise <= 0 else f"largest rise of a step: {rise:.1e}, relative",
        ),
        "rounds": claim(
            "Newton’s method takes the fewest kernel solves",
            solver["newton"]["rounds"] < min(solver["anderson"]["rounds"], solver["alternation"]["rounds"]),
            refuted_by="another solver with fewer",
            evidence=f"{_listed(solver, 'rounds', 'd')}; in seconds {_listed(solver, 'seconds', '.1f')}",
        ),
        "bound": claim(
            "The convex model, Left, is certified as the global optimum",
            model["Left"]["gap"] is not None and abs(model["Left"]["gap"]) <= GAP,
            refuted_by=f"an objective more than {GAP:g} above the bound, relative",
            evidence="no bound"
            if model["Left"]["gap"] is None
            else f"its objective {model['Left']['objective']:.8g} is {model['Left']['gap']:.1e} above a lower bound on all, "
            "relative",
        ),
    }
    for name in ("Left", "TwoSided"):
        pairs = {layer: [measured["rank"][key][layer]["entropy"] for key in (name, "Fixed")] for layer in wide}
        made[f"rank.{name}"] = claim(
            f"B is nearer to low rank under {name} than under Fixed, in every layer that has a rank",
            all(low < high for low, high in pairs.values()),
            evidence="effective (entropy) rank "
            + ", ".join(f"{low:.1f} against {high:.1f} in {layer}" for layer, (low, high) in pairs.items()),
            refuted_by="a layer whose rank is not lower",
            published="solutions are approximately low rank",
        )
    return made


def _listed(found: dict[str, Any], key: str, form: str) -> str:
    return ", ".join(f"{numbers[key]:{form}} ({SOLVER_NAMES[name]})" for name, numbers in found.items())
