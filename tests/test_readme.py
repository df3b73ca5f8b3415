"""The README's examples run as shown."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import adaptive_tangents as at

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_of_the_readme_runs_and_shows_the_kernel_turning(capsys) -> None:
    _, code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 24
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    before, after = map(float, re.search(r"alignment (\S+) → (\S+)", printed).groups())
    assert after > before
    assert "stationarity" in printed


def test_the_calls_on_the_first_screen_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="saving draws the page, with the extra 'report'")
    monkeypatch.chdir(tmp_path)
    code, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 1)).double()
        x = torch.randn(16, 8, dtype=torch.float64)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    y = torch.sign(x[:, :1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    at.inspect(model, start, data=(x, y)).save("runs/lora")
    made = {"at": at, "model": model, "start": start, "x": x, "y": y}
    exec(compile(code, "README.md", "exec"), made)
    assert made["found"].headline
    assert made["both"].findings
    assert made["advice"].rank_pattern
    assert made["tracker"].record(0) is not None
    assert made["told"].params.keys() == start.keys()


@pytest.mark.parametrize("target", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_files_that_the_readme_points_to_exist(target) -> None:
    assert (ROOT / target).exists()


@pytest.mark.parametrize("command", re.findall(r"^\$ make (\w+)", README, re.MULTILINE))
def test_make_targets_of_the_readme_exist(command) -> None:
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_ci_runs_exactly_make_test() -> None:
    commands = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    assert commands[-1] in ("make test", "exec make test")
