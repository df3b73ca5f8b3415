"""Inspections that are interrupted, whose checkpoints are in a wrong order, and whose two cosines disagree."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import adaptive_tangents as at
from adaptive_tangents import cli
from adaptive_tangents.commands import inspect as inspect_command
from adaptive_tangents.commands.report import PAGES
from adaptive_tangents.inspection import InspectConfig, KeptInFolder, page, run
from adaptive_tangents.inspection.run import disagreement
from adaptive_tangents.inspection.tangents import Tangents
from adaptive_tangents.loading import Data
from adaptive_tangents.reporting import report
from adaptive_tangents.runs.record import RunResult
from adaptive_tangents.runs.results import write_results
from study_cases import explained_in_rounds, in_outline, plain_figures

pytestmark = pytest.mark.xdist_group("interrupted and doubted")

NETWORK = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
"""
CONFIG = InspectConfig(samples=20, nodes=2)
EXTRA = {"command": "adaptive-tangents inspect", "model": "networks:network", "data_file": "data.npz"}
runner = CliRunner()
space: dict[str, Any] = {}
exec(NETWORK, space)


def trained(steps: int) -> tuple[list[dict[str, Tensor]], Data]:
    """A network's states along a short training, and its data of two classes."""
    model = space["network"]()
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = (x[:, 0] + x[:, 1] > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    states = []
    for _ in range(steps):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        for _ in range(12):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return states, Data(x, y)


STATES, DATA = trained(4)
NAMED = dict(zip(("a", "b", "c", "d"), STATES, strict=True))


def stopped_at(stage: str, kept: KeptInFolder | None = None) -> RunResult:
    def progress(name: str, fraction: float) -> None:
        if name == stage:
            raise KeyboardInterrupt

    with explained_in_rounds(1):
        return run(space["network"](), NAMED, DATA, CONFIG, progress=progress, kept=kept)


@pytest.fixture(scope="module")
def whole() -> RunResult:
    with explained_in_rounds(1):
        return run(space["network"](), NAMED, DATA, CONFIG)


STAGES = ["average", "explain 1", "explain 2", "models", "checkpoint b", "checkpoint c"]
SAID = ["the average over the path", "structured transforms", "structured transforms", "the exact models"]
SAID += ["checkpoint b", "checkpoint c"]
MISSING = {stage: list(dict.fromkeys(SAID[k:])) for k, stage in enumerate(STAGES)}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunResult]:
    """One run, interrupted at every stage and each time resumed; the last time to its end."""
    folder, found = tmp_path_factory.mktemp("resumed"), {}
    for stage in ("start", "end"):
        with pytest.raises(KeyboardInterrupt):
            stopped_at(stage, KeptInFolder(folder, resume=True))
    for k, stage in enumerate([*STAGES, "nothing"]):
        found[stage] = stopped_at(stage, KeptInFolder(folder, resume=True))
        names = {path.stem for path in (folder / "stages").iterdir()}
        assert names == {"choices", "start", "end", *STAGES[:k]}
    return found


def test_a_run_resumed_at_every_stage_finds_what_an_uninterrupted_one_does_to_the_last_bit(
    interrupted: dict[str, RunResult], whole: RunResult
) -> None:
    found = interrupted["nothing"]
    taken = {"plan", "wall_seconds", "cpu_seconds"}
    assert {k: v for k, v in found.results.items() if k not in taken} == {
        k: v for k, v in whole.results.items() if k not in taken
    }
    assert found.arrays.keys() == whole.arrays.keys()
    for name, array in found.arrays.items():
        assert array.dtype == whole.arrays[name].dtype
        np.testing.assert_array_equal(array, whole.arrays[name])


