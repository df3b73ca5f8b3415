"""A forecast from a start that is not the network's present state."""

import torch
from torch import nn

from adaptive_tangents.inspection.foretold import run_forecast
from adaptive_tangents.inspection.problem import InspectConfig
from adaptive_tangents.loading import Data


def test_the_network_has_its_own_values_again_and_the_forecast_begins_at_the_start() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    own = {name: value.clone() for name, value in network.state_dict().items()}
    start = {name: value * 1.5 for name, value in own.items()}
    x = torch.randn(24, 3)
    config = InspectConfig(samples=12, fit_operations=1.0)
    found = run_forecast(network, start, Data(x, (x[:, 0] > 0).long()), config, steps=1)
    assert all(torch.equal(value, own[name]) for name, value in network.state_dict().items())
    network.load_state_dict(start)
    other = run_forecast(network, start, Data(x, (x[:, 0] > 0).long()), config, steps=1)
    assert found.results["forecast"]["initial_loss"] == other.results["forecast"]["initial_loss"]
