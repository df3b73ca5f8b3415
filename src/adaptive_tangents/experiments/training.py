"""Networks and training of the experiments: exactly the published protocol, on any device, from one seed."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn


@runtime_checkable
class MiniBatches(Protocol):
    """Mini-batch training: epochs, batch size and optimizer."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...

    def over(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer for all parameters of the model."""


@dataclass(frozen=True)
class SGD:
    """Mini-batch SGD with momentum."""

    epochs: int = 500
    batch_size: int = 100
    learning_rate: float = 0.1
    momentum: float = 0.9

    def over(self, model: nn.Module) -> torch.optim.Optimizer:
        """SGD for all parameters of the model."""
        return torch.optim.SGD(model.parameters(), lr=self.learning_rate, momentum=self.momentum)


def relu_network(
    widths: tuple[int, ...], names: tuple[str, ...], *, bias: bool, generator: torch.Generator
) -> nn.Sequential:
    """A ReLU network with weights N(0, 2/fan_in) and zero biases; ``names`` are those of its linear layers."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for k, name in enumerate(names):
        layer = nn.Linear(widths[k], widths[k + 1], bias=bias)
        with torch.no_grad():
            layer.weight.normal_(0, (2 / widths[k]) ** 0.5, generator=generator)
            if bias:
                layer.bias.zero_()
        layers[name] = layer
        if k + 1 < len(names):
            layers[f"relu{k + 1}"] = nn.ReLU()
    return nn.Sequential(layers)


def epoch(
    loss_of: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Tensor],
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> float:
    """Take one optimizer step per batch of indices; return the sum of all samples' losses."""
    total = 0.0
    for index in batches:
        loss = loss_of(index)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward([loss])
        optimizer.step()
        if schedule is not None:
            schedule.step()
        total += loss.item() * len(index)
    return total


def train(
    model: nn.Module,
    x: Float[Tensor, "n ..."],
    y: Float[Tensor, "n c"],
    *,
    settings: MiniBatches,
    generator: torch.Generator,
    progress: Callable[[float], None],
) -> list[float]:
    """Train ``model`` in place with a cosine learning rate schedule to 0; return every epoch's mean squared error.

    ``progress`` is called with the fraction done.
    """
    optimizer = settings.over(model)
    batches = -(-len(x) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * batches)
    losses: list[float] = []

    def loss_of(index: Tensor) -> Tensor:
        loss: Tensor = ((model(x[index]) - y[index]) ** 2).mean()
        return loss

    for done in range(settings.epochs):
        order = torch.randperm(len(x), generator=generator)
        losses.append(epoch(loss_of, optimizer, torch.split(order, settings.batch_size), schedule) / len(x))
        progress((done + 1) / settings.epochs)
    return losses
