"""The examples in docs run, and the lists in docs are complete."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

import adaptive_tangents as at

DOCS = Path(__file__).parent.parent / "docs"
BENCHMARKS = DOCS.parent / "benchmarks"
STRUCTURES = (DOCS / "structures.md").read_text()
ABSTRACT = {"Structure", "BlockStructure"}


def test_the_structure_made_in_the_docs_is_fitted_and_certified(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", STRUCTURES, re.DOTALL)
    assert len(blocks) == 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile("\n".join(blocks), "docs/structures.md", "exec"), {"__name__": "docs"})
    assert re.search(r"tensor\(\[\d", capsys.readouterr().out)


def test_the_page_on_stored_kernels_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "stored_kernels.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile("\n".join(blocks), "docs/stored_kernels.md", "exec"), {"__name__": "docs"})
    assert "dense" in capsys.readouterr().out


def test_the_recipes_for_many_outputs_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS / "scaling.md").read_text()
    section = page[page.index("## Many outputs") : page.index("## A GPT-2")]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    made: dict[str, torch.Tensor] = {"__name__": "docs"}  # type: ignore[dict-item]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile("\n".join(blocks), "docs/scaling.md", "exec"), made)
    off, said = map(float, capsys.readouterr().out.split())
    assert 0 < off < 3 * said
    assert made["of_a_logit"].shape == made["of_the_loss"].shape == made["K"].shape == (8, 8)


def test_the_page_on_forecasts_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "forecast.md").read_text(), re.DOTALL)
    with torch.random.fork_rng(devices=[]):
        exec(compile(block, "docs/forecast.md", "exec"), {"__name__": "docs"})
    assert "Foretold: training on squared error takes the loss" in capsys.readouterr().out


def test_the_page_on_checkpoints_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "checkpoints.md").read_text(), re.DOTALL)
    made: dict[str, torch.Tensor] = {"__name__": "docs"}  # type: ignore[dict-item]
    with torch.random.fork_rng(devices=[]):
        exec(compile(block, "docs/checkpoints.md", "exec"), made)
    assert made["K"].shape == (5, 1, 5, 1)


def test_the_page_on_watching_training_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "tracking.md").read_text(), re.DOTALL)
    with torch.random.fork_rng(devices=[]):
        exec(compile(block, "docs/tracking.md", "exec"), {"__name__": "docs"})
    assert "of 500 samples in evaluation mode, exact, summed over all 3 outputs" in capsys.readouterr().out


def test_the_page_on_data_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "data.md").read_text(), re.DOTALL)
    with torch.random.fork_rng(devices=[]):
        exec(compile(block, "docs/data.md", "exec"), {"__name__": "docs"})
    assert capsys.readouterr().out.startswith("[1, 0, 0, 1, 0, 1] ('cat', 'dog')\n")


def test_the_page_on_estimators_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is in the extra 'report'")
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "estimators.md").read_text(), re.DOTALL)
    exec(compile(block, "docs/estimators.md", "exec"), {"__name__": "docs"})
    assert "converged, " in capsys.readouterr().out


def test_the_page_on_adapters_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "lora.md").read_text(), re.DOTALL)
    made: dict[str, object] = {"__name__": "docs"}
    with torch.random.fork_rng(devices=[]):
        exec(compile(block, "docs/lora.md", "exec"), made)
    printed = capsys.readouterr().out
    assert "LoRA adapters of rank" in printed
    assert '"rank_pattern": {' in printed


def test_every_structure_is_in_the_table() -> None:
    public = {name for name in at.__all__ if isinstance(getattr(at, name), type)}
    structures = {name for name in public if issubclass(getattr(at, name), at.structures.Structure)} - ABSTRACT
    listed = set(re.findall(r"^\| `(\w+)\(", STRUCTURES, re.MULTILINE))
    assert listed == structures


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_files_that_a_page_points_to_exist(page: Path) -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_tables_of_benchmarks_go_where_the_page_names_their_scripts(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    tables = importlib.import_module("tables")
    page = (DOCS / "benchmarks.md").read_text()
    named = [found[1] for found in tables.REGION.finditer(page)]
    assert len(named) == len(set(named)) > 10
    assert all((BENCHMARKS / f"{name}.py").exists() for name in named)
    assert tables.filled(page, tmp_path) == page
    kept = {"title": "t", "date": "d", "machine": {"cores": 2, "torch": "2"}, "table": [["", "s", "note"], ["x", "1"]]}
    (tmp_path / "bench_sweep.json").write_text(json.dumps(kept))
    made = tables.filled(page, tmp_path)
    assert (
        "**t** (d; 2 cores, torch 2; `python benchmarks/bench_sweep.py`)\n\n| | s | note |\n|---|---|---|\n| x | 1 | |"
        in made
    )
    assert tables.filled(made, tmp_path) == made
    rest = re.compile("<!-- bench_sweep -->.*<!-- /bench_sweep -->", re.DOTALL)
    assert rest.sub("", made) == rest.sub("", page)


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("bench_*.py")), ids=lambda path: path.stem)
def test_benchmarks_need_no_module_of_the_tests_which_their_environment_cannot_import(script: Path) -> None:
    mine = {path.stem for path in Path(__file__).parent.rglob("*.py")} - {path.stem for path in BENCHMARKS.iterdir()}
    words = set(re.findall(r"""(?:^|\n)\s*(?:import|from) (\w+)|["'](\w+)["']""", script.read_text()))
    assert not {"pytest", "tests", *mine} & {word for pair in words for word in pair}


def test_every_guarantee_names_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (DOCS / "guarantees.md").read_text())
    assert len(named) > 30
    missing = [f"{path}::{name}" for path, name in named if f"def {name}(" not in (DOCS.parent / path).read_text()]
    assert not missing