@pytest.mark.parametrize("stage", MISSING)
def test_an_interrupted_run_has_the_numbers_of_a_whole_one_as_far_as_it_came(
    stage: str, interrupted: dict[str, RunResult], whole: RunResult, tmp_path: Path
) -> None:
    found = interrupted[stage]
    r, full = found.results, whole.results
    assert r["interrupted"] == MISSING[stage]
    for key in ("alignment", "alignment_centered"):
        for goal, sims in r[key].items():
            for name, value in sims.items():
                assert value == (None if stage == "average" and name == "average" else full[key][goal][name])
    assert r["growth"]["final"] == full["growth"]["final"]
    assert r["models"] == ({} if stage in STAGES[: STAGES.index("models") + 1] else full["models"])
    blocks = list(full["blocks"])
    fitted = blocks[: min(len(blocks), max(0, STAGES.index(stage) - STAGES.index("explain 1")))]
    for key, told in full["explain"].items():
        assert told["left_out"] == []
        assert r["explain"][key]["left_out"] == [name for name in blocks if name not in fitted]
        assert (r["explain"][key]["total"] is None) == (not fitted)
        for name in fitted:
            assert r["blocks"][name]["explain"][key] == full["blocks"][name]["explain"][key]
    if stage == "models":
        assert r["explain"] == full["explain"]
    points = {point["name"]: point for point in full["trajectory"]}
    assert r["trajectory"] == [points[p["name"]] for p in r["trajectory"]]
    assert {p["name"] for p in r["trajectory"]} == {"a", "b", "c", "d"} - {
        name.removeprefix("checkpoint ") for name in r["interrupted"] if name.startswith("checkpoint")
    }
    np.testing.assert_array_equal(found.arrays["kernel.final"], whole.arrays["kernel.final"])
    write_results(r | EXTRA, found.arrays, tmp_path)
    with plain_figures("inspect"):
        text = report.build_report(tmp_path, PAGES).read_text("utf-8")
    plain = re.sub(r"<(style|svg|pre)\b.*?</\1>|<[^>]*>", "", text, flags=re.DOTALL)
    assert re.findall(r"\{\{|\bNone\b|\bnan\b", plain) == []
    assert "The run was interrupted before" in plain
    assert "The run was interrupted, so these are missing" in plain


@pytest.mark.parametrize("stage", ["outputs", "start", "end"])
def test_before_the_kernels_of_start_and_end_there_is_nothing_to_report(stage: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        stopped_at(stage)


def test_a_whole_run_was_not_interrupted(whole: RunResult) -> None:
    assert whole.results["interrupted"] == []
    assert "interrupted" not in " ".join(page.findings(whole.results) + whole.results["limits"])


# the order and the accuracy


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ((0.5, 0.9), "accuracy", None),
        ((0.5, 0.7, 0.6), "accuracy", None),
        ((0.9, 0.5), "accuracy", r"accuracy falls from 0\.9 at s0 to 0\.5 at s1; check the order of the checkpoints"),
        ((0.9, 0.95, 0.5), "accuracy", r"accuracy falls from 0\.9 at s0 to 0\.5 at s2"),
        ((0.1, 0.9, 0.3), "accuracy", r"accuracy is 0\.3 at s2, but 0\.9 at s1 before it; check the order"),
        ((2.0, 0.5), "mse", None),
        ((0.5, 2.0), "mse", r"mse rises from 0\.5 at s0 to 2 at s1"),
        ((2.0, 0.1, 1.5), "mse", r"mse is 1\.5 at s2, but 0\.1 at s1 before it"),
        ((0.5, 0.5, 0.5), "accuracy", None),
    ],
)
def test_an_order_that_performance_speaks_against_is_told(
    values: tuple[float, ...], kind: str, words: str | None
) -> None:
    found = disagreement([f"s{k}" for k in range(len(values))], [{kind: value} for value in values])
    assert (found is None) == (words is None)
    assert words is None or re.match(words, str(found))
    assert disagreement(["a", "b"], [None, None]) is None


def test_a_run_warns_where_the_end_is_worse_than_the_start(whole: RunResult) -> None:
    assert whole.results["performance"]["end"]["accuracy"] > whole.results["performance"]["start"]["accuracy"]
    backwards = dict(reversed(NAMED.items()))
    with pytest.warns(at.TangentWarning, match=r"^inspect: accuracy falls from .* at d to .* at a; check the order"):
        found = run(space["network"](), backwards, DATA, InspectConfig(samples=24, nodes=1))
    assert any("in doubt: accuracy falls from" in limit for limit in found.results["limits"])


# the sentence follows the measure that does not mislead


def results(plain: tuple[float, float], centered: tuple[float | None, float | None]) -> dict[str, Any]:
    def stages(pair: tuple[float | None, float | None]) -> dict[str, float | None]:
        return {"initial": pair[0], "average": None if pair[0] is None else sum(pair) / 2, "final": pair[1]}  # type: ignore[arg-type]

    goals = ("change", "labels")
    return {
        "growth": {"final": 2.0},
        "layers": [],
        "blocks": {},
        "cka": {"final": 0.5},
        "alignment": dict.fromkeys(goals, stages(plain)),
        "alignment_centered": dict.fromkeys(goals, stages(centered)),
    }


def test_sentences_follow_the_centered_cosine_and_name_it() -> None:
    opposite = results((0.10, 0.60), (0.50, 0.20))
    assert page.headline(opposite) == "The kernel grew to 2.0 times its size and turned away from the labels."
    told = page._turn(opposite)
    assert (
        "turned away from the labels: centered sim 0.50 (K₀) → 0.35 (K̄) → 0.20 (K_T); not centered 0.10 → 0.60" in told
    )
    assert "not centered 0.10 → 0.60, which a mean that all samples share can move" in told
    assert "turned toward" not in told
    same = page._turn(results((0.1, 0.6), (0.2, 0.5)))
    assert "turned toward the labels: centered sim 0.20 (K₀) → 0.35 (K̄) → 0.50 (K_T); not centered 0.10 → 0.60." in same


