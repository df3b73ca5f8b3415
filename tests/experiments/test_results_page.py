"""The page of results: rows whose figures are those of the results, every claim, and words that a turned verdict stops."""

import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

from adaptive_tangents.experiments.claims import claim
from adaptive_tangents.experiments.registry import STUDIES
from adaptive_tangents.runs.results import write_results
from docs_scripts import ROOT, script

make_results = script("make_results")
PAGE = (ROOT / "docs" / "results.md").read_text("utf-8")
ROWS = tomllib.loads((ROOT / "docs" / "results" / "headline.toml").read_text("utf-8"))["row"]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that stands for the project's."""
    monkeypatch.setattr(make_results, "KEPT", tmp_path / "results")
    monkeypatch.setattr(make_results, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(make_results, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def kept(elsewhere: Path) -> Path:
    """A copy of the kept results."""
    return Path(shutil.copytree(ROOT / "docs" / "results", elsewhere / "results"))


def _run(name: str, root: Path) -> None:
    """A run whose claims are not in the order of the alphabet."""
    good = claim(f"{name} is good", True, refuted_by="it is bad", evidence="1 | 2")
    bad = claim(
        f"{name} is best", "holds in part", refuted_by="a better one", evidence="3", published="4", why="not always",
        beside=("penalties.good", "penalties.other", "elsewhere.good"),
    )  # fmt: skip
    command = f"adaptive-tangents reproduce {name} --data mnist --data-dir /some/where --out /else/where --resume"
    results: dict[str, Any] = {
        "experiment": name, "command": command, "config": {"seed": 0}, "versions": {"torch": "2.6.0"}, "device": "cpu",
        "threads": 2, "cores": 2, "wall_seconds": {"total": 90.0, "a stage": 80.0}, "claims": {"good": good, "bad": bad},
    }  # fmt: skip
    write_results(results, {}, root / name)


def _changed(file: Path, old: str, new: str) -> None:
    text = file.read_text("utf-8")
    assert old in text
    file.write_text(text.replace(old, new), "utf-8")


def test_the_page_keeps_no_folder_of_a_machine_and_shows_every_claim(elsewhere: Path) -> None:
    runs = elsewhere / "runs"
    for name in ("penalties", "kernel-alignment"):
        _run(name, runs)
    shutil.copytree(runs / "penalties", runs / "penalties-again")
    assert make_results.main([str(runs)]) == 0
    saved = json.loads((elsewhere / "results" / "penalties.json").read_text("utf-8"))
    assert saved["command"] == "adaptive-tangents reproduce penalties --data mnist --data-dir DIR"
    assert list(saved["claims"]) == ["good", "bad"]
    page = (elsewhere / "results.md").read_text("utf-8")
    assert re.findall(r"^## (.*)", page, re.MULTILINE) == [
        "How to reproduce", "kernel-alignment", "penalties", "penalties (again)",
    ]  # fmt: skip
    assert "Of 6 claims 3 hold and 3 hold in part." in page
    assert page.count("| 1. penalties is good<br>*1 \\| 2* | holds |") == 2
    assert "| 2. kernel-alignment is best<br>*3*<br>Not always. | **holds in part** |" in page
    assert (
        page.count("- What would refute it: a better one.\n    - Published: 4.\n    - Measured: 3.\n    - Why: not")
        == 3
    )
    # A claim shows those of other experiments that are to be read beside it, where they were kept.
    assert page.count("what the coefficients foretell ([penalties](#penalties)): penalties is good: 1 | 2.") == 3
    assert "| kernel-alignment | 1.5 | cpu | 2 | 2 | 2.6.0 |" in page
    assert make_results.main(["--check"]) == 0
    (elsewhere / "results" / "penalties.json").unlink()
    assert make_results.main(["--check"]) == 1
    (elsewhere / "results.md").unlink()
    assert make_results.main(["--check"]) == 1


def test_the_page_in_docs_is_what_the_kept_results_say_and_lacks_no_experiment() -> None:
    assert make_results.main(["--check"]) == 0
    kept = [path.stem for path in make_results.KEPT.glob("*.json")]
    assert {next(name for name in STUDIES if stem.startswith(name)) for stem in kept} == set(STUDIES) <= set(kept)
    for name in STUDIES:
        assert f"\nadaptive-tangents reproduce {name}" in PAGE
    assert set(tomllib.loads((make_results.KEPT / "headline.toml").read_text("utf-8"))["titles"]) == set(STUDIES)


def test_ten_rows_come_first_and_the_verdict_of_each_is_that_of_the_claims_it_rests_on() -> None:
    assert len(ROWS) == 10
    assert next(line for line in PAGE.splitlines() if line.startswith("## ")) == "## What to believe, and what not"
    for row in ROWS:
        verdicts = list(row["rests_on"].values())  # the first is that of the claim nearest to the statement
        if row["verdict"] == "believe":
            assert verdicts[0] == "holds", row["says"]
        elif row["verdict"] == "believe with care":
            assert {"holds"} < set(verdicts), row["says"]
        else:
            assert row["verdict"] == "do not believe"
            assert verdicts[0] == "does not hold", row["says"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["says"])
def test_no_figure_of_a_row_is_typed_by_hand(row: dict[str, Any]) -> None:
    by_hand = re.sub(r"\{[^}]*\}|`[^`]*`|CIFAR-10|at rank [12]", "", row["measured"] + row["stops"])
    assert re.findall(r"\d", by_hand) == []


def test_figures_of_rows_follow_the_results(kept: Path) -> None:
    _changed(kept / "kernel-alignment.json", "0.04 ± 0.00 → 0.37 ± 0.01", "0.05 ± 0.00 → 0.39 ± 0.02")
    assert make_results.main([]) == 0
    assert "0.05 → 0.39 for its sign" in (kept.parent / "results.md").read_text("utf-8")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["says"])
def test_a_turned_verdict_stops_the_page_until_the_row_is_read_again(
    row: dict[str, Any], kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, verdict in row["rests_on"].items():
        study, _, key = name.partition(".")
        file = kept / f"{study}.json"
        before = file.read_text("utf-8")
        results = json.loads(before)
        results["claims"][key]["verdict"] = "holds" if verdict != "holds" else "does not hold"
        file.write_text(json.dumps(results), "utf-8")
        assert make_results.main(["--check"]) == 1
        assert re.search(f"headline.toml: .* was written when {re.escape(name)} had .*; now", capsys.readouterr().err)
        file.write_text(before, "utf-8")
    assert not (kept.parent / "results.md").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"turns"', '"turned"', "there is no claim kernel-alignment.turns; read the row again"),
        ("0.04 ± 0.00 → 0.37 ± 0.01", "no change", "kernel-alignment.turns reads .* finds nothing; read the row again"),
    ],
    ids=["no such claim", "other words"],
)
def test_a_row_without_its_figure_is_told(
    old: str, new: str, message: str, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _changed(kept / "kernel-alignment.json", old, new)
    assert make_results.main([]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_cells_are_short_and_nothing_of_a_claim_is_lost() -> None:
    runs, _ = make_results.load()
    cells = [line for line in PAGE.splitlines() if re.match(r"\| \d+\. ", line)][10:]
    claims = [claim for run in runs.values() for claim in run["claims"].values()]
    assert len(cells) == len(claims)
    for cell, each in zip(cells, claims, strict=True):
        assert len(cell) < 480
        assert each["claim"].replace("|", "\\|") in cell
        assert f"**{each['claim']}**: {each['verdict']}.\n    - What would refute it: {each['refuted_by']}." in PAGE
        for part in (each["published"], each["evidence"], each["why"]):
            assert f": {part}." in PAGE or not part


def test_a_figure_is_never_that_of_a_network_which_the_pattern_does_not_name() -> None:
    text = "cnn: K_0 0.1, K_T 0.2; transformer: K_0 0.3, K_T 0.4; encoder: K_0 0.5, K_T 0.6"
    runs = {"study": {"config": {}, "claims": {"key": {"evidence": text}}}}

    def found(pattern: str) -> dict[str, str]:
        return make_results.found(runs, "study.key", pattern)

    assert found(r"cnn: .*K_T (?P<a>[^;]+)") == {"a": "0.2"}
    assert found(r"cnn: .*?K_T (?P<a>[^;]+);.*encoder: .*?K_T (?P<b>\S+)$") == {"a": "0.2", "b": "0.6"}
    with pytest.raises(make_results.Turned, match="finds nothing; read the row again"):
        found(r"transformer: K_0 (?P<a>\S+), .*?K_T (?P<b>\S+)$")


def test_links_within_the_page_lead_to_headings_and_folded_parts_render() -> None:
    headings = {make_results.anchor(title) for title in re.findall(r"^#+ (.*)", PAGE, re.MULTILINE)}
    assert set(re.findall(r"\(#([^)]*)\)", PAGE)) <= headings
    markdown = pytest.importorskip("markdown", reason="comes with the extra docs")
    html = markdown.markdown(PAGE, extensions=["tables", "md_in_html", "toc", "fenced_code"])
    assert set(re.findall(r'<h2 id="([^"]*)"', html)) <= headings
    assert html.count("<details>") == PAGE.count("<details") == len(STUDIES) + 2
    assert html.count("<td>holds</td>") == PAGE.count(" | holds |")
    assert re.findall(r"<p>\||\*\*", html) == []
