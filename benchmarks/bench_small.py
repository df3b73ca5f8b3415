"""Small networks, where the fixed cost of a call decides: ours and ``vmap(jacrev)`` in turns in one process, float32.

Passes are counted, too: how often a call runs the model, and how often autograd's engine.
"""

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import adaptive_tangents as at
import recipes
from common import contend
from networks import VisionTransformer

N, OUTPUTS, TOKENS, WORDS = 8, 3, 12, 64
ROUNDS, SECONDS = 7, 20.0
GOAL = 1.3

Small = tuple[nn.Module, Tensor, Callable[[Any], Tensor] | None]


def last_logits(out: Any) -> Tensor:
    """The first logits of the last token of what a language model returns."""
    return out.logits[:, -1, :OUTPUTS]  # type: ignore[no-any-return]


def logits(out: Any) -> Tensor:
    return out.logits  # type: ignore[no-any-return]


def first_outputs(out: Tensor) -> Tensor:
    return out[:, :OUTPUTS]


def tokens() -> Tensor:
    return torch.randint(1, WORDS, (N, TOKENS))


def images(size: int = 32) -> Tensor:
    return torch.randn(N, 3, size, size)


def llama(width: int) -> Small:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=TOKENS, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokens(), last_logits


def gpt_neox() -> Small:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=TOKENS, use_cache=False,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config), tokens(), last_logits


def gpt2() -> Small:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=WORDS, n_embd=128, n_layer=4, n_head=4, n_positions=TOKENS, use_cache=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config), tokens(), last_logits


def bert() -> Small:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4,
        num_labels=2, max_position_embeddings=TOKENS,
    )  # fmt: skip
    return BertForSequenceClassification(config), tokens(), logits


def of_timm(name: str, **options: Any) -> Small:
    import timm

    return timm.create_model(name, num_classes=OUTPUTS, **options), images(), None


def mlp() -> Small:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, OUTPUTS))
    return model, torch.randn(N, 64), None


def cnn() -> Small:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, OUTPUTS),
    )  # fmt: skip
    return model, images(), None


SMALL: dict[str, Callable[[], Small]] = {
    "Llama, 16 wide": lambda: llama(16),
    "Llama, 56 wide": lambda: llama(56),
    "Llama, 128 wide": lambda: llama(128),
    "Llama, 264 wide": lambda: llama(264),
    "GPT-NeoX, 64 wide": gpt_neox,
    "GPT-2, 128 wide": gpt2,
    "BERT, 256 wide": bert,
    "ViT, 48 wide": lambda: (VisionTransformer(width=48, depth=4, patch=8), images(), first_outputs),
    "MLP, 128 wide": mlp,
    "CNN, 8 to 32 channels": cnn,
    "timm ResNet-10t": lambda: of_timm("resnet10t"),
    "timm MobileNetV3, half width": lambda: of_timm("mobilenetv3_small_050"),
}


def beside(make: Callable[[], Small]) -> dict[str, Any]:
    """Both contenders in turns, the least time of each; how far kernels differ; passes of one call of ours."""
    torch.manual_seed(0)
    model, x, output_fn = make()
    model.eval()

    def ours() -> Tensor:
        return at.tangent_kernel(model, x, output_fn=output_fn)

    theirs = recipes.by_torch_func(model, x, output_fn)
    one, two = ours(), theirs()
    forwards, backwards = passes(model, ours)
    least = [math.inf, math.inf]
    ended, rounds = time.perf_counter() + SECONDS, 0
    while rounds < ROUNDS or (rounds < 5 * ROUNDS and time.perf_counter() < ended):
        for k, run in enumerate((ours, theirs)):
            started = time.perf_counter()
            run()
            least[k] = min(least[k], time.perf_counter() - started)
        rounds += 1
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "outputs": one.shape[1],
        "ms": 1e3 * least[0],
        "vmap(jacrev) ms": 1e3 * least[1],
        "ratio": least[1] / least[0],
        "forward passes": forwards,
        "backward passes": backwards,
        "difference": f"{float((one - two).abs().max() / two.abs().max()):.0e}",
    }


def passes(model: nn.Module, run: Callable[[], object]) -> tuple[int, int]:
    """How often a call runs the model, and autograd's engine."""
    forwards, backwards = [0], [0]
    plain, grad = type(model).__call__, torch.autograd.grad

    def called(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        forwards[0] += module is model
        return plain(module, *arguments, **options)

    def differentiated(*arguments: Any, **options: Any) -> Any:
        backwards[0] += 1
        return grad(*arguments, **options)

    kind = type(model)
    own = "__call__" in vars(kind)
    try:
        kind.__call__, torch.autograd.grad = called, differentiated  # type: ignore[method-assign]
        run()
    finally:
        torch.autograd.grad = grad
        if own:
            kind.__call__ = plain  # type: ignore[method-assign]
        else:
            del kind.__call__
    return forwards[0], backwards[0]


def mean(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The geometric mean of the ratios."""
    ratios = [row["ratio"] for row in rows.values() if "ratio" in row]
    if not ratios:
        return {}
    return {"geometric mean": {"ratio": math.prod(ratios) ** (1 / len(ratios))}}


contenders = {name: lambda make=make: beside(make) for name, make in SMALL.items()}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    contend(
        __file__, contenders, f"full tangent kernels of small networks, n = {N}, float32",
        ("parameters", "outputs", "ms", "vmap(jacrev) ms", "ratio", "forward passes", "backward passes", "difference"),
        summary=mean,
    )  # fmt: skip
