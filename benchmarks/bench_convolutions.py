"""Full tangent kernels of convolutional networks, float32, beside the ``torch.func`` recipe ``vmap(jacrev)``."""

from itertools import pairwise

import torch
from torch import nn

import adaptive_tangents as at
from common import best_of, contend


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.body(x) + self.short(x))


def cnn() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in pairwise((3, 16, 32, 64, 128)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *head), torch.randn(100, 3, 32, 32)


def resnet18() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    for a, b in pairwise((64, 64, 128, 256, 512)):
        layers += [Residual(a, b, 1 if a == b else 2), Residual(b, b, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return model.eval(), torch.randn(20, 3, 32, 32)


def ours(network: tuple[nn.Module, torch.Tensor]) -> dict[str, object]:
    model, x = network
    found: list[torch.Tensor] = []
    seconds = best_of(lambda: found.append(at.tangent_kernel(model, x)), repeats=3)
    return {"seconds": seconds, "checksum": float(found[-1].double().norm())}


def recipe(network: tuple[nn.Module, torch.Tensor]) -> dict[str, object]:
    model, x = network
    params = {name: p.detach() for name, p in model.named_parameters()}

    def single(params: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, params, (sample[None],))[0]

    def kernel() -> torch.Tensor:
        flat = [j.flatten(2) for j in torch.func.vmap(torch.func.jacrev(single), (None, 0))(params, x).values()]
        return torch.stack([torch.einsum("Naf,Mbf->NMab", j, j) for j in flat]).sum(0)

    found: list[torch.Tensor] = []
    seconds = best_of(lambda: found.append(kernel()), repeats=1)
    return {"seconds": seconds, "checksum": float(found[-1].double().norm())}


contenders = {
    "adaptive-tangents, CNN, n=100": lambda: ours(cnn()),
    "torch.func, CNN, n=100": lambda: recipe(cnn()),
    "adaptive-tangents, ResNet-18, n=20": lambda: ours(resnet18()),
    "torch.func, ResNet-18, n=20": lambda: recipe(resnet18()),
}

if __name__ == "__main__":
    contend(
        __file__, contenders, "full tangent kernels of convolutional networks, 32×32 images, 10 outputs, float32",
        ("seconds", "peak GB", "checksum"),
    )  # fmt: skip
