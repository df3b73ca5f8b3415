"""The README's examples run and print what it shows, and its figures are those of the pages that they come from."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import adaptive_tangents as at
from adaptive_tangents.runs.results import write_results
from hostile_models import CASES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
CALLS = "\n".join(re.findall(r"^\| [^|`]* \| `(\w+ = at\.[^`]*)` \|$", README, re.MULTILINE))
NUMBER = r"\d+(?:\.\d+)?(?:e-\d+)?"


def test_the_example_prints_what_the_readme_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 26
    assert max(map(len, EXAMPLE.splitlines())) <= 100
    (shown,) = re.findall(r"```python\n.*?```\n\n```\n(.*?)```", README, re.DOTALL)
    with torch.random.fork_rng(devices=[]):
        exec(compile(EXAMPLE, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert re.sub(NUMBER, "#", printed) == re.sub(NUMBER, "#", shown)
    for found, expected in zip(re.findall(NUMBER, printed), re.findall(NUMBER, shown), strict=True):
        if "e" in expected:
            assert float(found) <= 1e-5  # an error: as large as the example allows it
        else:
            assert abs(float(found) - float(expected)) <= (0.01 if "." in expected else 2)


def test_the_calls_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
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
    other = at.inspect(model, start, data=(x, y))
    write_results(other.results, other.arrays, "runs/lora")  # what save writes, without drawing the page
    assert len(CALLS.splitlines()) == 11
    made = {"at": at, "model": model, "start": start, "x": x, "y": y}
    exec(compile(CALLS, "README.md", "exec"), made)
    assert made["found"].headline
    assert made["both"].findings
    assert made["advice"].rank_pattern
    assert made["tracker"].record(0) is not None
    assert made["told"].params.keys() == start.keys()
    assert (tmp_path / "K.zarr").is_dir()
    torch.testing.assert_close(made["feats"].kernel(), made["K"])
    assert made["fit"].converged
    torch.testing.assert_close(made["linear"](x), model(x))


def test_figures_of_trust_are_those_of_the_tests_and_results() -> None:
    results = {
        path.stem: json.loads(path.read_text("utf-8"))["claims"] for path in (ROOT / "docs/results").glob("*.json")
    }
    verdicts = [claim["verdict"] for claims in results.values() for claim in claims.values()]
    whole, part, no = (verdicts.count(verdict) for verdict in ("holds", "holds in part", "does not hold"))
    assert f"of {len(verdicts)} claims {whole} hold, {part} in part, {no} do not |" in README
    assert README.count(f"{len(CASES)} models") == 2
    smooth, sign = re.findall(r"(−\S+) ± \S+ dB", results["kernel-alignment"]["path"]["evidence"])
    assert f"| off by {smooth} dB and {sign} dB, 0.2 % of the change |" in README
    (apart,) = re.findall(r"(\S+) apart, relative", results["exact-solvers"]["agree"]["evidence"])
    (above,) = re.findall(r"is (\S+) above a lower bound", results["exact-solvers"]["bound"]["evidence"])
    assert f"| {apart} apart; {above} above it |" in README


def _benchmark(label: str) -> dict[str, str]:
    """The first row of a benchmark, by the heads of its table."""
    lines = BENCHMARKS.splitlines()
    at_row = next(index for index, line in enumerate(lines) if line.startswith(f"| {label} |"))
    heads = next(index for index in range(at_row, 0, -1) if lines[index].startswith("|---")) - 1
    return dict(zip(*([cell.strip() for cell in lines[k].split("|")] for k in (heads, at_row)), strict=True))


@pytest.mark.parametrize(
    ("row", "contender", "name"),
    [
        ("MLP 784", "torch.func", "MLP"), ("MLP 784", "neural-tangents", "MLP"), ("MLP 784", "nngeometry", "MLP"),
        ("MLP 784", "curvlinops", "MLP"), ("CNN", "torch.func", "CNN"), ("CNN", "neural-tangents", "CNN"),
        ("CNN", "asdfghjkl", "CNN"), ("CNN", "nngeometry", "CNN"), ("ResNet-18", "torch.func", "ResNet-18"),
        ("ResNet-18", "asdfghjkl", "ResNet-18"), ("ViT", "torch.func", "ViT"), ("GPT-2-like", "torch.func", "GPT"),
    ],
)  # fmt: skip
def test_figures_of_speed_are_those_of_the_benchmarks(row: str, contender: str, name: str) -> None:
    (cells,) = re.findall(rf"^\| {re.escape(row)}[^|]*\|(.*)\|$", README, re.MULTILINE)
    full, memory, func, others = (cell.strip() for cell in cells.split("|"))
    fastest = {"neural-tangents": "neural-tangents, structured"}.get(contender, contender)
    ours, theirs = (_benchmark(f"{name}: {of}") for of in ("adaptive-tangents", fastest))
    assert float(full.removesuffix(" %")) == pytest.approx(100 / float(ours["× products"]), abs=0.6)
    assert float(memory.removesuffix(" GB")) == pytest.approx(float(ours["peak GB"]), rel=0.03)
    if contender == "torch.func":
        assert re.fullmatch(rf"{NUMBER} ×, {NUMBER} GB", func)
        shown, held = map(float, re.findall(NUMBER, func))
        assert held == pytest.approx(float(theirs["peak GB"]), rel=0.02)
    else:
        shown = float(re.findall(rf"{contender} ({NUMBER}) ×", others)[0])
    assert shown == pytest.approx(float(theirs["× ours"]), rel=0.05)


@pytest.mark.parametrize("target", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_files_that_the_readme_points_to_exist(target: str) -> None:
    assert (ROOT / target).exists()


def test_the_readme_has_what_every_renderer_shows() -> None:
    assert re.findall(r"https?:|<[a-z]+", re.sub(r"`[^`]*`", "", README)) == []
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("command", re.findall(r"^\$ make (\w+)", README, re.MULTILINE))
def test_make_targets_of_the_readme_exist(command: str) -> None:
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


def test_ci_runs_exactly_make_test() -> None:
    commands = [line.strip() for line in (ROOT / ".ci" / "run").read_text("utf-8").splitlines()]
    assert commands[-1] in ("make test", "exec make test")
