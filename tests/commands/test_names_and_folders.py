"""The commands with odd names, and with folders that hold the user's own files: nothing of theirs is replaced or mangled."""

import importlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import adaptive_tangents as at
from adaptive_tangents import cli
from adaptive_tangents.commands import console
from adaptive_tangents.commands.checks import check_folder
from adaptive_tangents.commands.report import PAGES
from adaptive_tangents.inspection import figures
from adaptive_tangents.reporting import drawing
from adaptive_tangents.runs.results import load_results, write_results
from adaptive_tangents.runs.units import write_checkpoint
from study_cases import explained_in_rounds, plain_figures

runner = CliRunner()
FACTORY = "from torch import nn\ndef make(): return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))\n"
ODD = (
    "[red]x[red]", "[bold]", "[link=file:x]", ":smile:", "a\nb", "ü 核", "$x^$", "\udcff", "{{x}}", "%s", "*?[", "\x1b[31m",
    "\\[red]", "a\tb", "'q\"", "@x", "n" * 200,
)  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "f.py").write_text(FACTORY)
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(8, 3)), y=np.arange(8) % 2)
    torch.manual_seed(0)
    state = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).state_dict()
    torch.save(state, tmp_path / "a.pt")
    torch.save({name: 1.5 * value for name, value in state.items()}, tmp_path / "b.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


INSPECT = ["inspect", "--model", "f.py:make", "--data", "d.npz", "--start", "a.pt", "--end", "b.pt", "--out", "out"]


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_names_of_files_are_printed_as_they_are(name: str, here: Path) -> None:
    os.rename("d.npz", name)
    done = runner.invoke(cli.app, ["kernel", "--model", "f.py:make", "--data", name, "--out", f"{name}/K.zarr"])
    assert done.exit_code == 1
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert console.shown(name.replace("\n", "\\n")) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = runner.invoke(cli.app, ["kernel", "--model", "f.py:make", "--data", name, "--out", f"K{name}"])
    assert done.exit_code == 0, done.output
    assert f"Kernel: {console.shown(str(here.resolve() / f'K{name}'))}" in done.stdout
    assert at.open_kernel(here / f"K{name}").complete


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "NAME"],
        ["reproduce", "NAME"],
        ["reproduce", "penalties", "--device", "NAME"],
        ["reproduce", "kernel-alignment", "--data", "NAME"],
        ["reproduce", "kernel-alignment", "--data", "mnist", "--data-dir", "NAME"],
        ["kernel", "--model", "NAME", "--data", "d.npz", "--out", "K"],
        ["kernel", "--model", "f.py:NAME", "--data", "d.npz", "--out", "K"],
        ["kernel", "--model", "f.py:make", "--data", "NAME", "--out", "K"],
        ["kernel", "--model", "f.py:make", "--data", "d.npz", "--out", "K", "--memory-limit", "NAME"],
        ["kernel", "--model", "f.py:make", "--data", "d.npz", "--out", "K", "--weights", "NAME"],
    ],
    ids=" ".join,
)
def test_refusals_show_names_as_they_are(arguments: list[str], here: Path) -> None:
    for name in ODD:
        done = runner.invoke(cli.app, [word.replace("NAME", name) for word in arguments])
        assert done.exit_code == 1, name
        assert isinstance(done.exception, SystemExit), name
        assert len(done.stderr.splitlines()) == 1, name
        assert done.stderr.startswith("error "), name


def test_a_table_and_the_bars_take_brackets_as_text() -> None:
    with console.console.capture() as captured, console.bars() as update:
        update("[red]a[/red]", "[/] of b", 0.5)
    assert "[red]a[/red]: [/] of b" in captured.get()
    assert console.console.render_str("[/] :smile:").plain == "[/] :smile:"


# figures


