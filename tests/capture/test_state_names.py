"""State dicts as training scripts leave them are taken as params=; those of another network are refused by near names."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
from adaptive_tangents.capture.state_names import fitted


class Tied(nn.Module):
    """A head that shares its weight with the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Linear(4, 4)
        self.head.weight = self.body[0].weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().eval()


def moved(model: nn.Module) -> dict[str, Tensor]:
    return {k: v + 0.5 if v.is_floating_point() else v for k, v in model.state_dict().items()}


FORMS: dict[str, Any] = {
    "plain": lambda s: s,
    "of DataParallel": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "of Lightning": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "epoch": 3},
    "of a script": lambda s: {"model_state_dict": s, "optimizer": {"state": {}}},
    "three deep": lambda s: {"model": {f"module._orig_mod.net.{k}": v for k, v in s.items()}},
    "compiled within": lambda s: {f"net.{k[0]}._orig_mod{k[1:]}": v for k, v in s.items()},
    "beside a loss's weights": lambda s: {f"net.{k}": v for k, v in s.items()} | {"loss.weight": torch.ones(2)},
}


@pytest.mark.parametrize("form", FORMS)
def test_params_may_have_the_form_that_training_saved(form: str) -> None:
    model, x = network(), torch.randn(5, 3, dtype=torch.float64)
    state = moved(model)
    wanted = at.tangent_features(model, x, params=state).dense()
    found = at.tangent_features(model, x, params=FORMS[form](state)).dense()
    assert torch.equal(found, wanted)
    assert not torch.equal(found, at.tangent_features(model, x).dense())


def test_every_call_that_takes_a_state_dict_takes_one_with_a_prefix(tmp_path: Any) -> None:
    model, x = network(), torch.randn(5, 3, dtype=torch.float64)
    start, end = dict(model.state_dict()), moved(model)
    end |= {k: v for k, v in start.items() if "running" in k}
    wrapped = FORMS["of Lightning"](end)
    pairs = [
        (at.tangent_kernel(model, x, params=given) for given in (end, wrapped)),
        (at.average_features(model, {"model": start}, given, x, nodes=2).dense() for given in (end, wrapped)),
        (at.TangentModule(model, params=given)(x) for given in (end, wrapped)),
        (
            at.kernel_to_store(model, x, tmp_path / str(k), params=given, dtype=torch.float64).read()
            for k, given in enumerate((end, wrapped))
        ),
    ]
    for one, other in pairs:
        assert torch.equal(one, other)


def test_a_model_with_a_prefix_takes_a_state_dict_without() -> None:
    inner = network()
    outer = nn.ModuleDict({"net": inner})
    found = fitted("call", inner.state_dict(), outer)
    assert found.keys() == outer.state_dict().keys()


@pytest.mark.parametrize("kept", ["body.0.weight", "head.weight"])
def test_of_tied_tensors_one_is_enough(kept: str) -> None:
    model, x = Tied().double(), torch.randn(5, 4, dtype=torch.float64)
    state = moved(model)
    wanted = at.tangent_features(model, x, params=state).dense()
    lost = ({"body.0.weight", "head.weight"} - {kept}).pop()
    given = {k: v for k, v in state.items() if k != lost}
    assert torch.equal(at.tangent_features(model, x, params=given).dense(), wanted)


def refused(params: Mapping[str, Any], message: str) -> None:
    with pytest.raises(at.TangentError, match=message):
        at.tangent_features(network(), torch.randn(5, 3, dtype=torch.float64), params=params)


def test_two_networks_in_one_state_dict_are_refused() -> None:
    state = network().state_dict()
    both = {f"{who}.{k}": v for who in ("student", "teacher") for k, v in state.items()}
    refused(both, r"^tangent_features: the state dict holds several networks.*begin student\., teacher\.; keep")


def test_a_mapping_without_a_state_dict_is_refused() -> None:
    refused(
        {"epoch": 3}, r"holds keys epoch, not tensors by name.*'state_dict' or 'model'.*; pass model.state_dict\(\)"
    )
    refused({}, "holds nothing, not tensors by name")


def test_another_architecture_is_refused_by_counts_and_the_nearest_names() -> None:
    deep = nn.Sequential(*(nn.Linear(3, 3) for _ in range(9))).double()
    other = {
        f"layers.{k}.fc.{part}": torch.zeros(shape, dtype=torch.float64)
        for k in range(9)
        for part, shape in (("weight", (3, 4)), ("bias", (3,)))
    }
    message = (
        r"the state dict does not fit the model: 18 of its 18 names are not in the network; 18 of the network's 18 are "
        r"missing; the nearest are layers\.\d\.fc\.bias \(3,\) for \d\.\w+ \(3,.*\); pass a state dict of this architecture"
    )
    with pytest.raises(at.TangentError, match=message) as caught:
        at.tangent_features(deep, torch.randn(4, 3, dtype=torch.float64), params=other)
    assert len(str(caught.value)) < 400


def test_a_few_differences_are_named_one_by_one() -> None:
    state = dict(network().state_dict())
    lost = {k: v for k, v in state.items() if k != "2.bias"} | {"2.offset": state["2.bias"]}
    refused(lost, r"missing 2.bias; unknown 2.offset; the nearest are 2.offset \(2,\) for 2.bias \(2,\); pass")
