"""What a module's copy of the network shares with others, such as classes, stays as its owners leave it, and counts."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at


class Settings:
    """One object that Python's deep copy shares."""

    def __init__(self) -> None:
        self.factor, self.gains = 1.0, {"first": 1.0}

    def __deepcopy__(self, memo: dict[int, object]) -> "Settings":
        return self


def shifted(x: Tensor) -> Tensor:
    """A function without anything of its own, which copies share."""
    return x + getattr(shifted, "by", 0.0)


class Net(nn.Module):
    """A network that reads values from its class, from a base class, from shared settings and from a function."""

    factor = 1.0
    gains = {"first": 1.0}  # noqa: RUF012

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.a, self.end, self.settings, self.shift = nn.Linear(3, 2), nn.Identity(), settings, shifted

    def forward(self, x: Tensor) -> Tensor:
        scale = self.factor * self.gains["first"] * self.settings.factor * self.settings.gains["first"]
        out: Tensor = self.end(self.shift(scale * self.a(x)))
        return out


def doubled(self: Net, x: Tensor) -> Tensor:
    return 2 * self.a(x)


CHANGES: dict[str, tuple[Callable[[Net, pytest.MonkeyPatch], None], Callable[[Tensor], Tensor]]] = {
    "a value of the class": (lambda _, patch: patch.setattr(Net, "factor", 2.0), lambda y: 2 * y),
    "a dict of the class": (lambda _, patch: patch.setattr(Net, "gains", {"first": 2.0}), lambda y: 2 * y),
    "an entry of a dict of the class": (lambda _, patch: patch.setitem(Net.gains, "first", 2.0), lambda y: 2 * y),
    "a method of the class": (lambda _, patch: patch.setattr(Net, "forward", doubled), lambda y: 2 * y),
    "shared settings": (lambda net, patch: patch.setattr(net.settings, "factor", 2.0), lambda y: 2 * y),
    "an entry of shared settings": (
        lambda net, patch: patch.setitem(net.settings.gains, "first", 2.0),
        lambda y: 2 * y,
    ),
    "an attribute of a function": (lambda _, patch: patch.setattr(shifted, "by", 1.0, raising=False), lambda y: y + 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_others_change_in_what_a_copy_shares_counts_and_stays(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_it, expected = CHANGES[change]
    net, x = Net(Settings()), torch.randn(4, 3)
    adaptive = at.TangentModule(net, at.Fixed())
    modules = [
        adaptive,
        copy.deepcopy(adaptive),
        at.TangentModule(net, at.Fixed()).double().float().train(),
    ]
    if "settings" not in change:  # which a pickle holds itself
        modules.append(pickle.loads(pickle.dumps(adaptive)))
    before = [module(x) for module in modules]
    change_it(net, monkeypatch)
    changed = net(x)
    torch.testing.assert_close(changed, expected(before[0]))
    for module in modules:
        torch.testing.assert_close(module(x), changed)
        module(x).sum().backward()
    torch.testing.assert_close(net(x), changed)


def attribute(model: nn.Module) -> None:
    model.factor = 2.0


def module(model: nn.Module) -> None:
    model.end = Double()


def hook(model: nn.Module) -> None:
    model.a.register_forward_hook(lambda _, inputs, out: 2 * out)  # type: ignore[union-attr]


def buffer(model: nn.Module) -> None:
    model.a._buffers.update({name: 2 * value for name, value in model.a._buffers.items()})  # type: ignore[union-attr, operator]


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("change", [attribute, module, hook, buffer])
def test_what_is_changed_in_a_modules_own_copy_counts_from_then_on(change: Callable[[nn.Module], None]) -> None:
    adaptive, x = at.TangentModule(Net(Settings()), at.Fixed()), torch.randn(4, 3)
    before = adaptive.initial(x)
    change(adaptive.model)
    for _ in range(3):
        torch.testing.assert_close(adaptive.initial(x), 2 * before)
        torch.testing.assert_close(adaptive(x).detach(), 2 * before)


class Itself(nn.Linear):
    """A layer that deep copies share."""

    def __deepcopy__(self, memo: dict[int, object]) -> "Itself":
        return self


class Shallow(nn.Linear):
    """A layer whose deep copy shares what holds its parameters."""

    def __deepcopy__(self, memo: dict[int, object]) -> "Shallow":
        return copy.copy(self)


class SameTensor(nn.Parameter):
    """A parameter that deep copies share."""

    def __deepcopy__(self, memo: dict[int, object]) -> "SameTensor":
        return self


def with_same_tensor() -> nn.Module:
    layer = nn.Linear(3, 2)
    layer.weight = SameTensor(torch.randn(2, 3))
    return layer


@pytest.mark.parametrize(
    "make", [lambda: Itself(3, 2), lambda: Shallow(3, 2), with_same_tensor], ids=["self", "dict", "tensor"]
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_model_whose_copies_share_its_parameters_is_refused_and_left_as_it_was(
    make: Callable[[], nn.Module], inside: bool
) -> None:
    model = nn.Sequential(make(), nn.Tanh()) if inside else make()
    before = [(name, parameter.clone(), parameter.requires_grad) for name, parameter in model.named_parameters()]
    message = f"TangentModule: a deep copy of {'.0.' if inside else 'the model'}, of class .*shares its parameters"
    with pytest.raises(at.TangentError, match=message):
        at.TangentModule(model, at.Fixed(), params={name: 2 * value for name, value, _ in before})
    for (name, value, needed), (now, parameter) in zip(before, model.named_parameters(), strict=True):
        assert name == now
        assert torch.equal(value, parameter)
        assert parameter.requires_grad == needed


def test_a_cache_of_what_was_computed_from_parameters_is_refused_and_a_log_of_outputs_is_not() -> None:
    net, x = Net(Settings()), torch.randn(4, 3)
    net.last = net(x)  # nothing reads it
    at.TangentModule(net, at.Fixed())(x)
    net.shift = lambda y, cache=net.a.weight[:, 0] * 2: y + cache  # type: ignore[assignment]
    for call in (at.tangent_features, lambda net, x: at.TangentModule(net, at.Fixed())(x)):
        with pytest.raises(at.TangentError, match="computed from its parameters before this call and kept"):
            call(net, x)
