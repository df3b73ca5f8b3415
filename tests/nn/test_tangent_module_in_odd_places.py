"""A ``TangentModule`` whose state is assigned, that is made in inference mode, or that is run within ``torch.func``."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at


class Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).tanh())
        return out


X = torch.randn(6, 4, generator=torch.manual_seed(3), dtype=torch.float64)


def moved(module: at.TangentModule) -> at.TangentModule:
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("nested", [False, True])
def test_a_state_that_is_assigned_is_that_state_with_the_network_frozen_and_tied(nested: bool) -> None:
    wanted, found = moved(at.TangentModule(Tied(0))), at.TangentModule(Tied(1))
    state = {name: value.clone() for name, value in wanted.state_dict().items()}
    names = [name for name, _ in found.named_parameters()]
    if nested:
        nn.Sequential(found).load_state_dict({f"0.{name}": value for name, value in state.items()}, assign=True)
    else:
        found.load_state_dict(state, assign=True)
    assert torch.equal(found(X), wanted(X))
    assert [name for name, _ in found.named_parameters()] == names
    buffers = dict(found.named_buffers(remove_duplicate=False))
    assert buffers["model.first.weight"] is buffers["model.second.weight"]
    assert not any(buffer.requires_grad for buffer in buffers.values())
    assert torch.equal(found.features(X).kernel(), wanted.features(X).kernel())
    for module in (found, wanted):
        (module(X) ** 2).sum().backward()
    for one, other in zip(found.parameters(), wanted.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("where", ["module", "network", "both"])
def test_made_in_inference_mode_it_trains_outside(where: str) -> None:
    with torch.inference_mode(where != "module"):
        network = Tied(0)
    with torch.inference_mode(where != "network"):
        module = at.TangentModule(network)
        assert torch.is_inference_mode_enabled() == (where != "network")
    moved(module)
    assert torch.equal(module(X), moved(at.TangentModule(Tied(0)))(X))
    (module(X) ** 2).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize(
    "call",
    [
        lambda module: torch.func.vmap(lambda x: module(x[None])[0])(X),
        lambda module: torch.func.grad(lambda p: torch.func.functional_call(module, p, (X,)).sum())(
            dict(module.named_parameters())
        ),
        lambda module: at.tangent_features(module, X),
    ],
)
def test_within_torch_func_it_says_what_to_use(call: Any) -> None:
    module = at.TangentModule(Tied(0))
    with pytest.raises(
        at.TangentError, match=r"TangentModule: it takes derivatives itself, .* use autograd, and adapted_f"
    ):
        call(module)
    assert module(X).shape == (6, 4)
