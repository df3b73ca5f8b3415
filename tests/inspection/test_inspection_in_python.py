"""`at.inspect`: the command's numbers, the model as it was, what comes back from a folder, and refusals in words."""

import csv
import json
import sys
import threading
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import adaptive_tangents as at
from adaptive_tangents import cli
from adaptive_tangents.commands.report import PAGES
from adaptive_tangents.inspection import measures, page
from adaptive_tangents.inspection.evaluation import in_evaluation
from adaptive_tangents.inspection.given import opened
from adaptive_tangents.inspection.run import sample_fingerprint
from adaptive_tangents.loading import Data, as_data
from adaptive_tangents.runs.own_files import BLOCKS_HEAD
from snapshots import Snapshot
from study_cases import explained_in_rounds, of_few_pixels, plain_figures

pytestmark = pytest.mark.xdist_group("inspection in Python")

runner = CliRunner()
NETWORK = """
import torch
from torch import nn

def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))
"""
# What names a run and not what was measured.
_OWN = {"command", "model", "data_file", "wall_seconds", "cpu_seconds", "plan"}


def network() -> nn.Sequential:
    space: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        exec(NETWORK, space)
        made: nn.Sequential = space["network"]()
    return made


def later(state: dict[str, Tensor], step: float) -> dict[str, Tensor]:
    """A state further along: weights moved, running statistics as they were."""
    generator = torch.Generator().manual_seed(5)
    noise = {k: torch.randn(v.shape, generator=generator) for k, v in state.items()}
    return {k: v if "running" in k or not v.is_floating_point() else v + step * noise[k] for k, v in state.items()}


def states() -> list[dict[str, Tensor]]:
    first = {name: value.clone() for name, value in network().state_dict().items()}
    return [first, later(first, 0.2), later(first, 0.4)]


