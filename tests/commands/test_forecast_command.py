"""`forecast` at the command line: foretold, beside what happened, refused in words, and interrupted."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import adaptive_tangents as at
from adaptive_tangents import cli
from adaptive_tangents.inspection import InspectConfig, foretold
from adaptive_tangents.inspection.foretold import beside, goal_of, run_forecast
from adaptive_tangents.loading import Data
from study_cases import plain_figures

runner = CliRunner()

NETWORK = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))
"""


def made() -> nn.Sequential:
    space: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        exec(NETWORK, space)
        network: nn.Sequential = space["network"]()
    return network.eval()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETWORK, "utf-8")
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 3)).astype("f4")
    np.savez(tmp_path / "data.npz", x=x, y=(x[:, 0] * x[:, 1] > 0).astype("i8"))
    np.savez(tmp_path / "unlabeled.npz", x=x)
    after = made().state_dict()
    torch.save(after, tmp_path / "start.pt")
    torch.save({k: v + 0.3 * v.roll(1) if v.is_floating_point() else v for k, v in after.items() if "running" not in k}
               | {k: v for k, v in after.items() if "running" in k}, tmp_path / "end.pt")  # fmt: skip
    return tmp_path


def test_the_command_foretells_and_shows_what_happened_beside_it(here: Path) -> None:
    with plain_figures("foretold"):
        done = runner.invoke(
            cli.app,
            [
                "forecast",
                "--model",
                "nets.py:network",
                "--data",
                "data.npz",
                "--end",
                "end.pt",
                "--steps",
                "2",
                "--out",
                "out",
            ],
        )
    assert done.exit_code == 0, done.output
    results = json.loads((here / "out" / "results.json").read_text("utf-8"))
    assert results["experiment"] == "foretold"
    assert results["adapters"].startswith("LoRA adapters of rank")
    assert json.loads((here / "out" / "lora.json").read_text("utf-8"))["rank_pattern"]
    assert results["forecast"]["loss"] == "cross-entropy"
    assert len(results["forecast"]["steps"]) <= 2
    happened = results["happened"]
    assert sum(foretold for foretold, _ in happened["shares"].values()) == pytest.approx(1)
    assert sum(true for _, true in happened["shares"].values()) == pytest.approx(1)
    with np.load(here / "out" / "arrays.npz") as arrays:
        kernels = [torch.from_numpy(arrays[f"{prefix}kernel.average"]).double() for prefix in ("", "happened.")]
    assert happened["cka"]["average"] == pytest.approx(at.cka(*kernels))
    page = (here / "out" / "report.html").read_text("utf-8")
    assert "What training will do to Sequential" in page
    assert "Nothing was trained" in page
    (structure,) = re.findall(r"\(structure (.*), chosen by held-out samples", page)
    assert not re.search(r"\d\.\d{5}", structure), "no more digits than a reader wants"
    assert "What training did" not in page
    assert "Beside what happened" in re.sub(r"<[^>]+>", "", page)
    told = re.sub(r"\s+", " ", done.output)
    assert "Foretold: training takes the loss from " in told
    assert "• Will change most: " in told
    assert len(re.findall("• ", told)) <= 5
    assert "Foretold: " in re.findall(r'id="answer">([^<]*)<', page)[0]
    assert "Beside what happened: the foretold K̄ has CKA" in told
    assert f"More on the page: {here / 'out' / 'report.html'}" in told
    with plain_figures("foretold"):
        assert runner.invoke(cli.app, ["report", "out"]).exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "unlabeled.npz"], "forecast: the data file has no y, so it is not known what training will learn"),
        (["--data", "absent.npz"], "forecast: there is no data file absent.npz"),
        (["--loss", "hinge"], "forecast: --loss is one of auto, squared, cross-entropy, got 'hinge'"),
        (["--samples", "2"], "forecast: --samples must be at least 4, got 2"),
        (["--steps", "0"], "forecast: steps is a positive whole number, got 0"),
        (["--weights", "end.pt", "--end", "end.pt"], "forecast: --weights and --end are the same file, end.pt"),
        (["--model", "nets.py:absent"], "forecast: nets.py has no 'absent'"),
        (["--end", "data.npz"], "forecast: data.npz cannot be read"),
        (["--wrt", "absent"], "forecast: wrt 'absent' matches no parameter"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_words(options: list[str], message: str, here: Path) -> None:
    given = {"--model": "nets.py:network", "--data": "data.npz", "--out": "out"}
    given |= dict(zip(options[::2], options[1::2], strict=True))
    done = runner.invoke(cli.app, ["forecast", *(part for pair in given.items() for part in pair)])
    assert done.exit_code == 1
    assert message in re.sub(r"\s+", " ", done.output)
    assert not (here / "out" / "results.json").exists()


def test_an_interrupted_forecast_writes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(foretold, "run", interrupted)
    done = runner.invoke(
        cli.app, ["forecast", "--model", "nets.py:network", "--data", "data.npz", "--steps", "2", "--out", "out"]
    )
    assert done.exit_code == 130
    assert "interrupted; nothing was written" in done.output
    assert not (here / "out").exists()


def test_what_is_not_the_librarys_is_not_replaced(here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "results.json").write_text("mine", "utf-8")
    done = runner.invoke(cli.app, ["forecast", "--model", "nets.py:network", "--data", "data.npz", "--out", "out"])
    assert done.exit_code == 1
    assert "was not written by adaptive-tangents" in re.sub(r"\s+", " ", done.output)
    assert (here / "out" / "results.json").read_text("utf-8") == "mine"


def test_a_forecast_beside_itself_agrees_in_everything() -> None:
    network = made()
    start = {k: v.clone() for k, v in network.state_dict().items()}
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    data = Data(x, (x[:, 0] > 0).long())
    config = InspectConfig(samples=12, fit_operations=1.0)
    found = run_forecast(network, start, data, config, steps=1)
    assert all(torch.equal(network.state_dict()[k], v) for k, v in start.items())
    same = beside(found, found)
    assert same["cka"]["average"] == pytest.approx(1)
    assert same["share_order"] == pytest.approx(1)
    assert same["sample_order"] == pytest.approx(1)
    assert all(foretold == true for foretold, true in same["shares"].values())


def test_the_loss_is_that_of_the_targets_unless_another_is_asked_for() -> None:
    outputs, labels, amounts = torch.zeros(1, 3), torch.tensor([0, 2, 1]), torch.randn(3, 3)
    x = torch.zeros(3, 1)
    assert goal_of(outputs, Data(x, labels), "auto")[1] == "cross-entropy"
    assert goal_of(outputs, Data(x, amounts), "auto") == (amounts, "squared")
    y, loss = goal_of(outputs, Data(x, labels), "squared")
    assert loss == "squared"
    assert torch.equal(y, nn.functional.one_hot(labels, 3).float())
    y, _ = goal_of(torch.zeros(1, 1), Data(x, torch.tensor([0, 1, 1])), "squared")
    assert torch.equal(y, torch.tensor([[-1.0], [1.0], [1.0]]))


def test_the_command_tells_what_it_will_take_before_it_starts_and_the_time_left(here: Path) -> None:
    given = ["--model", "nets.py:network", "--data", "data.npz", "--max-epochs", "9", "--end", "end.pt", "--out", "out"]
    with plain_figures("foretold"):
        done = runner.invoke(cli.app, ["forecast", *given, "--loss", "squared", "--quick"])
    assert done.exit_code == 0, done.output
    plan, _, rest = done.output.partition("  0 % ")
    assert "Forecast: 32 samples to fit, 8 held out, 2 outputs, 50 parameters" in plan
    assert "  then     it, and what happened, is measured on 32 samples, as inspect does: about " in plan
    assert "  in all   " in plan
    assert re.search(r"two-sided, strength 1, step 1, about \d+ \S+ left", rest)
    results = json.loads((here / "out" / "results.json").read_text("utf-8"))
    assert results["forecast"]["epochs"] <= 9
    assert [each["name"] for each in results["forecast"]["candidates"]] == [
        "kernel regression",
        "two-sided, strength 1",
    ]
