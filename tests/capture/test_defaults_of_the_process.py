"""Whatever dtype and device torch makes tensors with by default, calls give the same, and their checks stay as sharp."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
from adaptive_tangents.capture.derivatives import signs


def normal(*shape: int) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator("cpu").manual_seed(len(shape)), dtype=torch.float32, device="cpu"
    )


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))


MODEL, X, Y = network(), normal(12, 5), normal(12, 2)
START = {name: value.clone() for name, value in MODEL.state_dict().items()}
END = {name: 1.1 * value for name, value in START.items()}


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.square().detach()


def feats() -> at.TangentFeatures:
    return at.tangent_features(MODEL, X)


def trace() -> Tensor:
    return at.tangent_kernel(MODEL, X, outputs="trace")


CALLS: dict[str, Callable[[Path], Any]] = {
    "tangent_kernel": lambda _: at.tangent_kernel(MODEL, X),
    "in parts": lambda _: at.tangent_kernel(MODEL, normal(40, 5), memory_limit=1_000_000),
    "average_features": lambda _: at.average_features(MODEL, START, END, X).kernel(),
    "fit": lambda _: at.fit(feats(), Y, ridge=0.1).predict(feats()),
    "fit of classes": lambda _: at.fit(
        feats(), Y.argmax(1), loss="cross-entropy", ridge=0.1, offset=MODEL(X).detach()
    ).predict(feats()),
    "fit of rows": lambda _: at.fit(feats(), Y, structure=at.Rows(), ridge=0.1).predict(feats()),
    "interpolation": lambda _: at.fit(feats(), Y, structure=at.Left()).predict(feats()),
    "explain": lambda _: at.explain(feats(), at.average_features(MODEL, START, END, X)).total,
    "sketch_features": lambda _: at.sketch_features(MODEL, X, at.Sketch(dim=64)).kernel(),
    "kernel_regression": lambda _: at.kernel_regression(trace(), Y[:, 0], ridge=0.1).predict(trace()),
    "alignment": lambda _: at.alignment(trace(), Y[:, 0]),
    "effective_rank": lambda _: at.effective_rank(trace()),
    "TangentModule": lambda _: at.TangentModule(MODEL, at.TwoSided())(X).detach(),
    "forecast": lambda _: at.forecast(MODEL, X, Y, steps=1).kernels(X).average,
    "kernel_to_store": lambda folder: at.kernel_to_store(MODEL, X, folder, tile=5).read(),
    "inspect": lambda _: at.inspect(MODEL, END, START, (X, Y), quick=True).findings[0],
    "Tracker": lambda _: {g: v for g, v in at.Tracker(MODEL, X, Y).record().__dict__.items() if g == "alignment"},
}


@pytest.fixture
def defaults() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_the_same_whatever_the_default_device_and_dtype(name: str, tmp_path: Path, defaults: None) -> None:
    true = CALLS[name](tmp_path / "0.zarr")
    for k, change in enumerate(
        (lambda: torch.set_default_device("meta"), lambda: torch.set_default_dtype(torch.float64)), 1
    ):
        change()  # what is made on meta by mistake has no numbers
        found = CALLS[name](tmp_path / f"{k}.zarr")
        torch.set_default_device(None)
        if isinstance(true, Tensor):
            assert found.dtype == true.dtype
            assert found.device == true.device
            torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-6)
        else:
            assert found == pytest.approx(true) if isinstance(true, float) else str(found) == str(true)


def test_checks_are_as_sharp_after_many_calls_with_float64_by_default(defaults: None) -> None:
    """Directions of the checks were once scaled in place where they were made in float64, and vanished from call to call."""
    torch.set_default_dtype(torch.float64)
    signs.cache_clear()
    detached = nn.Sequential(nn.Linear(5, 4, bias=False), Detached())
    for _ in range(40):
        at.tangent_kernel(nn.Linear(5, 4, bias=False), torch.randn(8, 5))  # no warning, which would be an error
    with pytest.warns(at.TangentWarning, match="do not change with .* as autograd's gradient says"):
        at.tangent_kernel(detached, torch.randn(8, 5))
    assert all(bool((signs(size, side).abs() == 1).all()) for size in range(1, 9) for side in (0, 1))
    signs.cache_clear()
    torch.set_default_dtype(torch.float32)