def samples() -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = torch.func.functional_call(network().eval(), states()[2], x).argmax(1)
    return x, y


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Explanations in few rounds, and figures without content except the kernels."""
    plain = plain_figures("inspect", but="kernels")
    with pytest.MonkeyPatch.context() as patch, explained_in_rounds(1), of_few_pixels(), plain:
        patch.setattr(measures, "fit_operations", lambda *_: 1e30)  # no exact models
        patch.setattr(page, "PAGE", PAGES["inspect"]())
        yield


@pytest.fixture(scope="module")
def found(quick: None) -> at.inspection.Inspection:
    first, half, last = states()
    return at.inspect(network(), first, last, samples(), checkpoints={"half": half}, wrt="*")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "made_for_inspect.py").write_text(NETWORK)
    for name, state in zip(("step_0", "step_5", "step_10"), states(), strict=True):
        torch.save(state, tmp_path / f"{name}.pt")
    x, y = samples()
    np.savez(tmp_path / "data.npz", x=x, y=y)
    return tmp_path


def measured(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key not in _OWN}


def test_the_function_finds_what_the_command_writes_number_for_number(here: Path) -> None:
    given = ["--model", "made_for_inspect.py:network", "--data", "data.npz", "--samples", "12", "--seed", "1"]
    done = runner.invoke(cli.app, ["inspect", *given, "--checkpoints", "step_*.pt", "--out", "out"])
    assert done.exit_code == 0, done.output
    told = json.loads((here / "out" / "results.json").read_text())
    options: dict[str, Any] = {"checkpoints": ["step_5.pt"], "samples": 12, "seed": 1}
    paths = at.inspect("made_for_inspect.py:network", "step_0.pt", Path("step_10.pt"), "data.npz", **options)
    assert measured(dict(paths.results)) == measured(told)
    assert {"model", "data_file"} & told.keys() == {"model", "data_file"} & paths.results.keys()
    assert "samples=12, seed=1" in paths.results["command"]
    with np.load(here / "out" / "arrays.npz") as written:
        assert {name: array.tobytes() for name, array in written.items()} == {
            name: array.tobytes() for name, array in paths.arrays.items()
        }
    assert (here / "out" / "blocks.csv").read_text() == paths.blocks.csv()
    model = network()
    model.load_state_dict(states()[2])
    memory = at.inspect(model, states()[0], data=samples(), checkpoints=[states()[1]], samples=12, seed=1)
    renamed = [
        point | {"name": name} for point, name in zip(told["trajectory"], ("start", "checkpoint 1", "end"), strict=True)
    ]
    assert memory.results["trajectory"] == renamed
    assert memory.results["blocks"] == told["blocks"]
    assert memory.results["metrics"] == told["metrics"]


def test_a_model_is_left_as_it_was_found_also_if_the_inspection_fails() -> None:
    model, (first, _, last), (x, y) = network(), states(), samples()
    model[1].eval()
    model[4].weight.requires_grad_(False)
    last["4.weight"] = first["4.weight"]
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, drawn = Snapshot(model, x, y, first, last), torch.get_rng_state()
    at.inspect(model, first, last, (x, y))
    assert before.changes(Snapshot(model, x, y, first, last)) == []
    with pytest.raises(at.TangentError, match="same outputs"):
        at.inspect(model, first, dict(first), (x, y))
    assert before.changes(Snapshot(model, x, y, first, last)) == []
    assert torch.equal(drawn, torch.get_rng_state())


def test_eval_is_not_called_on_the_model_because_some_networks_change_their_weights_then() -> None:
    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> "Merging":
            if not mode:
                self.weight.data += 1
            return super().train(mode)

    model = nn.Sequential(Merging(3, 4), nn.Tanh(), nn.Linear(4, 1)).train()
    weight = model[0].weight.detach().clone()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    at.inspect(model, start, {k: 1.5 * v for k, v in start.items()}, samples()[0])
    assert torch.equal(model[0].weight, weight)


def test_of_several_calls_in_threads_the_last_puts_the_modes_back() -> None:
    model, inside, leave = network(), threading.Event(), threading.Event()
    seen: list[bool] = []

    def first() -> None:
        inside.set()
        leave.wait(10)

    thread = threading.Thread(target=in_evaluation, args=(model, first))
    thread.start()
    inside.wait(10)
    in_evaluation(model, lambda: seen.append(any(m.training for m in model.modules())))
    seen.append(any(m.training for m in model.modules()))
    leave.set()
    thread.join(10)
    assert seen == [False, False]
    assert all(m.training for m in model.modules())


def test_what_is_saved_comes_back_equal_and_is_drawn_again(found: at.inspection.Inspection, tmp_path: Path) -> None:
    path = found.save(tmp_path / "kept")
    assert path == tmp_path / "kept" / "report.html"
    assert {"results.json", "arrays.npz", "blocks.csv", "lora.json", "report.html", "figures"} == {
        p.name for p in path.parent.iterdir()
    }
    back = at.inspection.load_inspection(path.parent)
    assert back.results == found.results
    assert back.arrays.keys() == found.arrays.keys()
    assert all(np.array_equal(back.arrays[name], array) for name, array in found.arrays.items())
    assert (back.findings, back.headline, repr(back)) == (found.findings, found.headline, repr(found))
    drawn = path.read_bytes()
    path.unlink()
    done = runner.invoke(cli.app, ["report", str(path.parent)])
    assert done.exit_code == 0, done.output
    assert path.read_bytes() == drawn
    assert found.findings[0][:30] in done.output
    assert found.save(path.parent) == path  # its own files are replaced


def test_the_table_of_blocks_holds_the_numbers_of_the_results(found: at.inspection.Inspection, tmp_path: Path) -> None:
    blocks = found.blocks
    assert blocks.names == list(found.results["blocks"]) == ["0", "1.weight", "1.bias", "4"]
    for name, told in found.results["blocks"].items():
        row = blocks[name]
        assert (row["rows"], row["columns"]) == tuple(told["shape"])
        assert row["trace_share_end"] == told["trace_share"]["final"]
        assert row["alignment_labels_start"] == told["alignment_labels"]["initial"]
        assert row["effective_rank"] == told["effective_rank"]["participation"]
        assert row["r2_left"] == told["explain"]["left"]
    assert sum(blocks.column("change_share")) == pytest.approx(1, abs=1e-9)
    assert sum(blocks.column("trace_share_end")) == pytest.approx(1, abs=1e-9)
    read = list(csv.DictReader(blocks.csv().splitlines()))
    assert list(read[0]) == list(blocks.columns)
    assert [float(row["growth_end"]) for row in read] == blocks.column("growth_end")
    assert blocks.csv().startswith(BLOCKS_HEAD)
    assert blocks[2:].names == ["1.bias", "4"]
    with pytest.raises(KeyError, match=r"no row '9'; the rows are 0, 1\.weight, 1\.bias, 4"):
        blocks["9"]
    with pytest.raises(at.TangentError, match="no column 'size'; the columns are block, rows"):
        blocks.column("size")


def test_a_share_of_the_change_is_that_of_the_kernels_by_block() -> None:
    model, (first, _, last), (x, _) = network().eval(), states(), samples()
    found = at.inspect(model, first, last, x, outputs="all")
    kernels = [at.tangent_kernel(model, x, params=state, outputs="trace", by_block=True) for state in (first, last)]
    moved = {name: (kernels[1][name] - kernels[0][name]).double() for name in kernels[0]}
    whole = sum(moved.values())
    for name, change in moved.items():
        share = float((change * whole).sum() / (whole * whole).sum())
        assert found.blocks[name]["change_share"] == pytest.approx(share, rel=1e-4)


def test_tables_become_frames_of_pandas(found: at.inspection.Inspection, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = found.blocks.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == list(found.blocks.columns)
    assert frame.growth_end.tolist() == found.blocks.column("growth_end")
    assert found.trajectory.to_frame().state.tolist() == ["start", "half", "end"]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(at.TangentError, match=r"to_frame: pandas is not installed; pip install 'adaptive-tangents\["):
        found.blocks.to_frame()


def test_kernels_and_points_are_those_of_the_arrays_and_results(found: at.inspection.Inspection) -> None:
    assert list(found.kernels) == ["start", "average", "end"]
    assert np.array_equal(found.kernels["end"], found.arrays["kernel.final"])
    assert found.trajectory.names == ["start", "half", "end"]
    assert found.trajectory["end"]["cka_end"] == pytest.approx(1)
    assert found.trajectory["end"]["accuracy"] == 1
    assert found.trajectory["end"]["mse"] is None


def test_a_figure_is_drawn_by_name_and_another_is_refused(found: at.inspection.Inspection) -> None:
    assert len(found.plot().axes) == len(found.plot("kernels").axes) == 5
    with pytest.raises(at.TangentError, match="no figure 'images' of these results; the figures are kernels, blocks"):
        found.plot("images")


def test_it_shows_itself_in_three_lines_and_in_notebooks(found: at.inspection.Inspection) -> None:
    lines = repr(found).splitlines()
    assert len(lines) == 3
    assert lines[0] == "Inspection of Sequential, start → end: 4 blocks on 16 samples"
    assert found.headline in lines[1]
    html = found._repr_html_()
    for part in ("data:image/png;base64,", *(escape(s) for s in found.findings), "<th title="):
        assert part in html


def test_without_what_draws_pages_numbers_are_there_and_sentences_say_what_to_install(
    found: at.inspection.Inspection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sys.modules["adaptive_tangents.inspection"], "page")
    monkeypatch.setitem(sys.modules, "adaptive_tangents.inspection.page", None)
    calls: list[Callable[[], object]] = [lambda: found.findings, found.plot, lambda: found.save(tmp_path / "kept")]
    for call in calls:
        with pytest.raises(at.TangentError, match=r"is not installed; pip install 'adaptive-tangents\[report\]'"):
            call()
    assert not (tmp_path / "kept").exists()
    assert "pip install" in repr(found)
    assert "<table>" in found._repr_html_()
    assert found.blocks["0"]["growth_end"] > 0


def test_a_file_of_the_users_is_not_replaced(found: at.inspection.Inspection, tmp_path: Path) -> None:
    (tmp_path / "blocks.csv").write_text("name,height\nAda,170\n")
    with pytest.raises(
        at.TangentError, match=r"blocks\.csv was not written by adaptive-tangents, so it is not replaced"
    ):
        found.save(tmp_path)
    with pytest.raises(at.TangentError, match=r"blocks\.csv was not written"):
        found.write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["blocks.csv"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(at.TangentError, match=r"save: .*file is not a folder"):
        found.save(tmp_path / "file")


def test_folders_that_hold_no_inspection_are_refused(tmp_path: Path) -> None:
    with pytest.raises(at.TangentError, match="load_inspection: no folder"):
        at.inspection.load_inspection(tmp_path / "none")
    (tmp_path / "results.json").write_text('{"experiment": "penalties"}')
    np.savez(tmp_path / "arrays.npz", x=np.ones(1))
    with pytest.raises(at.TangentError, match="results of 'penalties', not an inspection; give a folder that"):
        at.inspection.load_inspection(tmp_path)


def test_states_and_samples_in_every_form_mean_the_same() -> None:
    model, (first, half, last), (x, y) = network(), states(), samples()
    other = network()
    other.load_state_dict(last)
    for end in (last, other):
        found = opened(model, first, end, None, None, False).states["end"]
        assert all(torch.equal(found[name], value) for name, value in last.items())
    held = opened(model, first, other, [half], None, False)
    assert list(held.states) == ["start", "checkpoint 1", "end"]
    for given in ((x, y), (x.numpy(), y.numpy()), (x, y.tolist()), Data(x, y)):
        data = as_data(given)
        assert torch.equal(data.x, x)  # type: ignore[arg-type]
        assert torch.equal(data.y, y)  # type: ignore[arg-type]
    assert as_data(x).y is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, s, d: at.inspect(m, s[0], s[2]), "inspect: no data; give the samples to measure on"),
        (lambda m, s, d: at.inspect(m, {"0.weight": d[0]}, s[2], d), "start does not fit the model: missing 0.bias"),
        (lambda m, s, d: at.inspect(m, s[0], s[2] | {"9.w": d[0]}, d), "end does not fit the model: unexpected 9.w"),
        (lambda m, s, d: at.inspect(m, s[0], s[2] | {"0.bias": d[0]}, d), r"of another shape: 0.bias \(16, 3\) for \(6,\)"),
        (lambda m, s, d: at.inspect(m, s[0], s[2], (d[0], d[1][:3])), "x holds 16 samples and y 3; give a label"),
        (lambda m, s, d: at.inspect(m, s[0], s[2], d, samples=3), "must be at least 4, got 3"),
        (lambda m, s, d: at.inspect(m, s[0], s[2], torch.ones(8, 7)), "cannot take the samples of data in memory"),
        (lambda m, s, d: at.inspect(m, s[0], s[2], d, checkpoints={"end": s[1]}), "are named 'end', .* give other titles"),
    ],
)  # fmt: skip
def test_refusals_say_what_to_give(call: Callable[..., object], message: str) -> None:
    with pytest.raises(at.TangentError, match=message):
        call(network(), states(), samples())


def test_a_network_that_got_worse_is_a_warning() -> None:
    (first, _, last), data = states(), samples()
    with pytest.warns(at.TangentWarning, match="accuracy falls from 1 at start"):
        found = at.inspect(network(), last, first, data)
    assert any("accuracy falls" in sentence for sentence in found.results["limits"])


def test_samples_are_known_again_in_another_precision_and_order_of_use() -> None:
    x = samples()[0]
    assert sample_fingerprint(x) == sample_fingerprint(x.double()) != sample_fingerprint(x.flip(0))
    assert sample_fingerprint({"x": x}) != sample_fingerprint({"x": x + 1})
