"""The README's examples run as shown."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_of_the_readme_runs_and_shows_the_kernel_turning(capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 24
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    before, after = map(float, re.search(r"alignment (\S+) → (\S+)", printed).groups())
    assert after > before
    assert "stationarity" in printed


@pytest.mark.parametrize("target", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_files_that_the_readme_points_to_exist(target) -> None:
    assert (ROOT / target).exists()


@pytest.mark.parametrize("command", re.findall(r"^\$ make (\w+)", README, re.MULTILINE))
def test_make_targets_of_the_readme_exist(command) -> None:
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_ci_runs_exactly_make_test() -> None:
    commands = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    assert commands[-1] in ("make test", "exec make test")
