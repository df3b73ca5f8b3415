"""The overview of all experiments: one complete table of claims, in the report and in the docs."""

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from adaptive_tangents.commands.report import PAGES
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.claims import claim
from adaptive_tangents.experiments.registry import STUDIES
from adaptive_tangents.reporting.report import build_report
from adaptive_tangents.runs.results import write_results
from adaptive_tangents.runs.summary import KEPT, collect, summary

ROOT = Path(__file__).parents[2]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_results", ROOT / "docs" / "make_results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_results = _load()


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


def test_docs_keep_no_folder_of_a_machine_and_show_every_claim(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_results, "KEPT", tmp_path / "results")
    monkeypatch.setattr(make_results, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(make_results, "ROOT", tmp_path)
    shutil.copytree(runs / "penalties", runs / "penalties-again")
    assert make_results.main([str(runs)]) == 0
    assert (tmp_path / "results" / "penalties-again.json").is_file()
    (tmp_path / "results" / "penalties-again.json").unlink()
    assert make_results.main([]) == 0
    kept = json.loads((tmp_path / "results" / "penalties.json").read_text("utf-8"))
    assert kept["command"] == "adaptive-tangents reproduce penalties --data mnist --data-dir DIR"
    page = (tmp_path / "results.md").read_text("utf-8")
    assert page.count(" is good |") == page.count(" is best |") == 2
    assert "| 1 \\| 2 | holds |" in page
    # A claim shows those of other experiments that are to be read beside it, where they were kept.
    beside = "Beside it, what the coefficients foretell (penalties): penalties is good: 1 \\| 2 |"
    assert page.count(f"| **holds in part**: not always. {beside}") == 2
    assert page.count("Beside it") == 2
    assert "| 1.5 | cpu | 2 | 2 | 2.6.0 |" in page
    assert make_results.main(["--check"]) == 0
    (tmp_path / "results" / "penalties.json").unlink()
    assert make_results.main(["--check"]) == 1
    (tmp_path / "results.md").unlink()
    assert make_results.main(["--check"]) == 1


def test_the_page_in_docs_is_what_the_kept_results_say_and_lacks_no_experiment() -> None:
    assert make_results.main(["--check"]) == 0
    kept = [path.stem for path in make_results.KEPT.glob("*.json")]
    assert {next(name for name in STUDIES if stem.startswith(name)) for stem in kept} == set(STUDIES) <= set(kept)
