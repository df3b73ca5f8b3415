"""Networks and training runs of the experiments: exactly the published protocol, on any device, from one seed."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class SGD:
    """Mini-batch SGD on the mean squared error with momentum, the learning rate falling to 0 along a cosine."""

    epochs: int = 500
    batch_size: int = 100
    learning_rate: float = 0.1
    momentum: float = 0.9


def relu_network(
    widths: tuple[int, ...], names: tuple[str, ...], *, bias: bool, generator: torch.Generator
) -> nn.Sequential:
    """A ReLU network with weights N(0, 2/fan_in) and zero biases, its linear layers called ``names``."""
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


def train(
    model: nn.Module,
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n c"],
    *,
    settings: SGD,
    generator: torch.Generator,
    progress: Callable[[float], None],
) -> list[float]:
    """Train ``model`` in place; the mean squared error of every epoch. ``progress`` hears the fraction done."""
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.learning_rate, momentum=settings.momentum)
    batches = -(-len(x) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * batches)
    losses = []
    for epoch in range(settings.epochs):
        total = 0.0
        for index in torch.split(torch.randperm(len(x), generator=generator), settings.batch_size):
            loss = ((model(x[index]) - y[index]) ** 2).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(index)
        losses.append(total / len(x))
        progress((epoch + 1) / settings.epochs)
    return losses
