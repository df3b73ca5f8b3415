"""Calls within ``torch.inference_mode``: as outside of it, and the mode ends where the user leaves it."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 12)).double()
X = torch.randn(20, 3, dtype=torch.float64)
Y = torch.randn(20, 12, dtype=torch.float64)


class Raises(nn.Module):
    def __init__(self, kind: type[Exception]) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        raise self.kind("own")


CALLS: dict[str, Callable[[Any, Tensor], object]] = {
    "tangent_features": at.tangent_features,
    "tangent_kernel": at.tangent_kernel,
    "Tracker": lambda model, x: at.Tracker(model, x).record(),
    "forecast": lambda model, x: at.forecast(model, x, Y[:, :2]),
}


@pytest.mark.parametrize("kind", [KeyError, RuntimeError, StopIteration])
@pytest.mark.parametrize("name", CALLS)
def test_an_error_of_the_model_leaves_the_process_out_of_the_mode(name: str, kind: type[Exception]) -> None:
    kinds = (KeyError, RuntimeError, StopIteration, at.TangentError)
    with pytest.raises(kinds), torch.inference_mode():
        CALLS[name](Raises(kind), X.float())
    gc.collect()  # the traceback holds all that was on the way
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert nn.Linear(2, 1)(torch.ones(1, 2)).requires_grad


WITHIN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "forecast": lambda x, y: at.forecast(MODEL, x, y, steps=2).kernels(x[:4], outputs="trace").final,
    "inspect": lambda x, y: torch.as_tensor(
        at.inspect(
            MODEL, {name: 2 * value for name, value in MODEL.state_dict().items()}, data=(x, y), nodes=2
        ).kernels["end"]
    ),
    "Tracker along directions": lambda x, y: torch.tensor(at.Tracker(MODEL, x, y, outputs=3).record().whole.trace),  # type: ignore[union-attr]
    "average_features": lambda x, y: at.average_features(
        MODEL, {name: 2 * value for name, value in MODEL.state_dict().items()}, MODEL.state_dict(), x
    ).kernel(outputs="trace"),
}


@pytest.mark.filterwarnings("ignore:inspect. mse rises")
@pytest.mark.parametrize("own", [False, True], ids=["tensors from outside", "tensors made in the mode"])
@pytest.mark.parametrize("name", WITHIN)
def test_numbers_are_those_outside_of_the_mode(name: str, own: bool) -> None:
    wanted = WITHIN[name](X, Y)
    with torch.inference_mode():
        found = WITHIN[name](X.clone() if own else X, Y.clone() if own else Y)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(wanted))
