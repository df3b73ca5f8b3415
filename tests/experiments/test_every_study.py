"""The promises of every study in the registry: parts, resuming, its page and the command."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from adaptive_tangents import cli, experiments
from adaptive_tangents.experiments import STUDIES, Asked
from adaptive_tangents.runs.record import settings
from adaptive_tangents.runs.units import StoredUnits
from study_cases import SMALL, Remembered, assert_same, each, in_outline, made_up_data, of_few_pixels, small_run

ROOT = Path(experiments.__file__).parent
FOLDERS = sorted(path.parent for path in ROOT.glob("*/__init__.py"))
LIGHT = [*(ROOT / f"{name}.py" for name in ("__init__", "registry", "study")), *(f / "__init__.py" for f in FOLDERS)]
# These run without parts: penalties takes a second, and exact-solvers times its solvers.
WHOLE = ("penalties", "exact-solvers")
IN_PARTS = [name for name in STUDIES if name not in WHOLE]
# These, the cheapest, are interrupted halfway. The others go on from the parts that theirs had after three quarters.
INTERRUPTED = ("hard-targets", "kernel-spectra", "weight-spectra")
# Pages of these, quick to draw, have all pixels and are drawn twice. Drawing works the same for every study.
DRAWN_TWICE = ("penalties", "low-rank-targets")


def test_every_folder_enrols_its_studies_in_the_order_of_their_places() -> None:
    assert SMALL.keys() == STUDIES.keys()
    found = [f"{study.package}" for study in STUDIES.values()]
    assert {name.rpartition(".")[2] for name in found} == {folder.name for folder in FOLDERS}
    assert [study.place for study in STUDIES.values()] == list(range(1, len(STUDIES) + 1))
    for name, study in STUDIES.items():
        assert study.name == name
        assert study.about
        assert study.minutes >= 0


@pytest.mark.parametrize("file", LIGHT, ids=lambda file: f"{file.parent.name}.{file.stem}")
def test_names_are_known_without_importing_anything_heavy(file: Path) -> None:
    light = {"adaptive_tangents.experiments.study", "adaptive_tangents.experiments.registry"}
    tree = ast.parse(file.read_text("utf-8"))
    for node in tree.body:
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
        assert all(name in light or name.partition(".")[0] in sys.stdlib_module_names for name in names), names


@pytest.mark.parametrize("name", STUDIES)
def test_sizes_are_settings_and_data_and_seed_are_those_asked_for(name: str) -> None:
    study = STUDIES[name]
    quick, standard, full = (settings(study.configured(Asked(size=size))) for size in ("quick", "standard", "full"))
    asked = settings(study.configured(Asked(seed=3)))
    if name == "penalties":
        assert quick == standard == full == asked
    else:
        assert quick != standard
        assert (standard["seed"], asked["seed"]) == (0, 3)
        assert asked | {"seed": 0} == standard


@pytest.mark.parametrize("name", each(STUDIES))
def test_progress_never_goes_back_and_ends_at_the_end(name: str) -> None:
    fractions = small_run(name).fractions
    assert fractions == sorted(fractions)
    assert name == "penalties" or 0.9 < fractions[-1] <= 1.0 + 1e-9


@pytest.mark.parametrize("name", each(IN_PARTS))
def test_a_run_interrupted_after_any_part_goes_on_to_the_same_numbers_and_makes_none_again(name: str) -> None:
    whole = small_run(name)
    made = list(whole.parts)
    with made_up_data():
        if name in INTERRUPTED:
            cut = Remembered(left=len(made) // 2)
            with pytest.raises(KeyboardInterrupt):
                STUDIES[name].run(SMALL[name], units=cut)
            assert list(cut.parts) == made[: len(made) // 2]
        else:
            cut = Remembered({part: whole.parts[part] for part in made[: len(made) * 3 // 4]})
        last = list(cut.parts)[-1]
        rest = Remembered(cut.parts)
        again = STUDIES[name].run(SMALL[name], units=rest)
    assert rest.parts.keys() == whole.parts.keys()
    # A training that was interrupted between its checkpoints makes all of them again.
    assert all(part.rpartition(".")[0] == last.rpartition(".")[0] for part in set(rest.made) & set(cut.parts))
    assert_same(again, whole.result)


@pytest.mark.parametrize("name", each(IN_PARTS))
def test_a_finished_run_is_read_from_its_checkpoints(name: str, tmp_path: Path, monkeypatch) -> None:
    whole, config = small_run(name), settings(SMALL[name])
    stored = StoredUnits(tmp_path, config)
    for part, tensors in whole.parts.items():
        stored.put(part, tensors)
    monkeypatch.setattr(torch.optim.Optimizer, "__init__", lambda *_: pytest.fail("trained again"))
    units = StoredUnits(tmp_path, config, resume=True)
    monkeypatch.setattr(units, "put", lambda *_: pytest.fail("a part was made again"))
    with made_up_data():
        again = STUDIES[name].run(SMALL[name], units=units)
    # The last digits of sums depend on memory layout, and feature-change computes with the tensors it reads back.
    assert_same(again, whole.result, rel=1e-12 if name == "feature-change" else 0.0)


@pytest.mark.parametrize("name", each(WHOLE))
def test_the_others_keep_no_parts(name: str) -> None:
    assert not small_run(name).parts


@pytest.fixture(scope="module", params=each(STUDIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """The folder that the command makes for a small run, and its output."""
    name, out = request.param, tmp_path_factory.mktemp(request.param)
    run = small_run(name)
    drawn = of_few_pixels() if name in DRAWN_TWICE else in_outline()
    with drawn, pytest.MonkeyPatch.context() as patch:
        module = f"{STUDIES[name].package}.{STUDIES[name].measured_in}"
        patch.setattr(f"{module}.configured", lambda asked: SMALL[name])
        patch.setattr(f"{module}.run", lambda *_, **__: run.result)
        done = CliRunner().invoke(cli.app, ["reproduce", name, "--out", str(out)])
    assert done.exit_code == 0, done.output
    return name, out, done.output


def test_the_command_prints_every_claim_and_writes_results_and_figures(folder: tuple[str, Path, str]) -> None:
    name, out, printed = folder
    results = json.loads((out / "results.json").read_text("utf-8"))
    assert len(re.findall(r"^[✓~✗] ", printed, re.MULTILINE)) == len(results["claims"]) > 0
    assert f"Report: {(out / 'report.html').resolve()}" in printed
    page = STUDIES[name].page()
    drawn = [figure for figure in page.figures if page.applies(results, figure)]
    assert {path.name for path in (out / "figures").iterdir()} == {
        f"{f}.{kind}" for f in drawn for kind in ("png", "svg")
    }


def test_the_page_shows_every_claim_and_figure_and_loads_nothing(folder: tuple[str, Path, str]) -> None:
    name, out, _ = folder
    text = (out / "report.html").read_text("utf-8")
    results = json.loads((out / "results.json").read_text("utf-8"))
    plain = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", text)).replace("&lt;", "<").replace("&gt;", ">")
    for claim in results["claims"].values():
        assert re.sub(r"_|̄", "", claim["claim"]).replace("₀", "0") in plain.replace("̄", ""), claim["claim"]
    assert text.count("<figure ") == len(list((out / "figures").glob("*.svg")))
    if name in ("kernel-alignment", "penalties", "exact-solvers"):
        assert text.count("Look for") == text.count("<figure ")
    words = re.sub(r"<(style|svg|pre)\b.*?</\1>|<[^>]*>", "", text, flags=re.DOTALL)
    assert re.findall(r"\b\w_\w\b|\w̄|\{\{|\bNone\b|\bnan\b", words) == []
    assert re.findall(r"url\((?!#)|@import|https?:|file:|\{\{|\bNone\b|\bnan\b", text) == []


@pytest.mark.parametrize("folder", each(DRAWN_TWICE), indirect=True)
def test_report_draws_the_page_again_the_same(folder: tuple[str, Path, str]) -> None:
    _, out, _ = folder
    before = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    with of_few_pixels():
        done = CliRunner().invoke(cli.app, ["report", str(out)])
    assert done.exit_code == 0, done.output
    assert (out / "report.html").read_bytes() == before
