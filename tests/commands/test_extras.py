"""The command line without the extra `report`, and shell completion."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Several commands, one after another: most of a process's time is importing torch.
WITHOUT = """
import sys
for name in ("jinja2", "markupsafe", "matplotlib", "mlxtend", "sklearn", "threadpoolctl"):
    sys.modules[name] = None
from adaptive_tangents.cli import app
for line in sys.stdin.read().splitlines():
    try:
        app(line.split())
    except SystemExit as ended:
        print(f"ended: {ended.code}", file=sys.stderr)
"""
FACTORY = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
"""
REFUSED = (
    "report .", "reproduce penalties --quick", "inspect --model a:b --data d.npz --start a.pt --end b.pt", "compare a b",
)  # fmt: skip


def without_the_extra(folder: Path, *commands: str) -> tuple[str, list[str]]:
    """What commands print without the extra, and for each its errors and the status it ended with."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], input="\n".join(commands), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, re.findall(r"(.*?^ended: .*?)\n", done.stderr, re.MULTILINE | re.DOTALL)


def test_a_command_that_needs_the_extra_says_which_and_a_kernel_needs_nothing_of_it(tmp_path: Path) -> None:
    import numpy as np

    (tmp_path / "factory.py").write_text(FACTORY)
    np.savez(tmp_path / "data.npz", x=np.zeros((9, 6), np.float32))
    before = sorted(tmp_path.iterdir())
    kernel = "kernel --model factory.py:make --data data.npz --out K.zarr"
    printed, ends = without_the_extra(tmp_path, *REFUSED, kernel)
    for command, end in zip(REFUSED, ends, strict=False):
        assert end.startswith(f"error {command.split()[0]}: "), end
        assert "is not installed; pip install 'adaptive-tangents[report]' installs what reports and experiments" in end
        assert end.endswith("ended: 1"), end
    assert ends[len(REFUSED) :] == ["ended: 0"]
    assert "Kernel:" in printed
    left = {path.name for path in tmp_path.iterdir()} - {path.name for path in before}
    assert left <= {"K.zarr", "__pycache__"}, "refused commands write nothing"


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
