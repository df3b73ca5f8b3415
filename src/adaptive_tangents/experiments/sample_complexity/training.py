"""Networks of sample-complexity, the models made from them, and training with early stopping.

As in the code published with the paper: weights from a normal distribution of variance 1/fan_in truncated at two standard
deviations, zero initial biases, mean cross-entropy, pixels/255.
"""

import math
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.training import epoch
from adaptive_tangents.nn.tangent_module import TangentModule
from adaptive_tangents.structures.base import Fixed
from adaptive_tangents.structures.modes import Modes

Model = Literal["fixed", "adaptive", "network"]
MODELS: tuple[Model, ...] = ("fixed", "adaptive", "network")
_CUT = 2.0  # standard deviations
_SHRUNK = 0.87962566103423978  # the standard deviation of a standard normal distribution truncated there
_CHUNK = 2000


@dataclass(frozen=True)
class Recipe:
    """The training of a data set's three models: batches of 50, or 25 if an epoch has fewer than 250 samples."""

    adam: bool
    learning_rate: float
    momentum: float = 0.9
    batch_size: int = 50
    few: int = 250

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """SGD with momentum, or Adam with the momentum as β₁."""
        if self.adam:
            return torch.optim.Adam(model.parameters(), lr=self.learning_rate, betas=(self.momentum, 0.999))
        return torch.optim.SGD(model.parameters(), lr=self.learning_rate, momentum=self.momentum)

    def batch(self, n: int) -> int:
        """The number of samples per batch."""
        return self.batch_size if n >= self.few else self.batch_size // 2


def recipe(shape: tuple[int, ...]) -> Recipe:
    """The published recipe for gray or for color images."""
    return Recipe(adam=True, learning_rate=1e-3) if len(shape) == 3 else Recipe(adam=False, learning_rate=1e-2)


def network(
    shape: tuple[int, ...], classes: int, *, width: int, depth: int, generator: torch.Generator
) -> nn.Sequential:
    """A dense ReLU network for gray images, ``depth`` layers with the readout; for color, convolutions of width/8, …, width.

    Each of the four 3 × 3 convolutions is followed by ReLU and 2 × 2 average pooling; then come two dense layers and the
    readout. Raises TangentError for color images of less than 16 × 16 pixels, and for widths that 8 does not divide.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if len(shape) == 3:
        if shape[1] < 16 or width % 8:
            raise TangentError(
                f"sample-complexity: four poolings need images of 16 × 16 or more and a width that 8 divides, got "
                f"{shape[1]} × {shape[2]} and {width}"
            )
        widths = (shape[0], width // 8, width // 4, width // 2, width)
        for k in range(4):
            layers[f"conv{k + 1}"] = nn.Conv2d(widths[k], widths[k + 1], 3, padding=1)
            layers[f"conv_relu{k + 1}"] = nn.ReLU()
            layers[f"pool{k + 1}"] = nn.AvgPool2d(2)
        inputs, hidden = width * (shape[1] // 16) ** 2, 2
    else:
        inputs, hidden = math.prod(shape), depth - 1
    layers["flat"] = nn.Flatten()
    for k in range(hidden):
        layers[f"dense{k + 1}"] = nn.Linear(inputs if k == 0 else width, width)
        layers[f"relu{k + 1}"] = nn.ReLU()
    layers["readout"] = nn.Linear(width if hidden else inputs, classes)
    made = nn.Sequential(layers)
    for layer in made:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            deviation = (1 / layer.weight[0].numel()) ** 0.5 / _SHRUNK
            assert layer.bias is not None
            with torch.no_grad():
                nn.init.trunc_normal_(
                    layer.weight, std=deviation, a=-_CUT * deviation, b=_CUT * deviation, generator=generator
                )
                layer.bias.zero_()
    return made


def model(kind: Model, start: nn.Module) -> nn.Module:
    """The network itself, its linearization, or that with features Mφ, where M has factors for a layer's outputs and inputs.

    A convolution has two factors for its inputs, channels and window. All factors start at the identity and θ at 0.
    """
    if kind == "network":
        return start
    return TangentModule(start, Fixed() if kind == "fixed" else Modes())


def random(seed: int, *words: object) -> torch.Generator:
    """A separate generator for each purpose, so that draws do not depend on earlier draws."""
    # torch uses 32 bits of a seed.
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, (seed, *words))).encode()))


@dataclass(frozen=True)
class Course:
    """The course of one training run: errors after every epoch, number of different samples seen, and seconds."""

    test: Float[Tensor, " epochs"]
    validation: Float[Tensor, " epochs"]
    loss: Float[Tensor, " epochs"]
    distinct: int
    seconds: float


def train(
    model: nn.Module,
    pool: tuple[Float[Tensor, "m ..."], Int64[Tensor, " m"]],
    test: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    *,
    n: int,
    fresh: bool,
    recipe: Recipe,
    patience: int,
    max_epochs: int,
    generator: torch.Generator,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Course:
    """Train on n samples per epoch, the pool's first n or a fresh draw each epoch, until neither error improves.

    Stops once the best epochs on the test set and on the validation set are both more than ``patience`` epochs ago, so that
    either rule can be applied to the course. Raises TangentError if the loss is not finite.
    """
    began = time.perf_counter()
    x, y = pool
    optimizer = recipe.optimizer(model)
    seen = torch.zeros(len(x), dtype=torch.bool)
    errors: tuple[list[float], list[float]] = ([], [])
    losses: list[float] = []
    for done in range(max_epochs):
        drawn = torch.randperm(len(x) if fresh else n, generator=generator)[:n]
        seen[drawn] = True
        batches = _batches(drawn.to(x.device), recipe.batch(n))
        total = epoch(lambda index: nn.functional.cross_entropy(model(x[index]), y[index]), optimizer, batches)
        losses.append(total / n)
        if not math.isfinite(losses[-1]):
            raise TangentError("sample-complexity: training diverged; lower the learning rate")
        for curve, held_out in zip(errors, (test, validation), strict=True):
            curve.append(error(model, *held_out))
        progress((done + 1) / max_epochs)
        if all(done > curve.index(min(curve)) + patience for curve in errors):
            break
    seconds = time.perf_counter() - began
    return Course(torch.tensor(errors[0]), torch.tensor(errors[1]), torch.tensor(losses), int(seen.sum()), seconds)


def _batches(index: Tensor, size: int) -> Iterator[Tensor]:
    """Full batches only, as published; a single smaller batch if there are too few samples."""
    whole = len(index) // size * size or len(index)
    return iter(torch.split(index[:whole], min(size, whole)))


def error(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """The share of samples whose largest output is not that of their label."""
    with torch.no_grad():
        wrong = [
            (model(part).argmax(1) != of_part).sum()
            for part, of_part in zip(torch.split(x, _CHUNK), torch.split(labels, _CHUNK), strict=True)
        ]
    return int(torch.stack(wrong).sum()) / len(labels)


def stopped(curve: Float[Tensor, " epochs"], patience: int) -> int:
    """The epoch, from 0, reported by a run that stops once its best epoch is more than ``patience`` epochs ago.

    >>> stopped(torch.tensor([0.5, 0.4, 0.4, 0.4, 0.1]), 1)
    1
    """
    best = 0
    for at, value in enumerate(curve.tolist()):
        if value < curve[best]:
            best = at
        if at > best + patience:
            break
    return best
