"""A training step of the linearized and of the adaptive model beside one of the network itself."""

import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import adaptive_tangents as at
from common import contend

_SECONDS = 4.0


def mlp() -> tuple[nn.Module, Tensor]:
    """Depth 5, width 128, on digits, batches of 50: of the sample-complexity experiment."""
    widths = (784, 128, 128, 128, 128, 10)
    layers = [part for i, o in itertools.pairwise(widths) for part in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), torch.randn(50, 784)


def wide() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    ), torch.randn(100, 784)


def convolutions() -> tuple[nn.Module, Tensor]:
    """Of width 16 for 32 × 32 images, batches of 50."""
    parts: list[nn.Module] = []
    for i, o in ((3, 16), (16, 32), (32, 64), (64, 128)):
        parts += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10)), torch.randn(
        50, 3, 32, 32
    )


def transformer() -> tuple[nn.Module, Tensor]:
    """Two layers of 64 units on 32 tokens, batches of 50."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
            self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).mean(1))

    return Encoder().eval(), torch.randn(50, 32, 64)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "MLP 784-128×4-10": mlp, "MLP 784-1024×2-10": wide, "CNN": convolutions, "transformer": transformer,
}  # fmt: skip
MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "linearized (Fixed)": lambda model: at.TangentModule(model, at.Fixed()),
    "adaptive (TwoSided)": lambda model: at.TangentModule(model, at.TwoSided()),
    "adaptive (TwoSided, rank 8)": lambda model: at.TangentModule(model, at.TwoSided(), rank=8),
}


def stepper(model: nn.Module, x: Tensor) -> Callable[[], float]:
    """A training step that tells its seconds."""
    labels = torch.randint(0, 10, (len(x),))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        return time.perf_counter() - started

    return step


def measure(network: str, kind: str) -> dict[str, object]:
    """Steps of both in turn, so that other work on the machine falls on both; medians."""
    torch.manual_seed(0)
    model, x = NETWORKS[network]()
    ours, plain = stepper(MODELS[kind](model), x), stepper(model, x)
    times: list[tuple[float, float]] = []
    until = time.perf_counter() + _SECONDS
    while time.perf_counter() < until or len(times) < 10:
        times.append((ours(), plain()))
    step, base = (statistics.median(column) for column in zip(*times[5:], strict=True))
    return {"milliseconds": 1e3 * step, "of the network": 1e3 * base, "ratio": step / base}


contenders = {
    f"{network}: {kind}": lambda network=network, kind=kind: measure(network, kind)  # type: ignore[misc]
    for network in NETWORKS
    for kind in MODELS
}

if __name__ == "__main__":
    contend(
        __file__,
        contenders,
        "one training step (SGD, cross-entropy)",
        ("milliseconds", "of the network", "ratio", "peak GB"),
    )
