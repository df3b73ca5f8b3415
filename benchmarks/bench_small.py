"""Small networks, where the fixed cost of a call decides: ours and ``vmap(jacrev)`` in turns in one process, float32.

Times are of the processor, on one thread: milliseconds that other work on the machine would spoil.
Passes are counted, too: how often a call runs the model, plus how often autograd's engine.
"""

import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import adaptive_tangents as at
import recipes
from common import contend
from networks import VisionTransformer

TOKENS, WORDS = 16, 64
SIZES = ((16, 10), (8, 3))  # samples and outputs
ROUNDS, SECONDS = 5, 4.0

Small = tuple[nn.Module, Tensor, Callable[[Any], Tensor] | None]


def last_logits(c: int) -> Callable[[Any], Tensor]:
    """The first logits of the last token of what a language model returns."""
    return lambda out: out.logits[:, -1, :c]


def tokens(n: int) -> Tensor:
    return torch.randint(1, WORDS, (n, TOKENS))


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 32, 32)


def llama(width: int, n: int, c: int) -> Small:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=TOKENS, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokens(n), last_logits(c)


def gpt_neox(n: int, c: int) -> Small:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=TOKENS, use_cache=False,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config), tokens(n), last_logits(c)


def gpt2(n: int, c: int) -> Small:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=WORDS, n_embd=128, n_layer=4, n_head=4, n_positions=TOKENS, use_cache=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config), tokens(n), last_logits(c)


def bert(n: int, c: int) -> Small:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4,
        num_labels=c, max_position_embeddings=TOKENS,
    )  # fmt: skip
    return BertForSequenceClassification(config), tokens(n), lambda out: out.logits


def of_timm(name: str, n: int, c: int) -> Small:
    import timm

    return timm.create_model(name, num_classes=c), images(n), None


def mlp(n: int, c: int) -> Small:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, c))
    return model, torch.randn(n, 64), None


def cnn(n: int, c: int) -> Small:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, c),
    )  # fmt: skip
    return model, images(n), None


def vit(n: int, c: int) -> Small:
    return VisionTransformer(width=48, depth=4, patch=8), images(n), lambda out: out[:, :c]


SMALL: dict[str, Callable[[int, int], Small]] = {
    **{f"Llama, {width} wide": partial(llama, width) for width in (16, 56, 128, 264)},
    "GPT-NeoX, 64 wide": gpt_neox,
    "GPT-2, 128 wide": gpt2,
    "BERT, 256 wide": bert,
    "ViT, 48 wide": vit,
    "MLP, 128 wide": mlp,
    "CNN, 8 to 32 channels": cnn,
    "timm ResNet-10t": partial(of_timm, "resnet10t"),
    "timm MobileNetV3, half width": partial(of_timm, "mobilenetv3_small_050"),
}


def beside(make: Callable[[int, int], Small]) -> dict[str, Any]:
    """Both contenders in turns at each size, the least time of each; how far kernels differ; passes of one call of ours."""
    torch.set_num_threads(1)
    row: dict[str, Any] = {}
    for n, c in SIZES:
        torch.manual_seed(0)
        model, x, output_fn = make(n, c)
        model.eval()
        ours = partial(at.tangent_kernel, model, x, output_fn=output_fn)
        theirs = recipes.by_torch_func(model, x, output_fn)
        one, two = ours(), theirs()
        least = in_turns(ours, theirs)
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row |= {
            f"ms, {n}×{c}": 1e3 * least[0],
            f"vmap(jacrev) ms, {n}×{c}": 1e3 * least[1],
            f"ratio, {n}×{c}": least[1] / least[0],
        }
        row["passes"] = " + ".join(map(str, passes(model, ours)))
        row["difference"] = f"{float((one - two).abs().max() / two.abs().max()):.0e}"
    return row


def in_turns(*contenders: Callable[[], object]) -> list[float]:
    """The least processor seconds of each."""
    least, ended, rounds = [math.inf] * len(contenders), time.process_time() + SECONDS, 0
    while rounds < ROUNDS or (rounds < 5 * ROUNDS and time.process_time() < ended):
        for k, run in enumerate(contenders):
            started = time.process_time()
            run()
            least[k] = min(least[k], time.process_time() - started)
        rounds += 1
    return least


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
    """The geometric means of the ratios."""
    found: dict[str, Any] = {}
    for n, c in SIZES:
        name = f"ratio, {n}×{c}"
        ratios = [row[name] for row in rows.values() if name in row]
        if ratios:
            found[name] = math.prod(ratios) ** (1 / len(ratios))
    return {"geometric mean": found} if found else {}


contenders = {name: partial(beside, make) for name, make in SMALL.items()}
COLUMNS = [column for n, c in SIZES for column in (f"ms, {n}×{c}", f"vmap(jacrev) ms, {n}×{c}", f"ratio, {n}×{c}")]

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    contend(
        __file__, contenders, "full tangent kernels of small networks, samples × outputs, float32, one thread",
        ("parameters", *COLUMNS, "passes", "difference"), summary=mean,
    )  # fmt: skip