@pytest.mark.parametrize(
    "name",
    [
        "$",
        "cost in $",
        "$x^$",
        "a$b$c",
        r"\$",
        r"\alpha_$",
        "{",
        "_head",
        "a\nb",
        "\x00",
        "\ud800",
        "核 😀",
        "",
        "w" * 500,
    ],
)
def test_names_are_drawn_as_they_are(name: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], label=drawing.named(name or " "))
    axes.set_yticks([1], [drawing.named(name)])
    legend = axes.legend()
    drawn = drawing.render(lambda *_: figure, "f", {}, {})
    assert drawn.png
    assert len(legend.get_texts()) == 1
    if name.isprintable() and len(name) < 40:
        shown, formula = axes.get_yticklabels()[0]._preprocess_math(drawing.named(name))
        assert (shown.strip(), formula) == (name, False)


# the user's own files


MINE: dict[str, Callable[[Path], object]] = {
    "results.json": lambda p: p.write_text('{"experiment": "baseline", "accuracy": 0.9}'),
    "arrays.npz": lambda p: np.savez(p, a=np.ones(3)),
    "report.html": lambda p: p.write_text("<h1>My report</h1>"),
    "figures/kernels.png": lambda p: p.write_bytes(b"\x89PNG mine"),
    "figures/kernels.svg": lambda p: p.write_text("<svg/>"),
}


