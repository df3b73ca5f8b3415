"""explain of a measured change: sides of few directions beside those of full rank, in one process on the same features.

A pass is one forward and backward pass of the batch.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adaptive_tangents as at
from adaptive_tangents.experiments.feature_change.networks import network
from common import best_of, contend


class Logits(nn.Module):
    """A transformers model as a map from tokens to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits


def trained(
    model: nn.Module, x: Tensor, y: Tensor, steps: int, rate: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters before and after some steps of Adam on all samples."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(x)
        (F.cross_entropy(out, y) if out.shape[1] > 1 else ((out[:, 0] - 2.0 * y + 1) ** 2).mean()).backward()
        optimizer.step()
    return start, {name: value.clone() for name, value in model.state_dict().items()}


def cnn() -> tuple[nn.Module, Tensor, Tensor]:
    """A CNN of 5,102 parameters and 10 outputs, on noise with a pattern a class."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 20, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(80, 10),
    )  # fmt: skip
    y = torch.randint(10, (100,))
    return model, torch.randn(100, 3, 32, 32) + 0.5 * torch.randn(10, 3, 32, 32)[y], y


def study(kind: str) -> Callable[[], tuple[nn.Module, Tensor, Tensor]]:
    """A network of the study feature-change, on the digits 2 and 3."""

    def made() -> tuple[nn.Module, Tensor, Tensor]:
        from adaptive_tangents.datasets.images import load_digits, normalize_digits

        digits = load_digits("mnist5k", classes=(2, 3))
        x = normalize_digits(digits.train_images)[:500].reshape(-1, 1, 28, 28)
        x = x if kind == "mlp" else 28 * x
        return network(kind, (1, 28, 28), width=32, seed=1), x, (digits.train_labels[:500] == 3).long()  # type: ignore[arg-type]

    return made


def bert() -> tuple[nn.Module, Tensor, Tensor]:
    """A BERT of 22.7M parameters with random weights, 64 samples of 24 tokens, 2 classes."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2,
        attn_implementation="eager",
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    tokens, y = torch.randint(30522, (64, 24)), torch.randint(2, (64,))
    tokens[y == 1, 3] = 777
    return Logits(model), tokens, y


NETWORKS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor, Tensor]], int, float, int]] = {
    "CNN, n = 100, c = 10": (cnn, 60, 3e-3, 8),
    "mlp of feature-change, n = 500": (study("mlp"), 100, 2e-3, 8),
    "cnn of feature-change, n = 500": (study("cnn"), 100, 2e-3, 8),
    "transformer of feature-change, n = 500": (study("transformer"), 100, 2e-3, 8),
    "BERT of 22.7M, n = 64 × 24 tokens, c = 2": (bert, 6, 1e-4, 4),
}


def measured(name: str) -> dict[str, object]:
    """Seconds of `explain`, over those of full rank, of the features and of a pass; and R²."""
    warnings.simplefilter("ignore", at.TangentWarning)
    torch.manual_seed(0)
    make, steps, rate, nodes = NETWORKS[name]
    model, x, y = make()
    start, end = trained(model, x, y, steps, rate)
    initial = at.tangent_features(model, x, params=start)
    average = at.average_features(model, start, end, x, nodes=nodes)
    big = name.startswith("BERT")  # at full rank, a side of its embedding is a matrix of 30,522 × 30,522
    kept: dict[str, at.measures.Explanation] = {}

    def timed(key: str, **options: Any) -> float:
        started = time.perf_counter()
        kept[key] = at.explain(initial, average, **options)
        return time.perf_counter() - started

    rounds = 1 if big else 3
    few = full = features = passing = float("inf")
    for _ in range(rounds):
        features = min(features, best_of(lambda: at.tangent_features(model, x, params=start), repeats=2, warm=0))
        passing = min(passing, best_of(lambda: model(x).sum().backward(), repeats=2, warm=0))
        few = min(few, timed("few"))
        full = full if big else min(full, timed("full", rank=None))
    timed("16", rank=16)
    ranks = torch.tensor(list(kept["few"].ranks.values()), dtype=torch.float64)
    row: dict[str, object] = {
        "seconds": few,
        "× features": few / features,
        "× pass": few / passing,
        "median rank": float(ranks.median()),
        "R²": kept["few"].total,
        "R² at rank 16": kept["16"].total,
    }
    return row if big else row | {"full rank s": full, "full / few": full / few, "R² at full rank": kept["full"].total}


def contender(name: str) -> Callable[[], dict[str, object]]:
    return lambda: measured(name)


if __name__ == "__main__":
    contend(
        __file__, {name: contender(name) for name in NETWORKS}, "explain(TwoSided), φ₀ to the average over the path",
        ("seconds", "× features", "× pass", "full rank s", "full / few", "median rank", "R²", "R² at rank 16",
         "R² at full rank", "peak GB"),
    )  # fmt: skip
