"""Networks whose own ``state_dict`` gives other names, or leaves parameters out, as wrappers and frozen backbones do."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at


class Renamed(nn.Sequential):
    """Every name has a prefix in its state dict."""

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return {f"net:{name}": value for name, value in super().state_dict(*args, **options).items()}


class HeadAlone(nn.Sequential):
    """Only the last layer is in its state dict."""

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return {name: value for name, value in super().state_dict(*args, **options).items() if name.startswith("2.")}


OWN = pytest.mark.parametrize("kind", [Renamed, HeadAlone])


def network(kind: type[nn.Sequential]) -> nn.Sequential:
    torch.manual_seed(0)
    return kind(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def task() -> tuple[Tensor, Tensor]:
    x = torch.randn(40, 3, generator=torch.manual_seed(1), dtype=torch.float64)
    return x, x[:, :1] * x[:, 1:2] + x[:, 2:]


def plain(model: nn.Sequential) -> nn.Sequential:
    """The same network with the state dict of every module."""
    return nn.Sequential(*copy.deepcopy(model))


@OWN
def test_a_forecast_is_that_of_the_same_network_with_a_state_dict_as_usual(kind: type[nn.Sequential]) -> None:
    model, (x, y) = network(kind), task()
    told, usual = (at.forecast(each, x, y, steps=2) for each in (model, plain(model)))
    assert told.steps
    assert [step.loss for step in told.steps] == [step.loss for step in usual.steps]
    assert set(model.state_dict()) <= set(told.params)
    torch.testing.assert_close(told.change, usual.change, rtol=1e-12, atol=1e-12)
    found, wanted = told.kernels(x[:6]), usual.kernels(x[:6])
    torch.testing.assert_close(found.final, wanted.final, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.average, wanted.average, rtol=1e-12, atol=1e-12)


def test_features_at_a_state_dict_of_other_names_are_those_at_its_values() -> None:
    model, (x, _) = network(Renamed), task()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    before = at.tangent_kernel(model, x[:6])
    with torch.no_grad():
        model[0].weight.add_(0.3)
    torch.testing.assert_close(at.tangent_features(model, x[:6], params=start).kernel(), before)
    assert not torch.allclose(at.tangent_kernel(model, x[:6]), before)
    assert at.average_features(model, start, model.state_dict(), x, tol=1e-6).error < 1e-6


@OWN
def test_an_inspection_sees_all_of_a_module_that_is_given_as_the_start(kind: type[nn.Sequential]) -> None:
    start, (x, _) = network(kind), task()
    end = copy.deepcopy(start)
    with torch.no_grad():
        end[0].weight.add_(0.3)
        end[2].weight.add_(0.2)
    found, usual = at.inspect(end, start, data=x), at.inspect(plain(end), plain(start), data=x)
    for stage in ("start", "end"):
        torch.testing.assert_close(*(torch.as_tensor(each.kernels[stage]) for each in (found, usual)))
    for one, other in zip(found.blocks, usual.blocks, strict=True):
        assert one["change_norm"] == other["change_norm"] > 0


def test_a_state_dict_that_leaves_parameters_out_is_no_start() -> None:
    model, (x, _) = network(HeadAlone), task()
    start = {name: value + 0.1 for name, value in model.state_dict().items()}
    with pytest.raises(at.TangentError, match=r"^inspect: start does not fit the model: missing 0\.weight, 0\.bias"):
        at.inspect(model, start, data=x)
