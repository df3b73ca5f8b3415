"""Lightning's checkpoints load as they are, and timm's networks are made by their names."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import adaptive_tangents as at
from adaptive_tangents import cli, loading
from study_cases import explained_in_rounds, plain_figures
from training_cases import Net, library, lightning_run, save_images

pytestmark = pytest.mark.xdist_group("trained checkpoints")
NET = "training_cases:net"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lightning")
    lightning_run(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def quicker() -> Iterator[None]:
    """Commands do not depend on the figures, nor on how far transforms are fitted."""
    with explained_in_rounds(1), plain_figures("inspect"):
        yield


def test_lightnings_files_are_a_series_in_order_of_their_steps_without_what_is_not_the_networks(run: Path) -> None:
    series = loading.open_series("inspect", model=NET, checkpoints=run)
    assert series.order is not None
    assert series.order.places == ("3", "6", "9")
    assert series.order.basis == "the steps stored in the files"
    for path, state in zip(series.order.paths, series.states.values(), strict=True):
        held = torch.load(path, weights_only=True)["state_dict"]
        assert "weights" in held  # the loss's, beside the network
        assert state.keys() == Net().state_dict().keys()
        assert all(torch.equal(value, held[f"model.{name}"]) for name, value in state.items())


def test_inspect_takes_a_folder_of_lightnings_files(run: Path, tmp_path: Path) -> None:
    data = save_images(tmp_path / "data.npz")
    given = ["--model", NET, "--checkpoints", str(run), "--data", str(data), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, ["inspect", *given, "--nodes", "1"])
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["blocks"]) == ["stem", "head"]
    assert results["model"] == NET


def test_lightnings_files_do_not_say_their_network(run: Path) -> None:
    with pytest.raises(
        at.TangentError, match=r"ckpt and .*do not say what network|do not say what network.*give --model"
    ):
        loading.open_series("inspect", checkpoints=run)


def test_hyperparameters_that_are_objects_are_refused_with_a_way_around(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": Net().state_dict(), "hyper_parameters": {"net": nn.Linear(1, 1)}, "global_step": 3}, path)
    with pytest.raises(at.TangentError) as caught:
        loading.open_series("inspect", model=NET, start=path)
    words = str(caught.value)
    assert "it holds torch.nn.modules.linear.Linear" in words
    assert "pickles are never loaded" in words
    remedy = "torch.save(torch.load('last.ckpt', weights_only=False)['state_dict'], 'weights.pt')"
    assert remedy in words
    torch.save(torch.load(path, weights_only=False)["state_dict"], tmp_path / "weights.pt")
    assert loading.open_series("inspect", model=NET, start=tmp_path / "weights.pt").states


def test_timm_makes_a_network_by_name_and_options_and_leaves_random_numbers_alone() -> None:
    timm = library("timm")
    before = torch.random.get_rng_state()
    model = loading.load_model("timm:test_resnet?num_classes=3&in_chans=1")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not model.training
    twin = timm.create_model("test_resnet", pretrained=False, num_classes=3, in_chans=1)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in twin.state_dict().items()}
    state = {f"module.{name}": value for name, value in twin.state_dict().items()}
    series = loading.open_series("inspect", model="timm:test_resnet?num_classes=3&in_chans=1", start=state)
    assert all(torch.equal(series.states["start"][name], value) for name, value in twin.state_dict().items())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:", r"'timm:' is not of the form timm:NAME\?num_classes=10"),
        ("timm:hf-hub:a/b", "is not of the form timm:NAME"),
        ("timm:resnet10t?num_classes", "is not of the form timm:NAME"),
        (
            "timm:resnet10t?pretrained=True",
            r"asks timm for weights \(pretrained\), and nothing is downloaded; give the",
        ),
        ("timm:resnet10t?checkpoint_path=a.pt", r"asks timm for weights \(checkpoint_path\)"),
        ("timm:resnet10x", "timm has no network 'resnet10x'; the nearest are .*resnet10t"),
        ("timm:test_resnet?colour=red", "timm cannot make test_resnet with colour=red .*give options that it takes"),
    ],
)
def test_what_timm_cannot_make_is_refused(spec: str, message: str) -> None:
    library("timm")
    with pytest.raises(at.TangentError, match=f"^inspect: .*{message}"):
        loading.load_model(spec)


def test_a_missing_library_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(
        at.TangentError, match=r"--model timm:resnet10t takes timm; pip install 'adaptive-tangents\[integr"
    ):
        loading.load_model("timm:resnet10t")


def test_weights_of_another_timm_network_are_refused_by_the_nearest_differences() -> None:
    timm = library("timm")
    other = timm.create_model("test_vit", pretrained=False)
    with pytest.raises(
        at.TangentError, match=r"does not fit the model: \d+ of its \d+ names are not in the net"
    ) as caught:
        loading.open_series("inspect", model="timm:test_resnet", start=dict(other.state_dict()))
    assert len(str(caught.value)) < 500
    wide = Net(6).state_dict()
    with pytest.raises(at.TangentError, match=r"of another shape: stem.weight \(6, 1, 3, 3\) for \(4, 1, 3, 3\)"):
        loading.as_state(wide, Net(), "inspect")
