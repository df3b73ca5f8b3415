"""The networks that the benchmarks share, in eval mode with 10 outputs, each with its batch: one function a network."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Network = tuple[nn.Module, Tensor]

OUTPUTS = 10


class Residual(nn.Module):
    """The basic block of a ResNet, activations in place."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        short = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.short = nn.Sequential(*short) if stride > 1 or inputs != outputs else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.short(x))


class Attention(nn.Module):
    """Self-attention with one linear layer for queries, keys and values."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (n, t, 3, heads, width/heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A transformer's layer, norms first."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches by a strided convolution, a class token, and its output to a linear head."""

    def __init__(self, width: int = 192, depth: int = 6, heads: int = 3, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (32 // patch) ** 2 + 1, width))
        self.layers = nn.Sequential(*[Layer(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.position
        return self.head(self.norm(self.layers(tokens))[:, 0])


class Gpt(nn.Module):
    """A causal transformer on tokens; 10 logits from the last one."""

    def __init__(self, width: int = 256, depth: int = 4, heads: int = 4, tokens: int = 64, words: int = 1000) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(words, width), nn.Embedding(tokens, width)
        self.layers = nn.Sequential(*[Layer(width, heads, causal=True) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, OUTPUTS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.layers(tokens))[:, -1])


def mlp(n: int = 100) -> Network:
    layers = [m for a, b in pairwise([784, 1024, 1024, 1024, 1024]) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(1024, OUTPUTS)), torch.randn(n, 784)


def cnn(n: int = 100) -> Network:
    layers: list[nn.Module] = []
    for a, b in pairwise((3, 16, 32, 64, 128)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, OUTPUTS)]
    return nn.Sequential(*layers, nn.Flatten(), *head), torch.randn(n, 3, 32, 32)


def resnet18(n: int = 20) -> Network:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    for a, b in pairwise((64, 64, 128, 256, 512)):
        layers += [Residual(a, b, 1 if a == b else 2), Residual(b, b, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, OUTPUTS))
    return model, torch.randn(n, 3, 32, 32)


def vit(n: int = 20) -> Network:
    return VisionTransformer(), torch.randn(n, 3, 32, 32)


def gpt(n: int = 20) -> Network:
    return Gpt(), torch.randint(1000, (n, 64))


NETWORKS: dict[str, Callable[[], Network]] = {"MLP": mlp, "CNN": cnn, "ResNet-18": resnet18, "ViT": vit, "GPT": gpt}


def made(make: Callable[[], Network]) -> Network:
    """The network that ``make`` makes, the same in every process."""
    torch.manual_seed(0)
    model, x = make()
    return model.eval(), x