def test_sentences_name_the_plain_cosine_where_the_centered_one_is_not_defined() -> None:
    margin = results((0.1, 0.6), (None, None))
    assert page.headline(margin).endswith("turned toward the labels.")
    assert "turned toward the labels: sim 0.10 (K₀)" in page._turn(margin)


def test_half_of_the_turn_is_by_the_same_cosine(whole: RunResult) -> None:
    points = [{"name": f"s{k}", "alignment": a, "alignment_centered": b} for k, (a, b) in enumerate(
        ((0.1, 0.9), (0.5, 0.3), (0.9, 0.2)))]  # fmt: skip
    told = page._milestones({"trajectory": points})
    assert told.startswith("Half of the turn had happened by s1, by the centered sim")
    old = [{key: value for key, value in point.items() if key != "alignment_centered"} for point in points]
    assert "centered" not in page._milestones({"trajectory": old})


# the command


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "network_to_order.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    for name, step, state in zip(("start", "epoch_1", "epoch_2", "end"), (0, 90, 200, 1000), STATES, strict=True):
        torch.save({"state_dict": state, "global_step": step}, tmp_path / f"{name}.ckpt")
    np.savez(tmp_path / "data.npz", x=DATA.x, y=DATA.y)
    return tmp_path


def inspect(*arguments: str) -> Any:
    given = ["inspect", "--quick", "--model", "network_to_order.py:network", "--data", "data.npz", "--out", "run"]
    with explained_in_rounds(1):
        return runner.invoke(cli.app, [*given, *arguments])


def test_the_command_prints_the_order_of_the_steps_before_it_works(files: Path) -> None:
    with plain_figures("inspect"):
        done = inspect("--checkpoints", "*.ckpt")
    assert done.exit_code == 0, done.output
    lines = [line.strip() for line in done.output.splitlines()]
    first = lines.index("4 checkpoints, in the order of the steps stored in the files:")
    assert lines[first + 1 : first + 5] == [
        "start.ckpt  (0)",
        "epoch_1.ckpt  (90)",
        "epoch_2.ckpt  (200)",
        "end.ckpt  (1000)",
    ]
    assert first < next(k for k, line in enumerate(lines) if line.endswith("outputs"))
    told = json.loads((files / "run" / "results.json").read_text())
    assert [point["name"] for point in told["trajectory"]] == ["start", "epoch_1", "epoch_2", "end"]
    assert "warning" not in done.output


def test_the_command_warns_of_swapped_ends_and_of_accuracy_that_falls(files: Path) -> None:
    with plain_figures("inspect"):
        done = inspect("--start", "end.ckpt", "--end", "start.ckpt")
    assert done.exit_code == 0, done.output
    told = " ".join(done.output.split())
    assert (
        "warning: end.ckpt comes after start.ckpt by the steps stored in the files (1000 and 0); if --start and" in told
    )
    assert re.search(r"warning: accuracy falls from .* at end to .* at start; check the order of the checkpoints", told)
    limits = " ".join(json.loads((files / "run" / "results.json").read_text())["limits"])
    assert "The order of the checkpoints is in doubt: end.ckpt comes after start.ckpt" in limits


def test_an_open_order_is_refused_before_any_work(files: Path) -> None:
    for name in ("one", "two"):
        torch.save(STATES[1], files / f"{name}.ckpt")
    done = inspect("--checkpoints", "*.ckpt")
    assert done.exit_code == 1
    assert "nothing says where one.ckpt, two.ckpt come in training" in " ".join(done.output.split())
    assert not (files / "run").exists()


def test_the_command_writes_what_is_finished_when_interrupted(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tangents, "average", interrupt)
    with plain_figures("inspect"):
        done = inspect("--checkpoints", "*.ckpt")
    assert done.exit_code == 130
    told = " ".join(done.output.split())
    assert "interrupted; the report holds what was finished, without the average over the path, structured" in told
    assert told.endswith("the same command with --resume continues")
    assert (files / "run" / "report.html").exists()
    with in_outline():
        again = runner.invoke(cli.app, ["report", "run"])
    assert again.exit_code == 0, again.output


def test_results_stay_when_the_drawing_is_interrupted(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect_command, "finish", interrupt)
    done = inspect("--start", "start.ckpt", "--end", "end.ckpt")
    assert done.exit_code == 130
    assert "interrupted while the report was drawn; the results are there" in " ".join(done.output.split())
    assert json.loads((files / "run" / "results.json").read_text())["interrupted"] == []