@pytest.mark.parametrize("name", MINE)
def test_inspect_replaces_nothing_that_it_has_not_written(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptive_tangents.commands.inspect.run_inspection", lambda *_, **__: pytest.fail("it was run"))
    path = here / "out" / name
    path.parent.mkdir(parents=True)
    MINE[name](path)
    before = path.read_bytes()
    done = runner.invoke(cli.app, INSPECT)
    assert done.exit_code == 1
    assert f"{name} was not written by adaptive-tangents, so it is not replaced; give another folder" in done.stderr
    assert path.read_bytes() == before


def test_inspect_takes_odd_class_names_and_replaces_only_its_own_files(here: Path) -> None:
    classes = np.array(["a$ [/red]", "_$^\\frac{ {{x}}"])
    np.savez("d.npz", x=np.random.default_rng(0).normal(size=(8, 3)), y=np.arange(8) % 2, classes=classes)
    out = here / "out"
    with plain_figures("inspect", but="kernels"), explained_in_rounds(1):
        done = runner.invoke(cli.app, [*INSPECT, "--quick"])
        assert done.exit_code == 0, done.output
        check_folder("inspect", out, PAGES["inspect"]().figures)
        (out / "notes.txt").write_text("mine")
        (out / "report.html").write_text("<p>mine</p>")
        done = runner.invoke(cli.app, ["report", "out"])
    assert done.exit_code == 1
    assert "report.html was not written by adaptive-tangents" in done.stderr
    assert (out / "report.html").read_text() == "<p>mine</p>"
    assert (out / "notes.txt").read_text() == "mine"
    results, arrays = load_results(out)
    results["blocks"] = {f"_${name}": numbers for name, numbers in results["blocks"].items()}
    arrays |= {key.replace("change.", "change._$"): value for key, value in arrays.items()}
    for draw in (figures.draw_blocks, figures.draw_spectra):
        draw(results, arrays).canvas.draw()


@pytest.mark.parametrize("name", [*list(MINE)[:3], "settings.json", "checkpoints/mine.safetensors"])
@pytest.mark.parametrize("resume", [False, True])
def test_reproduce_replaces_nothing_that_it_has_not_written(name: str, resume: bool, here: Path) -> None:
    path = here / "out" / name
    path.parent.mkdir(parents=True)
    MINE.get(name, lambda p: p.write_text("[1]"))(path)
    before = path.read_bytes()
    for study in ("penalties", "kernel-alignment"):
        done = runner.invoke(
            cli.app, ["reproduce", study, "--quick", "--out", "out", *(["--resume"] if resume else [])]
        )
        assert done.exit_code == 1, done.output
        assert "not written by adaptive-tangents" in done.stderr or "cannot be read" in done.stderr
        assert {str(p.relative_to(here / "out")) for p in (here / "out").rglob("*") if p.is_file()} == {name}
        assert path.read_bytes() == before


def test_results_and_checkpoints_replace_nothing_that_is_not_theirs(tmp_path: Path) -> None:
    for name in ("results.json", "arrays.npz"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(at.TangentError, match=f"{name} was not written by adaptive-tangents"):
            write_results({"experiment": "demo"}, {"x": np.ones(2)}, tmp_path)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "one.safetensors").write_text("mine")
    with pytest.raises(at.TangentError, match=r"one\.safetensors was not written by adaptive-tangents, or is damaged"):
        write_checkpoint(tmp_path, "one", {"x": torch.ones(1)}, {"a": 1})
    assert (tmp_path / "checkpoints" / "one.safetensors").read_text() == "mine"


def test_results_of_an_earlier_version_are_known_by_their_version(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(
        json.dumps({"experiment": "demo", "versions": {"adaptive_tangents": "0.1.0"}})
    )
    np.savez(tmp_path / "arrays.npz", x=np.ones(2))
    write_results({"experiment": "demo"}, {"x": np.ones(2)}, tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = SimpleNamespace(path=os.path, access=lambda *_: False, W_OK=os.W_OK, X_OK=os.X_OK)
    monkeypatch.setattr("adaptive_tangents.commands.checks.os", sealed)
    done = runner.invoke(cli.app, INSPECT)
    assert done.exit_code == 1
    assert "--out out cannot be written, because . may not be changed; give another path" in done.stderr


def test_errors_of_the_system_are_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "x[red]\ny")

    monkeypatch.setattr("adaptive_tangents.commands.reading.load_data", denied)
    done = runner.invoke(cli.app, ["kernel", "--model", "f.py:make", "--data", "d.npz", "--out", "K"])
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert r"[Errno 13] Permission denied: 'x[red]\ny'; check that place" in done.stderr


def told_of_earlier(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if " holds " in line]


def test_a_run_says_before_it_starts_that_it_replaces_an_earlier_result(here: Path) -> None:
    with explained_in_rounds(1), plain_figures("inspect"):
        first = runner.invoke(cli.app, [*INSPECT, "--quick"])
        again = runner.invoke(cli.app, [*INSPECT, "--quick"])
        resumed = runner.invoke(cli.app, [*INSPECT, "--quick", "--resume"])
    assert [done.exit_code for done in (first, again, resumed)] == [0, 0, 0]
    made = r"out holds a result of \d{4}-\d\d-\d\d \d\d:\d\d, which this run will replace; --out FOLDER keeps it"
    assert told_of_earlier(first.stderr) == []
    assert re.fullmatch(rf"{made}; --resume takes what is finished in out/stages", told_of_earlier(again.stderr)[0])
    assert re.fullmatch(made, told_of_earlier(resumed.stderr)[0])
    os.remove(here / "out" / "results.json")  # as after an interruption
    with explained_in_rounds(1), plain_figures("inspect"):
        interrupted = runner.invoke(cli.app, [*INSPECT, "--quick"])
    assert told_of_earlier(interrupted.stderr) == [
        "out holds parts of an interrupted run, which this one will replace; --resume takes what is finished in out/stages"
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "one", "two", "--out", "out"],
        ["forecast", "--model", "f.py:make", "--data", "d.npz", "--out", "out"],
        ["reproduce", "penalties", "--quick", "--out", "out"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_says_that_it_replaces_an_earlier_result_before_the_work(
    arguments: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoppedError(Exception):
        pass

    def stop(*_: object, **__: object) -> None:
        raise StoppedError

    write_results({"experiment": "inspect", "versions": {"adaptive_tangents": "1"}}, {}, here / "out")
    for command, work in (("compare", "compared"), ("forecast", "opened"), ("reproduce", "run")):
        module = importlib.import_module(f"adaptive_tangents.commands.{command}")
        monkeypatch.setattr(module, work, stop)
    done = runner.invoke(cli.app, arguments)
    assert isinstance(done.exception, StoppedError)
    assert re.search("out holds a result of .*, which this run will replace; --out FOLDER keeps it", done.stderr)
