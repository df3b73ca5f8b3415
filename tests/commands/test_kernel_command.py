"""``adaptive-tangents kernel``: from files to a store, with a plan first, and resumable after an interruption."""

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import adaptive_tangents as at
from adaptive_tangents import cli
from adaptive_tangents.runtime.memory import parse_bytes
from adaptive_tangents.storage.store import KernelStore
from stored import data, files, network

runner = CliRunner()
FACTORY = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

class Several(nn.Sequential):
    def forward(self, x):
        return super().forward(x), x

def several():
    return Several(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

class Images(Several):
    def forward(self, x):
        return super().forward(x)[0][:, :, None] * x[:, None]

def images():
    return Images(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "factory_of_kernels.py").write_text(FACTORY)
    torch.save(network().float().state_dict(), tmp_path / "weights.pt")
    np.savez(tmp_path / "data.npz", x=data(9).numpy(), y=np.zeros(9))
    np.savez(tmp_path / "other.npz", x=data(5, seed=1).numpy())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    return tmp_path


def kernel(*options: str, out: str = "K.zarr") -> Result:
    given = ["kernel", "--model", "factory_of_kernels.py:make", "--weights", "weights.pt", "--data", "data.npz"]
    return runner.invoke(cli.app, [*given, "--out", out, *options])


def test_the_command_makes_the_store_that_the_call_makes(folder: Path) -> None:
    done = kernel("--tile", "4", "--memory-limit", "1GB")
    assert done.exit_code == 0, done.output
    assert "kernel 9 × 3 × 9 × 3 (full, float32)" in done.output
    assert f"Kernel: {folder / 'K.zarr'}" in done.output
    model, x = network().float(), data(9).float()
    made = at.kernel_to_store(model, x, folder / "call.zarr", tile=4, memory_limit=10**9)
    assert files(folder / "K.zarr") == files(made.path)


def test_the_output_of_a_network_that_returns_several_is_the_first_as_for_inspect(folder: Path) -> None:
    done = kernel("--model", "factory_of_kernels.py:several", "--tile", "4", "--memory-limit", "1GB")
    assert done.exit_code == 0, done.output
    made = at.open_kernel(folder / "K.zarr").read()
    assert torch.equal(made, at.tangent_kernel(network().float(), data(9).float(), tile=4))


def test_options_reach_the_kernel(folder: Path) -> None:
    done = kernel("--data2", "other.npz", "--outputs", "full", "--by-block", "--wrt", "2.*", "--float64")
    assert done.exit_code == 0, done.output
    store = at.open_kernel(folder / "K.zarr")
    assert (store.n, store.m, store.outputs, store.blocks, store.dtype) == (9, 5, "full", ("2",), torch.float64)
    model, x, x2 = network().float().double(), data(9).float().double(), data(5, seed=1).float().double()
    torch.testing.assert_close(store.read(block="2"), at.tangent_kernel(model, x, x2, wrt="2.*"))


def test_a_plan_is_printed_and_nothing_is_made(folder: Path) -> None:
    done = kernel("--plan", "--tile", "4")
    assert done.exit_code == 0, done.output
    assert "6 tiles of 4 samples a side" in done.output
    assert "about" in done.output
    assert not (folder / "K.zarr").exists()


def test_an_interruption_says_how_to_go_on_and_resume_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = KernelStore.write, []

    def interrupted(self: KernelStore, place: tuple[int, int], kernels: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(place)
        write(self, place, kernels)

    with monkeypatch.context() as patch:
        patch.setattr(KernelStore, "write", interrupted)
        done = kernel("--tile", "4")
    assert done.exit_code == 130
    assert "interrupted; the same command with --resume makes the missing tiles" in done.output
    refused = kernel("--tile", "4")
    assert refused.exit_code == 1
    assert "already, incomplete; continue it with resume=True (--resume)" in refused.output
    done = kernel("--tile", "4", "--resume")
    assert done.exit_code == 0, done.output
    assert at.open_kernel(folder / "K.zarr").complete


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory-limit", "lots"), "kernel: a memory limit is a number of bytes such as 4GB or 500MB, got 'lots'"),
        (("--outputs", "sum"), "kernel: outputs is 'full', 'trace' or 'diagonal', got 'sum'"),
        (("--data2", "gone.npz"), "kernel: there is no data file gone.npz"),
        (("--weights", "gone.pt"), "kernel: there is no checkpoint gone.pt"),
        (("--model", "gone.py:make"), "kernel: there is no file gone.py"),
        (("--device", "abacus"), "kernel: device 'abacus' cannot be used here; use --device cpu"),
        (
            ("--data", "wide.npz"),
            "kernel: the network cannot take the samples of wide.npz, each (9,) float32 (RuntimeError",
        ),
        (
            ("--data2", "wide.npz"),
            "kernel: the network cannot take the samples of wide.npz, each (9,) float32 (RuntimeError",
        ),
        (
            ("--model", "factory_of_kernels.py:images"),
            "kernel: the network's output has shape (7, 3, 6), expected (n, c), one row per sample; write a factory",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_words(folder: Path, options: tuple[str, ...], message: str) -> None:
    np.savez(folder / "wide.npz", x=np.zeros((4, 9)))
    done = kernel(*options)
    assert done.exit_code == 1
    assert message in done.output
    assert not (folder / "K.zarr").exists()


def test_a_sketch_is_what_sketched_features_give(folder: Path) -> None:
    done = kernel("--sketch", "40", "--seed", "3")
    assert done.exit_code == 0, done.output
    store, sketch = at.open_kernel(folder / "K.zarr"), at.Sketch(40, seed=3)
    assert store.meta["sketch"] == sketch.describe()
    made = sketch.apply(at.tangent_features(network().float(), data(9).float()))
    torch.testing.assert_close(store.read(), made.kernel())


def test_a_sketch_of_too_few_coordinates_is_refused(folder: Path) -> None:
    done = kernel("--sketch", "3")
    assert (done.exit_code, "Sketch: dim = 3 leaves" in done.output) == (1, True)
    assert not (folder / "K.zarr").exists()


@pytest.mark.parametrize(
    ("text", "count"), [("4GB", 4 * 10**9), ("1.5 mb", 1_500_000), ("2KiB", 2048), ("700", 700), ("3GiB", 3 * 2**30)]
)
def test_memory_is_written_as_people_write_it(text: str, count: int) -> None:
    assert parse_bytes("kernel", text) == count


@pytest.mark.parametrize("text", ["", "0", "GB", "4 XB", "-1GB", "0.1 bytes", "1e9"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(
        at.TangentError, match=r"^kernel: a memory limit is a number of bytes such as 4GB or 500MB, got"
    ):
        parse_bytes("kernel", text)


def test_the_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[bool] = []
    monkeypatch.setattr(cli, "app", lambda: ran.append(True))
    runpy.run_module("adaptive_tangents", run_name="__main__")
    assert ran == [True]
