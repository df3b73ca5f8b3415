"""`inspect` on a BERT of 22 million parameters and a ResNet-18: its stages in plain forward-backward passes of its batch."""

import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptive_tangents.inspection import InspectConfig, Plan, run
from adaptive_tangents.loading import Data
from common import best_of, contend
from networks import made, resnet18

COLUMNS = (
    "passes",
    "through the network",
    "system time",
    "matrices explained",
    "estimate, worst",
    "seconds",
    "peak GB",
)
STEPS = 5
TAKEN: list[int] = []  # samples that the network is called on; here, since what a hook holds is put back as it was


def bert(n: int = 64, tokens: int = 24) -> tuple[nn.Module, Tensor]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=30_000, hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536,
        max_position_embeddings=64, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config), torch.randint(30_000, (n, tokens))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """One plain forward-backward pass."""
    model.zero_grad(set_to_none=True)
    F.cross_entropy(logits(model, x), y).backward()


def processor(function: Callable[[], None]) -> float:
    """Least processor seconds of several calls, which other work on the machine does not count in."""
    function()
    seconds = []
    for _ in range(4):
        started = time.process_time()
        function()
        seconds.append(time.process_time() - started)
    return min(seconds)


class Stages:
    """Processor time, system time and page faults of each stage, and the time left as told, from its progress."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.told: list[tuple[float, float]] = []
        self.stage, self.before = "", resource.getrusage(resource.RUSAGE_SELF)
        self.began = time.perf_counter()

    def __call__(self, stage: str, share: float) -> None:
        now = resource.getrusage(resource.RUSAGE_SELF)
        row = self.rows.setdefault(self.stage, {"block": self.stage, "seconds": 0.0, "system s": 0.0, "page faults": 0})
        row["seconds"] += now.ru_utime + now.ru_stime - self.before.ru_utime - self.before.ru_stime
        row["system s"] += now.ru_stime - self.before.ru_stime
        row["page faults"] += now.ru_minflt - self.before.ru_minflt
        self.stage, self.before = stage, now
        if share > 0:
            elapsed = time.perf_counter() - self.began
            self.told.append((elapsed, elapsed * (1 - share) / share))

    def worst(self) -> float:
        """The time left as told over the true one, or its inverse, whichever is larger, until a tenth is left."""
        end = time.perf_counter() - self.began
        ratios = [told / (end - at) for at, told in self.told if end - at > 0.1 * end]
        return max(max(r, 1 / max(r, 1e-9)) for r in ratios)


def measure(make: Callable[[], tuple[nn.Module, Tensor]], classes: int) -> dict[str, Any]:
    model, x = made(make)
    y = torch.arange(len(x)) % classes
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    for _ in range(STEPS):
        step(model, x, y)
        optimizer.step()
    end = {name: value.clone() for name, value in model.state_dict().items()}
    one, seconds = processor(lambda: step(model, x, y)), best_of(lambda: step(model, x, y))
    model.zero_grad(set_to_none=True)
    TAKEN.clear()
    model.register_forward_pre_hook(lambda module, inputs: TAKEN.append(len(inputs[0])))
    stages, plans = Stages(), list[Plan]()
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    found = run(model, {"start": start, "end": end}, Data(x, y), InspectConfig(), progress=stages, show=plans.append)
    took = time.perf_counter() - began
    stages("", 0.0)
    after = resource.getrusage(resource.RUSAGE_SELF)
    system = after.ru_stime - before.ru_stime
    whole = after.ru_utime - before.ru_utime + system
    planned = {stage.name: stage.seconds / seconds for stage in plans[0].stages}
    rows = [
        row | {"passes": row.pop("seconds") / one, "planned": planned.get(name)}
        for name, row in stages.rows.items()
        if name
    ]
    blocks = found.results["blocks"].values()
    matrices = [block for block in blocks if min(block["shape"]) > 1]
    explained = sum(all(value is not None for value in block["explain"].values()) for block in matrices)
    return {
        "passes": whole / one,
        "through the network": sum(TAKEN) / len(x),
        "system time": f"{100 * system / whole:.0f} %",
        "matrices explained": f"{explained} of {len(matrices)}",
        "estimate, worst": stages.worst(),
        "seconds": took,
        "planned GB": plans[0].bytes / 1e9,
        "blocks": rows,
    }


contenders = {
    "BERT, 22M parameters, 64 × 24 tokens": lambda: measure(bert, 2),
    "ResNet-18, 11M parameters, 64 images": lambda: measure(lambda: resnet18(64), 10),
}

if __name__ == "__main__":
    contend(__file__, contenders, "inspect, in plain forward-backward passes of its batch", COLUMNS)
