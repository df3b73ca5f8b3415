"""The study penalties: curves as defined, verdicts, and the page."""

import numpy as np
import pytest

import theory_reference as reference
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.penalties import claims as penalty_claims
from adaptive_tangents.experiments.penalties.run import PenaltiesConfig, run
from adaptive_tangents.experiments.registry import STUDIES
from study_cases import small_run

pytestmark = pytest.mark.xdist_group("penalties")

OMEGA = {"omega1": reference.quadratic, "omega2": reference.absolute}
CLAIMS = ["near", "far", *(f"omega{k}.{kind}" for k in (1, 2, 3) for kind in ("slope", "convex"))]


@pytest.mark.parametrize("strength", [1.0, 0.2])
def test_curves_are_the_penalties_and_the_minima_that_they_induce(strength: float) -> None:
    arrays = run(PenaltiesConfig(strength=strength, points=9)).arrays
    one, two = (make(strength) for make in OMEGA.values())
    omegas = {"omega1": one, "omega2": two, "omega3": reference.composed(one, two)}
    np.testing.assert_allclose(arrays["square"], arrays["v"] ** 2)
    for name, omega in omegas.items():
        np.testing.assert_allclose(arrays[f"{name}.value"], omega(arrays["z"] - 1), rtol=1e-8, atol=1e-12)
        if name == "omega3":
            least = [reference.induced_by_two(one, two, float(v)) for v in arrays["v"]]
        else:
            least = [reference.induced(omega, float(v))[0] for v in arrays["v"]]
        np.testing.assert_allclose(arrays[f"{name}.induced"], least, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("strength", [1e-4, 1.0, 300.0])
def test_every_claim_holds_at_any_strength(strength: float) -> None:
    results = run(PenaltiesConfig(strength=strength)).results
    assert list(results["claims"]) == CLAIMS
    assert [name for name, claim in results["claims"].items() if not claim["holds"]] == []
    slopes = [results["penalties"][name]["slope"] for name in penalty_claims.EXPECTED]
    assert slopes == pytest.approx([1, 2 / 3, 1 / 2], abs=2e-3)
    assert results["metrics"]["omega3.slope"] == slopes[2]


def test_a_claim_that_does_not_hold_is_said_not_to() -> None:
    config = PenaltiesConfig()
    measured = run(config).results["penalties"]
    wrong = {
        "near": ("omega2", "departure_near_zero", 0.1),
        "far": ("omega1", "share_of_square", 0.5),
        "omega3.slope": ("omega3", "slope", 0.6),
        "omega1.convex": ("omega1", "convex", False),
    }
    for claim, (name, key, value) in wrong.items():
        spoiled = {**measured, name: {**measured[name], key: value}}
        claims = penalty_claims.claims(spoiled, near=config.near, far=config.far)
        assert [k for k, v in claims.items() if not v["holds"]] == [claim]
        verdict = STUDIES["penalties"].page().context({"experiment": "penalties", "claims": claims})["verdict"]
        assert verdict == f"7 of 8 claims hold. These do not: {claims[claim]['claim']}."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": 2}, "at least 3 points"),
        ({"largest_z": 1.0}, "largest_z above 1"),
        ({"largest_v": 0.0}, "positive largest_v"),
        ({"near": 1e9}, "near below far"),
        ({"far": (1e9, 1e8)}, "far goes from a smaller v to a larger one"),
    ],
)
def test_settings_that_make_no_figure_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TangentError, match=f"penalties: .*{message}"):
        PenaltiesConfig(**changes)


def test_the_page_says_that_every_claim_holds() -> None:
    results = small_run("penalties").result.results
    assert STUDIES["penalties"].page().context(results)["verdict"].endswith("Every claim holds.")
