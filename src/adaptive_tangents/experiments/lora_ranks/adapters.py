"""The encoder, its full fine-tuning, and its training by adapters of given ranks."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from adaptive_tangents.experiments.forecast.texts import PACKAGE, Encoder
from adaptive_tangents.experiments.lora_ranks.texts import weights
from adaptive_tangents.measures.lora_advice import LoraAdvice

ADAPTED = "body.encoder.layer.*"  # every linear layer of the encoder
HEAD = "readout"


@dataclass(frozen=True, eq=False)
class Task:
    """Tokens and labels to train on and to test on."""

    x: Int64[Tensor, "n t"]
    y: Int64[Tensor, " n"]
    x_test: Int64[Tensor, "m t"]
    y_test: Int64[Tensor, " m"]


@dataclass(frozen=True)
class Way:
    """How to train: Adam, a rate that falls linearly to 0, mini-batches."""

    rate: float
    epochs: int
    batch: int


def absent(*, pretrained: bool) -> str:
    """Why there is no such encoder or no adapters; empty if there are both."""
    missing = [name for name in ("transformers", "peft", *([PACKAGE] if pretrained else [])) if find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed: pip install 'adaptive-tangents[integrations]'"
    try:
        import peft
        import transformers  # noqa: F401
    except (ImportError, RuntimeError) as error:  # another package is of another release than torch
        return f"peft cannot be imported ({str(error).splitlines()[0]})"
    return "" if hasattr(peft, "LoraConfig") else "peft has no LoraConfig"


def encoder(outputs: int, seed: int, *, pretrained: bool) -> Encoder:
    """The pretrained encoder, or a tiny random one, in evaluation mode, with a new head of ``outputs`` classes."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import BertConfig, BertModel

    if pretrained:
        config = BertConfig.from_json_file(str(weights() / "config.json"))
    else:
        config = BertConfig(
            vocab_size=1000, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Encoder(BertModel(config, add_pooling_layer=False), config.hidden_size)
        model.readout = nn.Linear(config.hidden_size, outputs)
    if pretrained:
        from safetensors.torch import load_file

        model.body.load_state_dict(load_file(weights() / "model.safetensors"), strict=False)
    return model.eval()


def adapted(model: nn.Module, ranks: Mapping[str, int] | int, seed: int) -> nn.Module:
    """The model with an adapter of its rank in each layer, or of one rank in all, α = r, and a head that is trained whole."""
    from peft import LoraConfig, get_peft_model

    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != HEAD}
    pattern = dict.fromkeys(layers, ranks) if isinstance(ranks, int) else dict(ranks)
    most = max(pattern.values())
    config = LoraConfig(
        r=most, lora_alpha=most, target_modules=list(pattern), rank_pattern=pattern, alpha_pattern=pattern,
        modules_to_save=[HEAD],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: nn.Module = get_peft_model(model, config)
    return made.eval()


def ranks_of(advice: LoraAdvice) -> dict[str, int]:
    """The rank of each layer that gets an adapter."""
    return {layer.module: layer.rank for layer in advice.adapted}


def trained(model: nn.Module, task: Task, way: Way, seed: int, progress: Callable[[float], None]) -> dict[str, Tensor]:
    """Train what requires a gradient in place; training losses by epoch, held-out loss and accuracy, and counts."""
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(moving, lr=way.rate)
    steps = way.epochs * -(-len(task.x) // way.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator, losses = torch.Generator().manual_seed(seed), []
    for done in range(way.epochs):
        total = 0.0
        for index in torch.split(torch.randperm(len(task.x), generator=generator), way.batch):
            loss = nn.functional.cross_entropy(model(_short(task.x[index])), task.y[index])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward([loss])
            optimizer.step()
            schedule.step()
            total += loss.item() * len(index)
        losses.append(total / len(task.x))
        progress((done + 1) / way.epochs)
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name and p.requires_grad)
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "adapters": torch.tensor(adapters, dtype=torch.float64),
        **_tested(model, task),
    }


def _tested(model: nn.Module, task: Task) -> dict[str, Tensor]:
    with torch.no_grad():
        outputs: Float[Tensor, "m c"] = torch.cat(
            [model(_short(part)) for part in torch.split(task.x_test, 64)]
        ).double()
    return {
        "loss": nn.functional.cross_entropy(outputs, task.y_test),
        "accuracy": (outputs.argmax(1) == task.y_test).double().mean(),
    }


def _short(ids: Tensor) -> Tensor:
    """The batch without columns that are all padding."""
    return ids[:, : int((ids != 0).sum(1).max())]


def matrices(state: Mapping[str, Any]) -> tuple[str, ...]:
    """The weights of the encoder's linear layers."""
    return tuple(
        name for name, value in state.items()
        if name.startswith("body.encoder.layer.") and name.endswith("weight") and value.ndim == 2
    )  # fmt: skip
