"""The commands: what they print, what they write, and how they refuse."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from adaptive_tangents import __version__, cli
from adaptive_tangents.commands import console, reproduce
from adaptive_tangents.experiments.kernel_alignment import run as kernel_alignment
from adaptive_tangents.experiments.kernel_alignment import setup as alignment_setup
from adaptive_tangents.experiments.kernel_alignment.run import KernelAlignmentConfig
from adaptive_tangents.experiments.registry import STUDIES
from adaptive_tangents.experiments.study import Asked
from adaptive_tangents.experiments.training import SGD, relu_network
from adaptive_tangents.inspection import InspectConfig
from study_cases import explained_in_rounds, made_up_data, plain_figures

pytestmark = pytest.mark.xdist_group("command line")

runner = CliRunner()
WIDTH = 16
REPRODUCE = ["reproduce", "kernel-alignment", "--quick"]


@pytest.fixture(autouse=True, scope="module")
def smaller() -> Iterator[None]:
    """Make quick runs take a second; the commands do not depend on the numbers."""
    configured = kernel_alignment.configured

    def small(asked: Asked) -> KernelAlignmentConfig:
        return replace(
            configured(asked), width=WIDTH, training=SGD(epochs=2), kernel_samples=40, path_nodes=4, strengths=(10.0,),
            linearization_points=3,
            near=0.5,
        )  # fmt: skip

    plain = plain_figures(kernel_alignment.NAME, but="kernels")
    with pytest.MonkeyPatch.context() as patch, explained_in_rounds(1), plain:
        patch.setattr(kernel_alignment, "configured", small)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    with made_up_data():
        done = runner.invoke(cli.app, [*REPRODUCE, "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out, done.output


def test_reproduce_prints_findings_beside_the_papers_and_the_path_of_the_report(folder) -> None:
    out, printed = folder
    assert "sim(K̄, K_y)" in printed
    assert "0.40" in printed
    assert "paper" in printed
    assert f"Report: {(out / 'report.html').resolve()}" in printed


def test_reproduce_writes_results_figures_checkpoints_and_one_page(folder) -> None:
    out, _ = folder
    results = json.loads((out / "results.json").read_text())
    assert {"config", "seed", "versions", "device", "wall_seconds", "metrics"} <= set(results)
    assert results["metrics"]["sign.alignment.average"] == results["targets"]["sign"]["alignment"]["average"]
    assert (out / "report.html").stat().st_size > 100_000
    assert {path.suffix for path in (out / "figures").iterdir()} == {".png", ".svg"}
    assert not [path for path in out.rglob("*") if path.suffix in (".part", ".tmp")]


def test_checkpoints_load_into_the_network_as_plain_state_dicts(folder) -> None:
    out, _ = folder
    model = relu_network((81, WIDTH, WIDTH, 1), kernel_alignment.BLOCKS, bias=True, generator=torch.Generator())
    for kind in ("start", "end"):
        model.load_state_dict(load_file(out / "checkpoints" / f"sign.{kind}.safetensors"))


def test_report_draws_the_page_again_the_same(folder) -> None:
    out, _ = folder
    page = out / "report.html"
    before = page.read_text()
    page.unlink()
    done = runner.invoke(cli.app, ["report", str(out)])
    assert done.exit_code == 0, done.output
    assert page.read_text() == before


def test_resume_keeps_what_was_trained(folder, monkeypatch) -> None:
    out, _ = folder
    before = json.loads((out / "results.json").read_text())["metrics"]
    monkeypatch.setattr(alignment_setup, "train", lambda *_, **__: pytest.fail("training was repeated"))
    monkeypatch.setattr(reproduce, "finish", lambda folder: None)  # would draw the same again
    (out / "results.json").unlink()
    with made_up_data():
        done = runner.invoke(cli.app, [*REPRODUCE, "--out", str(out), "--resume"])
    assert done.exit_code == 0, done.output
    after = json.loads((out / "results.json").read_text())["metrics"]
    assert after["sign.alignment.average"] == before["sign.alignment.average"]


def test_resume_with_other_settings_is_refused(folder) -> None:
    done = runner.invoke(cli.app, [*REPRODUCE, "--out", str(folder[0]), "--resume", "--seed", "7"])
    assert done.exit_code == 1
    assert "holds a run made with other settings (seed); give another folder with --out, or delete it" in done.output


def test_interruption_says_how_to_go_on(monkeypatch, tmp_path) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kernel_alignment, "run", interrupt)
    done = runner.invoke(cli.app, [*REPRODUCE, "--out", str(tmp_path)])
    assert done.exit_code == 130
    assert "--resume continues it" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["reproduce", "alchemy"],
            f"no experiment 'alchemy'; choose from {', '.join(STUDIES)} or all",
        ),
        (["reproduce", "kernel-aligment"], "or all (did you mean kernel-alignment?)"),
        (["reproduce", "penalty"], "or all (did you mean penalties?)"),
        ([*REPRODUCE, "--data", "imagenet"], "imagenet"),
        ([*REPRODUCE, "--data", "mnist", "--data-dir", "nowhere"], "nowhere"),
        ([*REPRODUCE, "--device", "tpu9"], "device 'tpu9' cannot be used here; use --device cpu"),
        (
            ["reproduce", "kernel-alignment", "--epochs", "0"],
            "epochs, batch size, width and path nodes must be positive",
        ),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_refusals_are_one_line_of_words_and_write_nothing(arguments, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = runner.invoke(cli.app, arguments)
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []


def test_version_is_the_packages() -> None:
    done = runner.invoke(cli.app, ["--version"])
    assert done.exit_code == 0
    assert __version__ in done.output


def test_all_runs_each_experiment_into_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(reproduce, "run", lambda each, asked_of, folder, *_, **__: asked.append(folder))
    monkeypatch.setattr(reproduce, "finish", lambda folder: None)
    monkeypatch.setattr(reproduce, "collect", lambda folder, names, *, command: asked.append(folder))
    done = runner.invoke(cli.app, ["reproduce", "all", "--quick", "--jobs", "1", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert asked == [tmp_path / name for name in STUDIES] + [tmp_path]


def test_a_folder_of_other_settings_is_refused_before_anything_is_run(folder) -> None:
    before = (folder[0] / "results.json").read_bytes()
    done = runner.invoke(cli.app, [*REPRODUCE, "--out", str(folder[0]), "--data", "mnist", "--seed", "3"])
    assert done.exit_code == 1
    assert "holds a run made with other settings (data, seed)" in done.output
    assert (folder[0] / "results.json").read_bytes() == before


def test_with_all_a_folder_of_other_settings_is_refused_before_any_experiment_runs(tmp_path, monkeypatch) -> None:
    last = tmp_path / list(STUDIES)[-1]
    last.mkdir()
    (last / "settings.json").write_text('{"experiment": "another"}')
    monkeypatch.setattr(reproduce, "run", lambda *_, **__: pytest.fail("an experiment was run"))
    done = runner.invoke(cli.app, ["reproduce", "all", "--quick", "--jobs", "1", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "holds a run" in done.output


def test_the_help_of_inspect_tells_its_default(monkeypatch) -> None:
    done = runner.invoke(cli.app, ["inspect", "--help"], env={"COLUMNS": "200"})
    assert f"Number of samples for the kernels (default: {InspectConfig.samples})" in " ".join(done.output.split())


def test_another_experiments_folder_is_refused(folder) -> None:
    done = runner.invoke(cli.app, ["reproduce", "penalties", "--out", str(folder[0])])
    assert done.exit_code == 1
    assert "experiment" in done.output


def test_quick_and_full_exclude_each_other_and_seeds_and_jobs_are_counted_from_one(tmp_path) -> None:
    for arguments, message in (
        (["--quick", "--full"], "--quick and --full exclude each other"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
    ):
        done = runner.invoke(cli.app, ["reproduce", "penalties", "--out", str(tmp_path / "out"), *arguments])
        assert done.exit_code == 1
        assert message in done.output
    assert list(tmp_path.iterdir()) == []


def test_resume_leaves_a_complete_run_as_it_is(tmp_path, monkeypatch) -> None:
    arguments = ["reproduce", "penalties", "--out", str(tmp_path)]
    with plain_figures("penalties"):
        assert runner.invoke(cli.app, arguments).exit_code == 0
    monkeypatch.setattr(reproduce, "run", lambda *_, **__: pytest.fail("it was run again"))
    done = runner.invoke(cli.app, [*arguments, "--resume"])
    assert done.exit_code == 0, done.output
    assert "Report: " in done.output
    monkeypatch.setattr(reproduce, "run", lambda *_, **__: (tmp_path / "again").touch())
    runner.invoke(cli.app, arguments)
    assert (tmp_path / "again").exists()


def test_each_of_all_experiments_says_its_own_command(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["at", "reproduce", "all", "--quick"])
    assert console.typed("penalties") == "adaptive-tangents reproduce penalties --quick"
    assert console.typed() == "adaptive-tangents reproduce all --quick"
