"""The study exact-solvers: measures, verdicts, refusals and the page."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import adaptive_tangents as at
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.exact_solvers import page as exact_page
from adaptive_tangents.experiments.exact_solvers import run as exact_solvers
from adaptive_tangents.experiments.exact_solvers.claims import SOLVER_NAMES
from adaptive_tangents.experiments.exact_solvers.claims import claims as judged
from adaptive_tangents.experiments.exact_solvers.run import ExactSolversConfig, run
from adaptive_tangents.experiments.training import relu_network
from adaptive_tangents.reporting.drawing import render
from adaptive_tangents.runs.record import RunResult
from study_cases import SMALL as CONFIGS
from study_cases import as_vectors, made_up_data, made_up_digits, small_run

pytestmark = pytest.mark.xdist_group("exact-solvers")

SMALL = CONFIGS["exact-solvers"]
CLAIMS = ["agree", "certified", "monotone", "rounds", "bound", "rank.Left", "rank.TwoSided"]


@pytest.fixture(scope="module", autouse=True)
def data() -> Iterator[None]:
    with made_up_data():
        yield


@pytest.fixture(scope="module")
def small() -> RunResult:
    return small_run("exact-solvers").result


def kernel_regression() -> dict[str, np.ndarray]:
    """Coefficients of the fixed kernel from the Jacobian, β = Jᵀ(JJᵀ)⁻¹r, as a matrix [weight, bias] per layer."""
    digits = made_up_digits("", classes=(2, 3))
    x, labels = as_vectors(digits.train_images[:30]), digits.train_labels[:30]
    generator = torch.Generator().manual_seed(0)
    network = relu_network((x.shape[1], 24, 24, 1), exact_solvers.LAYERS, bias=True, generator=generator)
    r = (2.0 * labels[:, None] - 5).double() - network(x).detach().double()  # digit 2 is −1, digit 3 is 1
    network, x = network.double(), x.double()
    parameters = dict(network.named_parameters())
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(network, p, (x,))[:, 0])(parameters)
    rows = torch.cat([part.detach().flatten(1) for part in jacobian.values()], 1)
    alpha = torch.linalg.solve(rows @ rows.mT, r)[:, 0]
    found = {}
    for layer in exact_solvers.LAYERS:
        weight, bias = (torch.tensordot(alpha, jacobian[f"{layer}.{kind}"].detach(), 1) for kind in ("weight", "bias"))
        found[layer] = torch.cat([weight, bias[:, None]], 1).numpy()
    return found


def test_singular_values_of_the_fixed_kernel_are_those_of_regression_with_the_jacobian(
    small: RunResult,
) -> None:
    for layer, matrix in kernel_regression().items():
        expected = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(small.arrays[f"Fixed.{layer}"], expected, rtol=1e-3, atol=1e-4 * expected[0])


def test_objectives_are_the_induced_penalties_of_the_singular_values(small: RunResult) -> None:
    one = at.Quadratic(1.0)
    penalties = {"Fixed": at.NoAdaptation(), "Left": one, "TwoSided": one.compose(one)}
    for model, penalty in penalties.items():
        values = [torch.from_numpy(small.arrays[f"{model}.{layer}"]) for layer in exact_solvers.LAYERS]
        total = sum(float(penalty.induced().value(v).sum()) for v in values)
        assert small.results["model"][model]["objective"] == pytest.approx(total, rel=1e-10)


def test_effective_ranks_are_those_of_the_singular_values(small: RunResult) -> None:
    for model, ranks in small.results["rank"].items():
        for layer, rank in ranks.items():
            values = small.arrays[f"{model}.{layer}"]
            shares = values / values.sum()
            assert rank["entropy"] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-8)
            assert rank["stable"] == pytest.approx((values**2).sum() / values.max() ** 2, rel=1e-10)
            assert rank["participation"] == pytest.approx((values**2).sum() ** 2 / (values**4).sum(), rel=1e-10)


def test_the_course_of_each_solver_ends_at_its_solution(small: RunResult) -> None:
    for solver, found in small.results["solver"].items():
        course = {key: small.arrays[f"{solver}.{key}"] for key in ("seconds", "solves", "objective", "temper")}
        assert {len(values) for values in course.values()} == {found["steps"]}
        assert course["objective"][-1] == pytest.approx(found["objective"], rel=1e-12)
        assert course["solves"][-1] == found["rounds"]
        assert course["seconds"][-1] == found["seconds"]
        assert (np.diff(course["seconds"]) >= 0).all()
        assert course["temper"][-1] == 1


def test_every_claim_holds_on_a_small_network(small: RunResult) -> None:
    assert list(small.results["claims"]) == CLAIMS
    assert [name for name, claim in small.results["claims"].items() if not claim["holds"]] == []
    assert small.results["metrics"]["solver.newton.rounds"] == small.results["solver"]["newton"]["rounds"]


@pytest.mark.parametrize(
    ("claim", "path", "value", "evidence"),
    [
        ("agree", ("solver", "alternation", "objective"), 1e3, "apart, relative"),
        ("certified", ("solver", "anderson", "stationarity"), 1e-3, "1.0e-03 (Anderson)"),
        ("certified", ("solver", "anderson", "feasibility"), 1e-3, "missed by at most 1.0e-03"),
        ("monotone", ("model", "Left", "largest_rise"), 1e-3, "largest rise of a step: 1.0e-03"),
        ("rounds", ("solver", "anderson", "rounds"), 1, "1 (Anderson)"),
        ("bound", ("model", "Left", "gap"), 1e-3, "1.0e-03 above a lower bound"),
        ("bound", ("model", "Left", "gap"), None, "no bound"),
        ("rank.Left", ("rank", "Left", "hidden2", "entropy"), 99.0, "99.0 against"),
        ("rank.TwoSided", ("rank", "TwoSided", "hidden1", "entropy"), 99.0, "99.0 against"),
    ],
)
def test_a_claim_that_does_not_hold_is_said_not_to(
    small: RunResult, claim: str, path: tuple[str, ...], value: Any, evidence: str
) -> None:
    spoiled = copy.deepcopy({key: small.results[key] for key in ("solver", "model", "rank", "layers")})
    *way, last = path
    place = spoiled
    for key in way:
        place = place[key]
    place[last] = value
    claims = judged(spoiled, tol=SMALL.tol)
    assert [name for name, found in claims.items() if not found["holds"]] == [claim]
    assert evidence in claims[claim]["evidence"]
    verdict = exact_page.PAGE.context({**spoiled, "experiment": "exact-solvers", "claims": claims})["verdict"]
    assert verdict == f"6 of 7 claims hold. These do not: {claims[claim]['claim']}."


def test_a_solver_that_gives_up_is_part_of_the_results() -> None:
    results = run(ExactSolversConfig(samples=20, width=8, max_rounds=2)).results
    assert not results["solver"]["alternation"]["converged"]
    assert "stopped after 2 rounds" in results["solver"]["alternation"]["reason"]
    assert not results["claims"]["certified"]["holds"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 1}, "samples and width must be at least 2"),
        ({"width": 1}, "samples and width must be at least 2"),
        ({"samples": 900}, r"made up holds 120 training digits \(2, 3\), fewer than samples = 900"),
        ({"strength": -1.0, "samples": 20, "width": 8}, "strength"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TangentError, match=message):
        run(ExactSolversConfig(**changes))


def test_a_curve_is_dashed_only_while_adaptation_sets_in(small: RunResult) -> None:
    left, right = exact_page.draw_solvers(small.results, small.arrays).axes
    early = int((small.arrays["newton.temper"] > 1).sum())
    assert early > 0
    for axes in (left, right):
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert [len(line.get_xdata()) for line in dashed] == [early + 1]
    assert [text.get_text() for text in right.get_legend().get_texts()] == list(SOLVER_NAMES.values())


def test_layers_of_one_row_have_no_panel(small: RunResult) -> None:
    figure = exact_page.draw_coefficients(small.results, small.arrays)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["hidden1, 24 × 82", "hidden2, 24 × 25"]
    assert render(exact_page.draw_coefficients, "coefficients", small.results, small.arrays).png.startswith(b"\x89PNG")
