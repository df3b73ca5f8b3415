"""A GPT-2 of 124 million parameters: kernels, sketches and averages in units of plain forward and backward passes.

The configuration of GPT-2 small in transformers, random weights, 16 samples of 64 tokens; logits of 10 words at the last
token, or one loss a sequence. Seconds are those of the processor. Plain passes of the same batch run in the same process;
a call is given in multiples of c + 1 of them. The limit is that of each call, and the peak that of the process.

    OMP_NUM_THREADS=1 python benchmarks/bench_large.py --patience 3000 --matching "trace|sketch"

SIZE=small is a network of 4 layers, 256 wide, with 8,000 words, to see it work.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adaptive_tangents as at
from common import contend, peak_memory

SAMPLES, TOKENS, OUTPUTS = 16, 64, 10
LIMIT = 10_000_000_000
DIM = 4096
COLUMNS = (
    "parameters", "c", "plain s", "seconds", "passes", "÷ (c + 1) passes", "peak GB", "standard error", "path error", "note",
)  # fmt: skip
Row = dict[str, Any]


class SequenceLoss(nn.Module):
    """The mean loss of a sequence's next tokens (n, 1)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.model(tokens).logits[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1, keepdim=True)


def gpt2() -> tuple[nn.Module, Tensor]:
    """The network and its batch, the same in every process."""
    from transformers import GPT2Config, GPT2LMHeadModel

    small = {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 8000, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    config = GPT2Config(**(small if os.environ.get("SIZE") == "small" else {}))
    return GPT2LMHeadModel(config).eval(), torch.randint(config.vocab_size, (SAMPLES, TOKENS))


def logits(out: Any) -> Tensor:
    return out.logits[:, -1, :OUTPUTS]


def measured(
    make: Callable[[nn.Module, Tensor, Any], Row], *, samples: int = SAMPLES, loss: bool = False, outputs: Any = logits
) -> Row:
    """The row of a call, and of plain passes after it."""
    model, x = gpt2()
    x = x[:samples]
    model, picked = (SequenceLoss(model), None) if loss else (model, outputs)
    started = time.process_time()
    row = make(model, x, picked)
    seconds, peak = time.process_time() - started, peak_memory()
    plain = []
    for _ in range(2):
        started = time.process_time()
        model.zero_grad(set_to_none=True)
        out = model(x) if picked is None else picked(model(x))
        out.sum().backward()
        plain.append(time.process_time() - started)
    c, passes = out.shape[1], seconds / min(plain)
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "c": c, "plain s": min(plain), "seconds": seconds,
        "passes": passes, "÷ (c + 1) passes": passes / (c + 1), "peak GB": peak,
    } | row  # fmt: skip


def kernel(kind: str) -> Callable[[nn.Module, Tensor, Any], Row]:
    def make(model: nn.Module, x: Tensor, picked: Any) -> Row:
        at.tangent_kernel(model, x, outputs=kind, output_fn=picked, memory_limit=LIMIT)
        return {}

    return make


def sketched(model: nn.Module, x: Tensor, picked: Any) -> Row:
    found = at.tangent_kernel(model, x, outputs="trace", sketch=at.Sketch(DIM), output_fn=picked, memory_limit=LIMIT)
    return {"standard error": found.relative_error}


def averaged(model: nn.Module, x: Tensor, picked: Any) -> Row:
    """Along a random step of a twentieth of the weights' scale, at 4 nodes."""
    start = {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 1e-3 * torch.randn(p.shape, generator=generator)
    end = model.state_dict()
    found = at.average_features(model, start, end, x, nodes=4, output_fn=picked, memory_limit=LIMIT)
    return {"path error": found.error, "note": "4 nodes"}


combination = 1.0 - 2.0 * torch.randint(2, (OUTPUTS, 1), generator=torch.Generator().manual_seed(0))

contenders = {
    "trace kernel of 10 logits": lambda: measured(kernel("trace")),
    "full kernel of 10 logits": lambda: measured(kernel("full")),
    f"sketch of dim {DIM} of 10 logits": lambda: measured(sketched),
    "one logit": lambda: measured(kernel("trace"), outputs=lambda out: out.logits[:, -1, :1]),
    "a random combination of 10 logits": lambda: measured(
        kernel("trace"), outputs=lambda out: out.logits[:, -1, :OUTPUTS] @ combination
    ),
    "a loss per sequence": lambda: measured(kernel("trace"), loss=True),
    "average of a loss per sequence": lambda: measured(averaged, loss=True),
    "average of 10 logits, n = 4": lambda: measured(averaged, samples=4),
}

if __name__ == "__main__":
    contend(__file__, contenders, f"GPT-2 small, n = {SAMPLES}, {TOKENS} tokens, float32, random weights", COLUMNS)
