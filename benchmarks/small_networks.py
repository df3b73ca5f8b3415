"""A dozen more architectures of small to medium size, for the sweep: 10 outputs, batches that take ``torch.func`` a while."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import OUTPUTS, Network


def conv(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups)


class UNet(nn.Module):
    """Two steps down, two up with what was there before, pooled to outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down1, self.down2 = conv(3, 16), conv(16, 32, 2), conv(32, 64, 2)
        self.up1, self.up2 = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.join1, self.join2, self.out = conv(64, 32), conv(32, 16), nn.Conv2d(16, OUTPUTS, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.first(x))
        b = F.relu(self.down1(a))
        c = F.relu(self.down2(b))
        b = F.relu(self.join1(torch.cat([self.up1(c), b], 1)))
        a = F.relu(self.join2(torch.cat([self.up2(b), a], 1)))
        return self.out(a).mean((2, 3))


class MixerLayer(nn.Module):
    """Mixing over patches, then over channels."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).mT).mT
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer on 4×4 patches."""

    def __init__(self, width: int = 96, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.layers = nn.Sequential(*[MixerLayer(64, width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.patches(x).flatten(2).mT)).mean(1))


class Recurrent(nn.Module):
    """The last state of a recurrent layer, to outputs.

    The GRU is given its zeros to start from, made of the input: vmap refuses those that it makes itself.
    """

    def __init__(self, layer: type[nn.LSTM] | type[nn.GRU], inputs: int = 28, width: int = 128) -> None:
        super().__init__()
        self.recurrent, self.head = layer(inputs, width, batch_first=True), nn.Linear(width, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        start = (0 * x[:, 0, :1]).expand(-1, self.recurrent.hidden_size)[None].contiguous()
        states = self.recurrent(x, start)[0] if isinstance(self.recurrent, nn.GRU) else self.recurrent(x)[0]
        return self.head(states[:, -1])


class Graph(nn.Module):
    """Three graph convolutions on one fixed graph, averaged over its nodes."""

    def __init__(self, nodes: int = 64, width: int = 128) -> None:
        super().__init__()
        links = (torch.rand(nodes, nodes) < 0.1).float() + torch.eye(nodes)
        self.register_buffer("links", links / links.sum(1, keepdim=True))
        self.layers = nn.ModuleList([nn.Linear(a, width) for a in (32, width, width)])
        self.head = nn.Linear(width, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(self.links @ layer(x))
        return self.head(x.mean(1))


class Siamese(nn.Module):
    """One encoder used on both images of a pair; outputs from how far they are apart."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            conv(1, 16), nn.ReLU(), nn.MaxPool2d(2),
            conv(16, 32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1568, 64),
        )  # fmt: skip
        self.head = nn.Linear(64, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.encoder(x[:, 0]) - self.encoder(x[:, 1])).abs())


class Bag(nn.Module):
    """The mean of a text's word vectors, to a small MLP."""

    def __init__(self, words: int = 2000, width: int = 64) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.head = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, OUTPUTS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x).mean(1))


class Encoder(nn.Module):
    """PyTorch's own transformer encoder."""

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def mobile(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        conv(inputs, inputs, stride, groups=inputs), nn.BatchNorm2d(inputs), nn.ReLU6(),
        nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU6(),
    ]  # fmt: skip


def mobile_net() -> nn.Module:
    layers = [*mobile(32, 64, 1), *mobile(64, 128, 2), *mobile(128, 128, 1), *mobile(128, 256, 2)]
    return nn.Sequential(
        conv(3, 32, 2), nn.ReLU6(), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, OUTPUTS)
    )


def group_norm_net() -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in ((3, 32), (32, 64), (64, 128)):
        layers += [conv(a, b, 2), nn.GroupNorm(8, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, OUTPUTS))


def signal_net() -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in ((2, 32), (32, 64), (64, 128)):
        layers += [nn.Conv1d(a, b, 7, 2, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(128, OUTPUTS))


def generator() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 1024), nn.ReLU(), nn.Unflatten(1, (64, 4, 4)),
        nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(16, OUTPUTS, 4, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


SMALL: dict[str, Callable[[], Network]] = {
    "U-Net": lambda: (UNet(), torch.randn(30, 3, 32, 32)),
    "MLP-Mixer": lambda: (Mixer(), torch.randn(40, 3, 32, 32)),
    "LSTM": lambda: (Recurrent(nn.LSTM), torch.randn(60, 28, 28)),
    "GRU": lambda: (Recurrent(nn.GRU), torch.randn(60, 28, 28)),
    "graph convolution": lambda: (Graph(), torch.randn(100, 64, 32)),
    "siamese": lambda: (Siamese(), torch.randn(100, 2, 1, 28, 28)),
    "MobileNet-like": lambda: (mobile_net(), torch.randn(40, 3, 32, 32)),
    "1-D convolutions": lambda: (signal_net(), torch.randn(60, 2, 256)),
    "generator": lambda: (generator(), torch.randn(80, 64)),
    "bag of words": lambda: (Bag(), torch.randint(2000, (60, 40))),
    "TransformerEncoder": lambda: (Encoder(), torch.randn(40, 32, 64)),
    "GroupNorm": lambda: (group_norm_net(), torch.randn(60, 3, 32, 32)),
}
