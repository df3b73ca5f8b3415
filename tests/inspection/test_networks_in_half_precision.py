"""Networks in bfloat16 and float16 are inspected and foretold, and amounts are not rounded to their precision."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
from adaptive_tangents.inspection import InspectConfig
from adaptive_tangents.inspection.foretold import run_forecast
from adaptive_tangents.loading import Data, fit_data

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0)).bfloat16().float()


def network(outputs: int, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs)).to(dtype).eval()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    end = {name: value + 0.5 * torch.randn_like(value) for name, value in start.items()}
    return model, start, end


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["main", "all", "margin"])
def test_a_network_in_half_precision_is_inspected_as_in_full(dtype: torch.dtype, how: str, tmp_path: Path) -> None:
    model, start, end = network(3, dtype)
    y = torch.func.functional_call(model, end, (X.to(dtype),)).argmax(1)
    found = at.inspect(model, start, end, (X, y), nodes=2, outputs=how)
    wide, first, last = (
        model.double(),
        *({name: value.double() for name, value in state.items()} for state in (start, end)),
    )
    direct = at.inspect(wide, first, last, (X, y), nodes=2, outputs=how)
    rounding = 4 * torch.finfo(dtype).eps
    assert found.results["growth"]["final"] == pytest.approx(direct.results["growth"]["final"], rel=rounding)
    for name in ("outputs.start", "outputs.end"):
        assert found.arrays[name] == pytest.approx(direct.arrays[name], abs=rounding)
    assert {array.dtype.name for array in found.arrays.values()} <= {"float32", "float64", "int64"}
    if how == "main":
        found.save(tmp_path / "out")


def test_amounts_keep_their_digits_beside_a_network_in_bfloat16() -> None:
    model, start, end = network(1, torch.bfloat16)
    y = 1000 + X[:, 0].double()
    found = at.inspect(model, start, end, (X, y), nodes=1)
    assert np.array_equal(found.arrays["y"], y.numpy())
    assert np.array_equal(found.arrays["target"][:, 0], y.numpy())
    f = found.arrays["outputs.end"][:, 0].astype(float)
    assert found.results["performance"]["end"] == {
        "mse": pytest.approx(float(((f - y.numpy()) ** 2).mean()), rel=1e-12)
    }
    assert fit_data(Data(X, y), model).x.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_a_network_in_bfloat16_is_foretold() -> None:
    model, start, end = network(1, torch.bfloat16)
    data = Data(X, 3 + X[:, :1].double())
    found = run_forecast(model, start, data, InspectConfig(nodes=1), end=end, steps=1)
    assert found.results["forecast"]["steps"]
    assert found.arrays["y"].dtype == np.float64


def test_losses_of_amounts_are_measured_in_the_networks_precision() -> None:
    model, start, end = network(2, torch.float32)
    y = torch.func.functional_call(model, end, (X,)).detach().double() + 0.1 * X[:, :2].double()
    found = at.inspect(model, start, end, (X, y), output="loss", nodes=1)
    for when, state in (("start", start), ("end", end)):
        f = torch.func.functional_call(model, state, (X,)).detach()
        wanted = float((f - y).square().mean())
        assert found.results["performance"][when]["loss"] == pytest.approx(wanted, rel=1e-5)
    assert found.arrays["outputs.end"].dtype == np.float32
