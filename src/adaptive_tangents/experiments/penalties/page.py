"""The page of penalties: their curves and the verdicts on the claims."""

from typing import Any

from matplotlib.figure import Figure

from adaptive_tangents.reporting.drawing import COLORS, DASHES, MUTED, grid
from adaptive_tangents.reporting.pages import Page, claims_context
from adaptive_tangents.runs.results import Arrays, Results


def draw_penalties(results: Results, arrays: Arrays) -> Figure:
    """Penalties on the transform against z, and the penalties they induce on coefficients beside v²."""
    figure, ((left, right),) = grid(1, 2, 3.9)
    names = dict(zip(results["penalties"], (r"(z-1)^2", r"|z-1|", r"\omega_1 \oplus \omega_2"), strict=True))
    strength = results["config"]["strength"]
    for k, ((name, formula), color) in enumerate(zip(names.items(), COLORS, strict=False), start=1):
        # λ is shown only if it is not 1; the third penalty is composed of the others.
        factor = "" if strength == 1 or k == 3 else r"\lambda"
        left.plot(arrays["z"], arrays[f"{name}.value"], color=color, lw=2, label=rf"$\omega_{k} = {factor}{formula}$")
        right.plot(arrays["v"], arrays[f"{name}.induced"], color=color, lw=2, label=rf"$\tilde\omega_{k}(v)$")
    right.plot(arrays["v"], arrays["square"], color=MUTED, lw=1.4, ls=DASHES, label="$v^2$, fixed kernel")
    left.set(xlabel="singular value $z$ of the transform", xlim=(1, arrays["z"][-1]))
    right.set(xlabel="singular value $v$ of the coefficients", xlim=(0, arrays["v"][-1]))
    left.set_title("Penalty on the transform", loc="left")
    right.set_title("Penalty induced on the coefficients", loc="left")
    # The limits follow the other curves: the first on the left and v² on the right leave the panel early.
    left.set_ylim(0, 1.6 * max(arrays[f"{name}.value"][-1] for name in list(names)[1:]))
    right.set_ylim(0, 1.1 * max(arrays[f"{name}.induced"][-1] for name in names))
    for axes in (left, right):
        axes.legend(loc="upper left")
    return figure


def _context(results: Results) -> dict[str, Any]:
    """How many of the claims hold, in one sentence."""
    return claims_context(
        results, "Small coefficients cost as much as with the fixed kernel, large ones less. Every claim holds."
    )


def _arrays(results: Results) -> list[str]:
    curves = [f"{penalty}.{kind}" for penalty in results["penalties"] for kind in ("value", "induced")]
    return ["z", "v", "square", *curves]


PAGE = Page(
    template="experiments/penalties/page.html.j2",
    figures={"penalties": draw_penalties},
    arrays=_arrays,
    context=_context,
)
