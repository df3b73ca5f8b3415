"""Peers of the exact models on targets of low rank: a trained network and recursive feature machines.

Both keep a fifth of the samples for validation. The network is the same one of two layers. Adam trains both layers from the
same weights on batches of 50 and fits the change f(x;θ) − f(x;θ₀) to the target; the lowest validation error chooses the
learning rate and the epoch. Recursive feature machines (Radhakrishnan, Beaglehole, Pandit & Belkin, Science 2024) repeat
kernel regression with exp(−(‖x − x′‖_M/s)^q), where M is the average outer product of the gradients. The lowest validation
error chooses q, s (in units of the median distance), ridge and number of repetitions, and the chosen machine is fitted again
to all samples. Their code is the package xrfm, imported when used.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptive_tangents.experiments.training import epoch

RATES = (0.01, 0.03)
BATCH = 50
EXPONENTS, BANDWIDTHS, RIDGES = (1.0, 2.0), (0.5, 1.0, 3.0), (1e-3, 1e-1)
MISSING = "xrfm is not installed: pip install 'adaptive-tangents[peers]'"


@dataclass(frozen=True)
class Samples:
    """Training and test inputs, and one column of targets per problem."""

    x: Float[Tensor, "n d"]
    y: Float[Tensor, "n k"]
    x_test: Float[Tensor, "m d"]
    y_test: Float[Tensor, "m k"]

    @property
    def held_back(self) -> int:
        """The number of samples, the last ones, kept for validation."""
        return max(1, len(self.x) // 5)


def relative_error(found: Float[Tensor, "m k"], wanted: Float[Tensor, "m k"]) -> Float[Tensor, " k"]:
    """‖f − y‖²/‖y‖² of each column.

    >>> relative_error(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [2.0]]))
    tensor([0.8000])
    """
    error: Tensor = ((found - wanted) ** 2).sum(0) / (wanted**2).sum(0)
    return error


def trained_network(
    model: nn.Sequential, samples: Samples, *, epochs: int, patience: int, seed: int
) -> Float[Tensor, " k"]:
    """Relative test error of the trained network on each target, at the rate and epoch of the lowest validation error."""
    runs = [_train(model, samples, rate, epochs, patience, seed) for rate in RATES]
    held, test = (torch.stack(part) for part in zip(*runs, strict=True))
    return test.gather(0, held.argmin(0, keepdim=True))[0].double()


def _train(
    model: nn.Sequential, samples: Samples, rate: float, epochs: int, patience: int, seed: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Train one network per target at once; return each lowest validation error and the test error at its epoch."""
    start_weights = {name: value.detach().float() for name, value in model.named_parameters()}
    first, last = start_weights["0.weight"], start_weights["2.weight"]
    x, y, x_test, y_test = (part.float() for part in (samples.x, samples.y, samples.x_test, samples.y_test))
    count = y.shape[1]
    weights = first.expand(count, -1, -1).clone().requires_grad_()
    readout = last[0].expand(count, -1).clone().requires_grad_()

    def outputs(at: Tensor, w: Tensor, a: Tensor) -> Tensor:
        hidden = torch.relu(at @ w.flatten(0, 1).T).reshape(len(at), *a.shape)
        found: Tensor = (hidden * a).sum(-1)
        return found

    def change(at: Tensor) -> Tensor:
        return outputs(at, weights, readout) - outputs(at, first[None], last)

    start, fitted = outputs(x, first[None], last), len(x) - samples.held_back
    optimizer = torch.optim.Adam([weights, readout], lr=rate, fused=True)
    generator = torch.Generator().manual_seed(seed)
    held, test, when = torch.full((count,), torch.inf), torch.ones(count), torch.zeros(count)

    def loss_of(index: Tensor) -> Tensor:
        # The networks share no parameters, so summing their losses trains each as if alone.
        return ((outputs(x[index], weights, readout) - start[index] - y[index]) ** 2).mean(0).sum()

    for done in range(epochs):
        epoch(loss_of, optimizer, torch.split(torch.randperm(fitted, generator=generator), BATCH))
        with torch.no_grad():
            found = relative_error(change(x[fitted:]), y[fitted:])
            better = found < held
            if bool(better.any()):
                now = relative_error(change(x_test), y_test)
                held, test = torch.where(better, found, held), torch.where(better, now, test)
                when = torch.where(better, float(done), when)
        if done - float(when.max()) >= patience:
            break
    return held, test


def has_machines() -> bool:
    """Whether recursive feature machines are installed."""
    return importlib.util.find_spec("xrfm") is not None


def feature_machines(samples: Samples, *, repetitions: int, seed: int) -> Float[Tensor, " k"]:
    """Relative test error of the chosen recursive feature machine for each target."""
    return torch.cat([_machine(samples, k, repetitions, seed) for k in range(samples.y.shape[1])])


def _machine(samples: Samples, column: int, repetitions: int, seed: int) -> Float[Tensor, " 1"]:
    from xrfm.rfm_src import RFM

    x, x_test = samples.x.float(), samples.x_test.float()
    y, y_test = (part[:, column : column + 1].float() for part in (samples.y, samples.y_test))
    fitted = len(x) - samples.held_back

    def fit(upto: int, repeated: int, setting: tuple[float, float, float], best: bool) -> "RFM":
        exponent, bandwidth, ridge = setting
        machine = RFM("laplace", exponent=exponent, bandwidth=bandwidth, bandwidth_mode="adaptive", device="cpu")
        # The package draws samples for the median distance from torch's global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            machine.fit(
                (x[:upto].clone(), y[:upto].clone()), (x[fitted:].clone(), y[fitted:].clone()), iters=repeated,
                reg=ridge, verbose=False, early_stop_rfm=False, return_best_params=best,
            )  # fmt: skip
        return machine

    found: dict[tuple[tuple[float, float, float], int], float] = {}
    for setting in product(EXPONENTS, BANDWIDTHS, RIDGES):
        machine = fit(fitted, repetitions, setting, best=True)
        # The package returns None for the last repetition.
        repeated = repetitions if machine.best_iter is None else int(machine.best_iter)
        error = float(relative_error(machine.predict(x[fitted:]), y[fitted:]))
        found[setting, repeated] = error if error == error else float("inf")
    setting, repeated = min(found, key=found.__getitem__)
    chosen = fit(len(x), repeated, setting, best=False)
    return relative_error(chosen.predict(x_test), y_test).double()


PEERS: Mapping[str, str] = {
    "Network": "the network itself, trained by Adam with early stopping",
    "RFM": "recursive feature machines",
}
