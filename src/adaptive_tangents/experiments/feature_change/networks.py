"""Small networks of three architectures for images of any size, and how each is trained."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptive_tangents.experiments.training import relu_network


@dataclass(frozen=True)
class Training:
    """Mini-batches by SGD with momentum 0.9, or by Adam."""

    optimizer: Literal["sgd", "adam"]
    learning_rate: float
    epochs: int
    batch_size: int = 100

    def over(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer for all parameters of the model."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), lr=self.learning_rate, momentum=0.9)
        return torch.optim.Adam(model.parameters(), lr=self.learning_rate)


TRAINING = {
    "mlp": Training("sgd", 0.1, 100),
    "cnn": Training("adam", 2e-3, 20),
    "transformer": Training("adam", 2e-3, 40),
}


class Attention(nn.Module):
    """Self-attention with ``heads`` heads, softmax(QKᵀ/√d)V; four separate projections, so that each is a block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        q, k, v = (
            f(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        found: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return found


class Layer(nn.Module):
    """A pre-norm transformer layer: attention and two dense layers, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, tokens: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        tokens = tokens + self.attention(self.norm1(tokens))
        found: Tensor = tokens + self.down(torch.relu(self.up(self.norm2(tokens))))
        return found


class Transformer(nn.Module):
    """A transformer on square image patches with learned positions; the readout takes the mean over tokens."""

    def __init__(
        self, shape: tuple[int, int, int], *, width: int, patch: int, outputs: int = 1, heads: int = 4, layers: int = 2
    ) -> None:
        super().__init__()
        channels, height, breadth = shape
        self.patch = patch
        self.embed = nn.Linear(channels * patch**2, width)
        self.place = nn.Parameter(torch.zeros((height // patch) * (breadth // patch), width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm, self.readout = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, images: Float[Tensor, "n k h w"]) -> Float[Tensor, "n c"]:
        tokens = nn.functional.unfold(images, self.patch, stride=self.patch).mT
        tokens = self.embed(tokens) + self.place
        for layer in self.layers:
            tokens = layer(tokens)
        found: Tensor = self.readout(self.norm(tokens).mean(1))
        return found


def _mlp(shape: tuple[int, int, int], width: int, outputs: int, generator: torch.Generator) -> nn.Module:
    names = ("hidden1", "hidden2", "readout")
    layers = relu_network((math.prod(shape), 8 * width, 8 * width, outputs), names, bias=True, generator=generator)
    return nn.Sequential(OrderedDict([("flatten", nn.Flatten()), *layers.named_children()]))


def _cnn(shape: tuple[int, int, int], width: int, outputs: int, generator: torch.Generator) -> nn.Module:
    channels = (shape[0], width // 2, width, 2 * width)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for k in range(3):
        conv = nn.Conv2d(channels[k], channels[k + 1], 3, padding=1)
        with torch.no_grad():
            conv.weight.normal_(0, (2 / (9 * channels[k])) ** 0.5, generator=generator)
            conv.bias.zero_()  # type: ignore[union-attr]
        layers |= {f"conv{k + 1}": conv, f"relu{k + 1}": nn.ReLU(), f"pool{k + 1}": nn.AvgPool2d(2)}
    readout = nn.Linear(channels[-1] * (shape[1] // 8) * (shape[2] // 8), outputs)
    with torch.no_grad():
        readout.weight.normal_(0, (1 / readout.in_features) ** 0.5, generator=generator)
        readout.bias.zero_()
    return nn.Sequential(layers | {"flatten": nn.Flatten(), "readout": readout})


def _transformer(shape: tuple[int, int, int], width: int, outputs: int, generator: torch.Generator) -> nn.Module:
    return Transformer(shape, width=width, patch=shape[1] // 4, outputs=outputs)


_KINDS = {"mlp": _mlp, "cnn": _cnn, "transformer": _transformer}


def network(kind: str, shape: tuple[int, int, int], *, width: int, seed: int, outputs: int = 1) -> nn.Module:
    """A network of the given kind at its initial weights: images (n, channels, height, width) to ``outputs``.

    mlp: two dense layers of 8·width units; cnn: 3×3 convolutions of width/2, width and 2·width channels, average pooling
    after each; transformer: two layers of that width on 4 × 4 patches.

    >>> [tuple(network(k, (1, 28, 28), width=8, seed=0)(torch.zeros(2, 1, 28, 28)).shape) for k in TRAINING]
    [(2, 1), (2, 1), (2, 1)]
    """
    # Constructors of layers draw from torch's global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _KINDS[kind](shape, width, outputs, torch.Generator().manual_seed(seed))
