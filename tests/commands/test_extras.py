"""The command line without the extra `report`, and shell completion."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT = """
import sys
for name in ("jinja2", "markupsafe", "matplotlib", "mlxtend", "sklearn", "threadpoolctl"):
    sys.modules[name] = None
from adaptive_tangents.cli import app
app(sys.argv[1:])
"""
FACTORY = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
"""


def without_the_extra(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WITHOUT, *words], cwd=folder, capture_output=True, text=True)


def test_a_kernel_needs_nothing_that_the_extra_brings(tmp_path: Path) -> None:
    import numpy as np

    (tmp_path / "factory.py").write_text(FACTORY)
    np.savez(tmp_path / "data.npz", x=np.zeros((9, 6), np.float32))
    done = without_the_extra(tmp_path, "kernel", "--model", "factory.py:make", "--data", "data.npz", "--out", "K.zarr")
    assert done.returncode == 0, done.stderr
    assert "Kernel:" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("report", "."),
        ("reproduce", "penalties", "--quick"),
        ("inspect", "--model", "a:b", "--data", "d.npz", "--start", "a.pt", "--end", "b.pt"),
    ],
    ids=lambda words: words[0],
)
def test_a_command_that_needs_the_extra_says_which(words: tuple[str, ...], tmp_path: Path) -> None:
    done = without_the_extra(tmp_path, *words)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error {words[0]}: ")
    assert (
        "is not installed; pip install 'adaptive-tangents[report]' installs what reports and experiments need"
        in done.stderr
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("adaptive-tangents rep", ["reproduce", "report"]),
        ("adaptive-tangents reproduce kernel-", ["kernel-alignment", "kernel-spectra"]),
        ("adaptive-tangents kernel --outputs ", ["full", "trace", "diagonal"]),
    ],
)
def test_a_shell_completes_commands_studies_and_values(typed: str, offered: list[str]) -> None:
    place = len(typed.split()) - (not typed.endswith(" "))
    asked = {"_ADAPTIVE_TANGENTS_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(place)}
    script = "import sys; from adaptive_tangents.cli import app; app(prog_name='adaptive-tangents')"
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | asked, capture_output=True, text=True)
    assert done.stdout.split() == offered
