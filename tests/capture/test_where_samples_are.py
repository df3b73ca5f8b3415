"""Wherever a network keeps its samples, every batch, tile and chunk gives the features that autograd gives."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
import reference
from adaptive_tangents.capture.batches import samples, take
from adaptive_tangents.capture.capture import Capture
from cases import Forward, normal

TOKENS = 4


class TokensFirst(nn.Module):
    """The default order of torch's transformer layers: (tokens, samples, units)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.out(self.layer(x.transpose(0, 1)).mean(0))
        return made


class UnitsFirst(nn.Module):
    """Samples in columns, as in papers: W₂ tanh(W₁X + b1ᵀ)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(TOKENS, 5))
        self.shift = nn.Parameter(torch.randn(TOKENS, 1))
        self.second = nn.Parameter(torch.randn(2, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        return (self.second @ (self.first @ x.mT + self.shift).tanh()).mT


class UsedTwice(nn.Module):
    """One layer on the mean of a sample's tokens and, with a small weight, on each token, tokens first."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.layer, self.weight = nn.Linear(4, 3), weight

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x.mean(1)).tanh() + self.weight * self.layer(x.transpose(0, 1)).tanh().sum(0)
        return made


def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    made = {"tokens first": TokensFirst, "units first": UnitsFirst, "used twice": lambda: UsedTwice(0.1)}[name]()
    return made.double().eval(), (5,) if name == "units first" else (TOKENS, 4)


@functools.cache
def two_batches(name: str, n: int, m: int) -> tuple[nn.Module, Tensor, Tensor, np.ndarray]:
    """A network, batches of n and m samples, and the kernel of their Jacobians."""
    model, shape = network(name)
    x, x2 = normal(n, *shape) + 1, normal(m, *shape) + 1
    return model, x, x2, reference.kernel(reference.jacobian(model, x), reference.jacobian(model, x2))


NAMES = ("tokens first", "units first", "used twice")
every_network = pytest.mark.parametrize("name", [pytest.param(k, marks=pytest.mark.xdist_group(k)) for k in NAMES])


# Each network takes every pair of sizes with a size of tiles in turn, so that all tiles come with each network.
SIZES, TILES = [(8, 4), (4, 8), (2, 4), (7, 2), (2, 7), (8, 1), (1, 8), (12, 3), (4, 4)], (None, 1, 3, 4)
BATCHES = [
    pytest.param(name, n, m, TILES[(i + k) % 4], marks=pytest.mark.xdist_group(name))
    for i, name in enumerate(NAMES)
    for k, (n, m) in enumerate(SIZES)
]


@pytest.mark.parametrize(("name", "n", "m", "tile"), BATCHES)
def test_a_kernel_of_two_batches_of_any_sizes_is_the_product_of_their_jacobians(
    name: str, n: int, m: int, tile: int | None
) -> None:
    model, x, x2, expected = two_batches(name, n, m)
    found = at.tangent_kernel(model, x, x2, tile=tile).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * abs(expected).max())


@every_network
@pytest.mark.parametrize(("n", "m"), [(20, 4), (2, 4), (7, 2)])
def test_a_stored_kernel_of_two_batches_is_the_product_of_their_jacobians(
    name: str, n: int, m: int, tmp_path: Path
) -> None:
    model, x, x2, expected = two_batches(name, n, m)
    store = at.kernel_to_store(model, x, x2=x2, path=tmp_path / "K", outputs="full", tile=4)
    np.testing.assert_allclose(store.read().numpy(), expected, rtol=0, atol=1e-11 * abs(expected).max())


@every_network
@pytest.mark.parametrize("n", [2, TOKENS, 7, 20])
def test_parts_of_a_batch_have_its_features_at_other_parameters_too_where_nothing_is_checked_again(
    name: str, n: int
) -> None:
    model, shape = network(name)
    x = normal(n, *shape) + 1
    capture = Capture("test", model, x, None, None, None, None)
    moved = {key: value + 0.1 for key, value in model.state_dict().items()}
    expected = reference.jacobian(model, x, state=moved)
    there = capture.at(moved)
    for index in (slice(0, k) for k in (1, 2, 3, TOKENS, 7)):
        part = take(x, index)
        found = there.features(part).dense().numpy()
        np.testing.assert_allclose(
            found, expected[index], rtol=0, atol=1e-11 * abs(expected).max(), err_msg=str(samples(part))
        )


@pytest.mark.parametrize("weight", [1.0, 0.1, 0.01, 0.002])
def test_a_use_of_small_weight_has_its_samples_where_they_are_in_float32_too(weight: float) -> None:
    torch.manual_seed(0)
    model = UsedTwice(weight)
    x = normal(7, 7, 4).float()
    expected = reference.jacobian(model.double(), x.double())
    found = at.tangent_features(model.float(), x).dense().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize("away", [0.0, 30.0, 1000.0])
def test_inputs_far_from_zero_have_their_samples_where_they_are_in_float32_too(away: float) -> None:
    torch.manual_seed(0)
    model = Forward(lambda m, x: m.net(x.transpose(0, 1)).mean(0), net=nn.Linear(4, 3))
    x = normal(7, 7, 4) + away
    expected = reference.jacobian(model.double(), x)
    found = at.tangent_features(model.float(), x.float()).dense().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * abs(expected).max())
