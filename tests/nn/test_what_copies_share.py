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
        self.a, self.settings, self.shift = nn.Linear(3, 2), settings, shifted

    def forward(self, x: Tensor) -> Tensor:
        scale = self.factor * self.gains["first"] * self.settings.factor * self.settings.gains["first"]
        return self.shift(scale * self.a(x))


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
    modules = [adaptive, copy.deepcopy(adaptive), at.TangentModule(net, at.Fixed()).double().float().train()]
    before = [module(x) for module in modules]
    change_it(net, monkeypatch)
    changed = net(x)
    torch.testing.assert_close(changed, expected(before[0]))
    for module in modules:
        torch.testing.assert_close(module(x), changed)
        module(x).sum().backward()
    torch.testing.assert_close(net(x), changed)


def test_what_others_change_in_a_class_counts_for_a_module_from_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    x, adaptive = torch.randn(4, 3), at.TangentModule(Net(Settings()), at.Fixed())
    adaptive(x)
    loaded = pickle.loads(pickle.dumps(adaptive))
    before = loaded(x)
    monkeypatch.setattr(Net, "factor", 2.0)
    torch.testing.assert_close(loaded(x), 2 * before)
    assert Net.factor == 2
