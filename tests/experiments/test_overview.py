"""The overview of all experiments: one complete table of claims, in the report and in the docs."""

import re
from pathlib import Path
from typing import Any

import pytest

from adaptive_tangents.commands.report import PAGES
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.claims import claim
from adaptive_tangents.experiments.registry import STUDIES
from adaptive_tangents.reporting.report import build_report
from adaptive_tangents.runs.results import write_results
from adaptive_tangents.runs.summary import KEPT, collect, summary


def _results(name: str) -> dict[str, Any]:
    good = claim(f"{name} is good", True, refuted_by="it is bad", evidence="1 | 2")
    bad = claim(
        f"{name} is best", "holds in part", refuted_by="a better one", evidence="3", published="4", why="not always",
        beside=("penalties.good", "penalties.other", "elsewhere.good"),
    )  # fmt: skip
    return {
        "experiment": name,
        "command": f"adaptive-tangents reproduce {name} --data mnist --data-dir /some/where --out /else/where --resume",
        "config": {"seed": 0},
        "versions": {"torch": "2.6.0"},
        "device": "cpu",
        "threads": 2,
        "cores": 2,
        "wall_seconds": {"total": 90.0, "a stage": 80.0},
        "claims": {"good": good, "bad": bad},
        "targets": {"left": "out"},
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for name in ("kernel-alignment", "penalties"):
        write_results(_results(name), {}, root / name)
    return root


def test_the_page_of_all_has_every_claim_of_every_experiment_and_counts_verdicts(runs: Path) -> None:
    folder = collect(runs, STUDIES, command="adaptive-tangents reproduce all")
    page = build_report(folder, PAGES).read_text("utf-8")
    for name in ("kernel-alignment", "penalties"):
        for kept in _results(name)["claims"].values():
            assert kept["claim"] in page
        assert f'href="{name}/report.html"' in page
    assert "Of 4 claims 2 hold, 2 hold in part and 0 do not hold." in page
    assert "holds in part</span>: not always. <i>K</i>" in page
    assert "is measured by penalties, elsewhere." in page
    assert re.findall(r"url\((?!#)|@import|https?:|file:|\{\{|\bNone\b|\bnan\b", page) == []


def test_a_summary_keeps_claims_settings_machine_and_total_seconds_only(runs: Path) -> None:
    kept = summary(_results("penalties"))
    assert set(kept) == set(KEPT)
    assert kept["wall_seconds"] == {"total": 90.0}
    with pytest.raises(TangentError, match="overview: results lack cores, claims; run the experiment again"):
        summary({key: value for key, value in _results("x").items() if key not in ("cores", "claims")})


def test_a_folder_without_experiments_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TangentError, match=r"overview: no experiment's folder in .*reproduce all first"):
        collect(tmp_path, STUDIES, command="")
