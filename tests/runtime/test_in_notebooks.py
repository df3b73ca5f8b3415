"""In a Jupyter kernel every figure shows once, and commands started from there leave no frames of a moving bar."""

import os
import subprocess
import sys
from io import StringIO
from typing import Any

import pytest

from adaptive_tangents.runtime.progress import redrawn

pytestmark = pytest.mark.xdist_group("in notebooks")  # one process starts the kernel

COMMAND = """
import time
from adaptive_tangents.commands.console import bars, console
with bars() as update:
    for k in range(40):
        update("study", "train" if k < 20 else "draw", k / 40)
        time.sleep(0.02)
console.print("[done]")
"""
BAR = """
import time
from adaptive_tangents.runtime.progress import shown
with shown(True) as told:
    for k in range(40):
        told("tiles", k / 40)
        time.sleep(0.02)
"""
OBJECTS = """
import torch, adaptive_tangents as at
feats = at.tangent_features(torch.nn.Linear(3, 1), torch.randn(9, 3))
tracker = at.Tracker(torch.nn.Linear(3, 1), torch.randn(9, 3), torch.randn(9, 1), budget=None, every=1)
record = tracker.record(0)
"""
FIGURES = {
    "without pyplot": "feats.plot()",
    "a tracker's": "tracker.plot()",
    "with pyplot": "import matplotlib.pyplot as plt\nfeats.plot()",
    "with pyplot inline": "%matplotlib inline\ntracker.plot()",
}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What cells put out in one fresh kernel, in their order."""
    for package in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(package)
    import nbformat
    from nbclient import NotebookClient

    script = tmp_path_factory.mktemp("command") / "command.py"
    script.write_text(COMMAND)
    sources = {"bar": BAR, "!command": f"!{sys.executable} {script}", "objects": OBJECTS, **FIGURES}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources.values()])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    return {name: cell.outputs for name, cell in zip(sources, notebook.cells, strict=True)}


def printed(outputs: list[Any]) -> str:
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_shown_as_one_picture(name: str, cells: dict[str, list[Any]]) -> None:
    assert [output["output_type"] for output in cells[name]] == ["execute_result"]
    assert {"image/png", "text/plain"} == set(cells[name][0]["data"])
    assert len(cells[name][0]["data"]["image/png"]) > 5000


def test_a_figure_without_pyplot_is_as_large_as_with_it(cells: dict[str, list[Any]]) -> None:
    first, second = (len(cells[name][0]["data"]["image/png"]) for name in ("without pyplot", "with pyplot"))
    assert abs(first / second - 1) < 0.05


def test_a_command_of_a_notebook_prints_a_line_a_stage(cells: dict[str, list[Any]]) -> None:
    assert printed(cells["!command"]).split() == ["0", "%", "study:", "train", "50", "%", "study:", "draw", "[done]"]


def test_a_bar_of_a_notebook_without_widgets_leaves_its_last_state(cells: dict[str, list[Any]]) -> None:
    assert printed(cells["bar"]).count("tiles") == 1
    assert "100 %" in printed(cells["bar"])


@pytest.mark.parametrize("script", [COMMAND, BAR], ids=["a command", "progress=True"])
def test_a_forced_color_makes_no_terminal_of_a_pipe(script: str) -> None:
    plain = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "CLICOLOR_FORCE", "TERM")}
    forced = {**plain, "FORCE_COLOR": "1", "CLICOLOR_FORCE": "1", "CLICOLOR": "1", "TERM": "xterm-color"}
    done = subprocess.run([sys.executable, "-c", script], env=forced, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) <= 3
    assert "\x1b[2K" not in done.stdout


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("file", "environment", "moves"),
    [
        (Terminal(), {"TERM": "xterm"}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (Terminal(), {"TERM": "xterm", "JPY_PARENT_PID": "1"}, False),
        (StringIO(), {"TERM": "xterm", "FORCE_COLOR": "1"}, False),
    ],
)
def test_a_bar_moves_on_a_terminal_only(
    file: StringIO, environment: dict[str, str], moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JPY_PARENT_PID", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert redrawn(file) is moves
