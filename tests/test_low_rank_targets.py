"""Targets of low rank: the errors measured earlier, reproduced; what the experiment counts, and the page that tells it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from adaptive_tangents import cli, report
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments import low_rank_targets
from adaptive_tangents.experiments.common import ExperimentResult
from adaptive_tangents.experiments.low_rank_targets import EARLIER, WITHIN, LowRankConfig, draw, run, samples_needed

SMALL = LowRankConfig(sizes=(40, 80), seeds=2, inputs=8, units=60, test_samples=300, product=0.1, square=0.1)
FIGURES = [
    (target, n, name, figure)
    for target, pairs in EARLIER.items()
    for n, pair in pairs.items()
    for name, figure in zip(("Fixed", "TwoSided"), pair, strict=True)
]


# ----------------------------------------------------------------------------------------------- the earlier figures


@pytest.fixture(scope="module")
def measured() -> ExperimentResult:
    return run(LowRankConfig(sizes=(200, 400, 800), structures=("Fixed", "TwoSided"), seeds=4, test_samples=4000))


@pytest.mark.slow
@pytest.mark.parametrize(("target", "n", "name", "figure"), FIGURES)
def test_errors_measured_earlier_are_met_within_a_fifth(
    measured: ExperimentResult, target: str, n: int, name: str, figure: float
) -> None:
    assert WITHIN == 0.2
    assert measured.results["targets"][target]["errors"][name][str(n)] == pytest.approx(figure, rel=0.2)


@pytest.mark.slow
def test_adapting_both_sides_reaches_the_fixed_kernels_error_with_a_quarter_of_the_samples(
    measured: ExperimentResult,
) -> None:
    errors = measured.results["targets"]["product"]["errors"]
    assert errors["TwoSided"]["200"] < errors["Fixed"]["800"]
    errors = measured.results["targets"]["square"]["errors"]
    assert errors["TwoSided"]["200"] < errors["Fixed"]["800"]


# ------------------------------------------------------------------------------------------------ what is measured


@pytest.fixture(scope="module")
def small() -> ExperimentResult:
    return run(SMALL)


def test_fixed_errors_are_those_of_kernel_regression_written_out(small: ExperimentResult) -> None:
    """The kernel of the first layer is Σ_j a_j² 1[w_j·x > 0] 1[w_j·x′ > 0] x·x′."""
    drawn = draw(SMALL, 1)
    w, a = drawn.model[0].weight.detach(), drawn.model[2].weight.detach()[0]
    u, u2 = drawn.directions.T

    def kernel(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.einsum("j,kj,lj->kl", a**2, (x @ w.T > 0).double(), (other @ w.T > 0).double()) * (x @ other.T)

    for target, values in (("product", lambda x: (x @ u) * (x @ u2)), ("square", lambda x: (x @ u) ** 2 - 1)):
        for k, n in enumerate(SMALL.sizes):
            x = drawn.train[:n]
            alpha = torch.linalg.solve(kernel(x, x) + SMALL.ridge * torch.eye(n), values(x))
            wanted = values(drawn.test)
            error = float(((kernel(drawn.test, x) @ alpha - wanted) ** 2).sum() / (wanted**2).sum())
            assert small.arrays[f"{target}.Fixed"][1, k] == pytest.approx(error, rel=1e-8)


def test_networks_have_the_stated_weights_and_directions_of_unit_length() -> None:
    drawn = draw(LowRankConfig(), 0)
    assert torch.equal(drawn.model[2].weight.abs(), torch.full((1, 500), 500**-0.5, dtype=torch.float64))
    assert float(drawn.model[0].weight.detach().var()) == pytest.approx(2 / 40, rel=0.05)
    torch.testing.assert_close(drawn.directions.norm(dim=0), torch.ones(2, dtype=torch.float64))
    assert drawn.model[0].bias is None
    assert drawn.train.shape == (1600, 40)


def test_left_and_right_have_the_same_errors(small: ExperimentResult) -> None:
    for target in EARLIER:
        np.testing.assert_allclose(small.arrays[f"{target}.Left"], small.arrays[f"{target}.Right"], rtol=1e-3)
    assert small.results["claims"]["sides"]["holds"]


def test_samples_saved_are_the_ratio_of_what_both_need(small: ExperimentResult) -> None:
    for found in small.results["targets"].values():
        for name, saved in found["saved"].items():
            for level, factor in saved.items():
                fixed, other = found["samples"]["Fixed"][level], found["samples"][name][level]
                assert factor == (None if fixed is None or other is None else pytest.approx(fixed / other))


@pytest.mark.parametrize(
    ("errors", "level", "n"),
    [
        ({"100": 0.9, "200": 0.45, "400": 0.225}, 0.45, 200.0),
        ({"100": 0.9, "200": 0.45, "400": 0.225}, 0.3, 300.0),
        ({"100": 0.9, "200": 0.45}, 0.95, None),
        ({"100": 0.9, "200": 0.45}, 0.4, None),
        ({"100": 0.5, "200": 0.6, "400": 0.3}, 0.5, 240.0),
        ({"100": 0.5}, 0.5, None),
    ],
)
def test_samples_needed_are_read_off_straight_lines_in_log_log(
    errors: dict[str, float], level: float, n: float | None
) -> None:
    assert samples_needed(errors, level) == (None if n is None else pytest.approx(n, rel=1e-3))


def test_a_claim_that_does_not_hold_is_said_not_to(small: ExperimentResult) -> None:
    targets = json.loads(json.dumps(small.results["targets"]))
    targets["product"]["errors"]["TwoSided"]["80"] = 2.0
    targets["product"]["earlier"] = {
        "Fixed, n = 80": {"earlier": 0.5, "measured": 0.61, "difference": 0.22},
        "TwoSided, n = 80": {"earlier": 0.5, "measured": 0.59, "difference": 0.18},
    }
    targets["square"]["saved"]["TwoSided"]["0.5"] = 0.9
    targets["square"]["errors"]["Left"]["80"] *= 1.1
    claims = low_rank_targets._claims(targets)
    failed, failed_before = (
        {k for k, c in found.items() if not c["holds"]} for found in (claims, small.results["claims"])
    )
    spoiled = {"product.lower", "product.Fixed, n = 80", "square.saved", "sides"}
    assert failed - failed_before == spoiled
    assert "product.TwoSided, n = 80" in claims
    told = report._low_rank_context({"experiment": "low-rank-targets", "targets": targets, "claims": claims})["verdict"]
    assert told.startswith("Only in part")
    assert told.endswith("1 of 2 errors measured earlier are met within 20%; the farthest is off by 22%.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": ()}, "sizes rise"),
        ({"sizes": (20, 10)}, "sizes rise"),
        ({"sizes": (0, 10)}, "counts are positive"),
        ({"seeds": 0}, "counts are positive"),
        ({"inputs": 1}, "inputs at least 2"),
        ({"test_samples": 0}, "counts are positive"),
        ({"structures": ("Fixed", "Sideways")}, "structures are Fixed, Right, Left, TwoSided, got"),
        ({"structures": ()}, "structures are Fixed"),
    ],
)
def test_settings_that_measure_nothing_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TangentError, match=f"low-rank-targets: .*{message}"):
        LowRankConfig(**changes)


# --------------------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("low-rank")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LowRankConfig, "quick", lambda self: replace(SMALL, sizes=(20, 40), seeds=1))
        done = CliRunner().invoke(cli.app, ["reproduce", "low-rank-targets", "--quick", "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out, done.output


def test_reproduce_prints_each_claim_and_writes_results_and_figure(folder: tuple[Path, str]) -> None:
    out, printed = folder
    results = json.loads((out / "results.json").read_text())
    assert printed.count("✓") + printed.count("✗") == len(results["claims"])
    assert {path.name for path in (out / "figures").iterdir()} == {"errors.png", "errors.svg"}


def test_the_page_shows_the_verdict_every_claim_and_the_figure_and_loads_nothing(folder: tuple[Path, str]) -> None:
    text = (folder[0] / "report.html").read_text("utf-8")
    results = json.loads((folder[0] / "results.json").read_text())
    for claim in results["claims"].values():
        assert claim["claim"] in text
    assert text.count("<figure ") == 1
    assert re.findall(r"url\((?!#)|@import|https?:|file:|\{\{|\bNone\b|\bnan\b", text) == []


def test_report_draws_the_page_again_the_same(folder: tuple[Path, str]) -> None:
    before = (folder[0] / "report.html").read_bytes()
    assert report.build_report(folder[0]).read_bytes() == before


def test_quick_is_one_seed_and_few_samples() -> None:
    quick = LowRankConfig().quick()
    assert quick.seeds == 1
    assert quick.sizes[-1] < LowRankConfig().sizes[-1]
