"""Realistic networks at tiny widths, registered like the small ones of cases.py."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from cases import Batch, Case, Forward, normal, with_frozen, with_statistics

Made = tuple[nn.Module, Batch]


def indices(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape)


# Images.


class BasicBlock(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential()
        if stride > 1 or i != o:
            self.downsample = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        h += self.downsample(x)
        return self.relu(h)


def resnet18() -> Made:
    layers: list[nn.Module] = [nn.Conv2d(3, 2, 3, 1, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU(inplace=True)]
    for i, o, stride in ((2, 2, 1), (2, 3, 2), (3, 3, 2), (3, 4, 2)):
        layers += [BasicBlock(i, o, stride), BasicBlock(o, o, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double()
    return with_statistics(model), normal(2, 3, 8, 8)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


def mobilenet() -> Made:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, 2, 1, bias=False), nn.BatchNorm2d(3), nn.Hardswish(inplace=True),
        nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6(inplace=True),
        nn.Conv2d(6, 6, 3, 1, 1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6(inplace=True), SqueezeExcite(6),
        nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    return with_statistics(model.double()), normal(3, 2, 8, 8)


def mixer_layer(m: nn.Module, x: Tensor) -> Tensor:
    x = x + m.tokens_out(F.gelu(m.tokens_in(m.norm1(x).mT))).mT
    return x + m.channels_out(F.gelu(m.channels_in(m.norm2(x))))


def mixer() -> Made:
    layers = [
        Forward(
            mixer_layer, norm1=nn.LayerNorm(5), tokens_in=nn.Linear(4, 3), tokens_out=nn.Linear(3, 4),
            norm2=nn.LayerNorm(5), channels_in=nn.Linear(5, 6), channels_out=nn.Linear(6, 5),
        )
        for _ in range(2)
    ]  # fmt: skip
    model = Forward(
        lambda m, x: m.head(m.norm(m.layers(m.patches(x).flatten(2).mT)).mean(1)),
        patches=nn.Conv2d(2, 5, 4, 4), layers=nn.Sequential(*layers), norm=nn.LayerNorm(5), head=nn.Linear(5, 2),
    )  # fmt: skip
    return model, normal(4, 2, 8, 8)


def unet_forward(m: nn.Module, x: Tensor) -> Tensor:
    a = F.relu(m.down1(x), inplace=True)
    b = F.relu(m.down2(F.max_pool2d(a, 2)))
    c = F.relu(m.bottom(F.max_pool2d(b, 2)))
    b = F.relu(m.join2(torch.cat([m.up2(c), b], 1)))
    return m.out(F.relu(m.join1(torch.cat([m.up1(b), a], 1))))


def unet() -> Made:
    model = Forward(
        unet_forward, down1=nn.Conv2d(1, 2, 3, padding=1), down2=nn.Conv2d(2, 3, 3, padding=1),
        bottom=nn.Conv2d(3, 4, 3, padding=1), up2=nn.ConvTranspose2d(4, 3, 2, 2), join2=nn.Conv2d(6, 3, 3, padding=1),
        up1=nn.ConvTranspose2d(3, 2, 2, 2), join1=nn.Conv2d(4, 2, 3, padding=1), out=nn.Conv2d(2, 2, 1),
    )  # fmt: skip
    return model, normal(3, 1, 8, 8)


# Transformers.


def transformer_block(m: nn.Module, x: Tensor, *, causal: bool) -> Tensor:
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in m.qkv(m.norm1(x)).chunk(3, -1))
    h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    x = x + m.dropout(m.proj(h.transpose(1, 2).flatten(2)))
    return x + m.down(F.gelu(m.up(m.norm2(x))))


def blocks(width: int, *, causal: bool) -> nn.Module:
    return nn.Sequential(*[
        Forward(
            lambda m, x: transformer_block(m, x, causal=causal), norm1=nn.LayerNorm(width), norm2=nn.LayerNorm(width),
            qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width), up=nn.Linear(width, 6),
            down=nn.Linear(6, width), dropout=nn.Dropout(0.1),
        )
        for _ in range(2)
    ])  # fmt: skip


def gpt_forward(m: nn.Module, ids: Tensor) -> Tensor:
    x = m.tokens(ids) + m.places(torch.arange(ids.shape[1], device=ids.device))
    return m.head(m.norm(m.blocks(x)))


def gpt(*, tied: bool) -> Made:
    model = Forward(
        gpt_forward, tokens=nn.Embedding(9, 4), places=nn.Embedding(5, 4), blocks=blocks(4, causal=True),
        norm=nn.LayerNorm(4), head=nn.Linear(4, 9, bias=False),
    )  # fmt: skip
    if tied:
        model.head.weight = model.tokens.weight
    return model, indices(9, 4, 5)


def tied(m: nn.Module, ids: Tensor) -> Tensor:
    return F.linear(torch.tanh(m.mix(m.table(ids).mean(1))), m.table.weight)[:, :3]


def vit_forward(m: nn.Module, x: Tensor) -> Tensor:
    patches = m.patches(x).flatten(2).mT
    x = torch.cat([m.first.expand(len(x), -1, -1), patches], 1) + m.places
    return m.head(m.norm(m.blocks(x))[:, 0])


def vit() -> Made:
    model = Forward(
        vit_forward, patches=nn.Conv2d(2, 4, 4, 4), first=normal(1, 1, 4), places=normal(1, 5, 4),
        blocks=blocks(4, causal=False), norm=nn.LayerNorm(4), head=nn.Linear(4, 2),
    )  # fmt: skip
    return model, normal(3, 2, 8, 8)


def encoder(*, batch_first: bool, norm_first: bool) -> Made:
    layer = nn.TransformerEncoderLayer(4, 2, 5, 0.1, "gelu", batch_first=batch_first, norm_first=norm_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about nested tensors that are not used
        body = nn.TransformerEncoder(layer, 2)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(m.body(x).mean(1) if batch_first else m.body(x.transpose(0, 1)).mean(0))

    return Forward(forward, body=body, head=nn.Linear(4, 2)), normal(3, 4, 4)


def translator() -> Made:
    body = nn.Transformer(4, 2, 1, 1, 5, 0.1, batch_first=True)
    model = Forward(lambda m, x, y: m.head(m.body(x, y)[:, -1]), body=body, head=nn.Linear(4, 2))
    return model, (normal(3, 4, 4), normal(3, 2, 4))


def self_attention(**keywords: Any) -> Callable[[], Made]:
    def make() -> Made:
        body = nn.MultiheadAttention(4, 2, batch_first=True, **keywords)
        model = Forward(lambda m, x: m.body(x, x, x, need_weights=False)[0].mean(1)[:, :2], body=body)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)  # zero initialization would hide errors
        return model, normal(3, 4, 4)

    return make


def cross_attention(**keywords: Any) -> Callable[[], Made]:
    def make() -> Made:
        widths = (keywords.get("kdim", 4), keywords.get("vdim", 4))
        body = nn.MultiheadAttention(4, 2, batch_first=True, **keywords)
        model = Forward(lambda m, *x: m.body(*x)[0].mean(1)[:, :2], body=body)
        return model, (normal(3, 2, 4), *(normal(3, 4, width) for width in widths))

    return make


def recurrent(layer: type[nn.RNNBase], *, batch_first: bool = True, **keywords: Any) -> Callable[[], Made]:
    def make() -> Made:
        body = layer(3, 4, batch_first=batch_first, **keywords)
        width = (keywords.get("proj_size") or 4) * (1 + keywords.get("bidirectional", False))

        def forward(m: nn.Module, x: Tensor) -> Tensor:
            return m.out(m.body(x)[0][:, -1] if batch_first else m.body(x.transpose(0, 1))[0][-1])

        return Forward(forward, body=body, out=nn.Linear(width, 2)), normal(4, 3, 3)

    return make


# Other architectures.


def graph_forward(m: nn.Module, x: Tensor, adjacency: Tensor) -> Tensor:
    degrees = 1 + adjacency.sum(-1, keepdim=True)
    for layer in (m.first, m.second):
        x = F.relu(layer((x + adjacency @ x) / degrees))
    return m.out(x.sum(1))


def graphs() -> Made:
    upper = torch.triu(torch.rand(4, 5, 5) < 0.5, 1).double()
    model = Forward(graph_forward, first=nn.Linear(3, 4), second=nn.Linear(4, 4), out=nn.Linear(4, 2))
    return model, (normal(4, 5, 3), upper + upper.mT)


def siamese() -> Made:
    trunk = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 4), nn.Tanh())
    model = Forward(lambda m, a, b: m.head((m.trunk(a) - m.trunk(b)).abs()), trunk=trunk, head=nn.Linear(4, 1))
    return model, (normal(4, 2, 6), normal(4, 2, 6))


def deep_sets() -> Made:
    element = nn.Sequential(nn.Linear(3, 5), nn.ELU(), nn.Linear(5, 4))
    model = Forward(
        lambda m, x, mask: m.total((m.element(x) * mask[..., None]).sum(1)), element=element,
        total=nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 2)),
    )  # fmt: skip
    return model, {"x": normal(4, 5, 3), "mask": indices(2, 4, 5).double()}


def sparse_mixture(m: nn.Module, x: Tensor) -> Tensor:
    """The best two of three experts for every token, each expert run on the tokens that chose it."""
    tokens = x.flatten(0, 1)
    weights, chosen = m.gate(tokens).softmax(-1).topk(2, -1)
    out = torch.zeros_like(tokens)
    for k, expert in enumerate(m.experts):
        rows, which = (chosen == k).nonzero(as_tuple=True)
        out = out.index_add(0, rows, weights[rows, which, None] * expert(tokens[rows]))
    return m.out(out.unflatten(0, x.shape[:2]).mean(1))


def mixture() -> Made:
    experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 4)) for _ in range(3))
    return Forward(sparse_mixture, gate=nn.Linear(4, 3), experts=experts, out=nn.Linear(4, 2)), normal(4, 3, 4)


def soft_mixture() -> Made:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        made = torch.stack([expert(x) for expert in m.experts], -1)
        return (made * m.gate(x).softmax(-1)[:, None]).sum(-1)

    experts = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))
    return Forward(forward, gate=nn.Linear(4, 3), experts=experts), normal(4, 4)


def hypernetwork() -> Made:
    def forward(m: nn.Module, x: Tensor, task: Tensor) -> Tensor:
        weights = m.second(F.relu(m.first(task))).unflatten(-1, (2, 4))
        return torch.einsum("noi,ni->no", weights, x)

    return Forward(forward, first=nn.Linear(3, 4), second=nn.Linear(4, 8)), (normal(4, 4), normal(4, 3))


def functional(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.einsum("nti,hio->ntho", x, m.heads).flatten(2)
    return torch.addmm(m.shift, F.linear(h.tanh().mean(1), m.w1, m.b1).relu(), m.w2)


def fourier(m: nn.Module, x: Tensor) -> Tensor:
    return m.out(torch.fft.irfft(torch.fft.rfft(x) * m.filter, n=x.shape[-1]).tanh())


class LoRA(nn.Module):
    """A frozen layer and a trainable change of low rank."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


def lora() -> Made:
    base = nn.Sequential(LoRA(nn.Linear(4, 5)), nn.LayerNorm(5), nn.GELU(), LoRA(nn.Linear(5, 2))).double()
    return with_frozen(
        base, "1.weight", "1.bias", *(f"{k}.base.{p}" for k in (0, 3) for p in ("weight", "bias"))
    ), normal(5, 4)


def labeled() -> Made:
    model = Forward(
        lambda m, x, y: {"logits": m.out(F.relu(m.fc(x))), "labels": y}, fc=nn.Linear(4, 6), out=nn.Linear(6, 3)
    )
    return model, {"x": normal(5, 4), "y": indices(3, 5)}


def losses(out: Any) -> Tensor:
    return F.cross_entropy(out["logits"], out["labels"], reduction="none")[:, None]


# Weights made from other parameters.


def with_weights_by(change: Callable[[nn.Module], nn.Module]) -> Callable[[], Made]:
    def make() -> Made:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about deprecated hooks
            model = nn.Sequential(change(nn.Conv1d(2, 3, 2)), nn.Tanh(), nn.Flatten(), change(nn.Linear(9, 4)),
                nn.Tanh(), nn.Linear(4, 2)).double()  # fmt: skip
        x = normal(4, 2, 4)
        with torch.no_grad():
            model(x)  # afterwards the deprecated hooks hold weights that can be copied
        return model, x

    return make


def checkpointed() -> Made:
    body = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 4))
    model = Forward(
        lambda m, x: m.out(checkpoint(m.body, m.first(x), use_reentrant=False)), first=nn.Linear(4, 4), body=body,
        out=nn.Linear(4, 2),
    )  # fmt: skip
    return model, normal(5, 4)


# Precisions.


def in_dtype(dtype: torch.dtype) -> Callable[[], Made]:
    def make() -> Made:
        model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(16, 5), nn.LayerNorm(5), nn.Tanh(),
            nn.Linear(5, 2))  # fmt: skip
        return model.to(dtype), normal(4, 2, 6).to(dtype)

    return make


def mixed() -> Made:
    model = Forward(
        lambda m, x: m.head(m.norm(m.trunk(x.bfloat16()).float())),
        trunk=nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5)), norm=nn.LayerNorm(5), head=nn.Linear(5, 2),
    ).float()  # fmt: skip
    model.trunk.bfloat16()
    return model, normal(5, 4).float()


def of(function: Callable[..., Any], x: Callable[[], Batch], **parts: Callable[[], Any]) -> Callable[[], Made]:
    return lambda: (Forward(function, **{name: part() for name, part in parts.items()}), x())


def real(name: str, make: Callable[[], Made], *may_be_whole: str, **keywords: Any) -> Case:
    return Case(name, make, may_be_whole=may_be_whole, **keywords)


CASES = (
    real("ResNet-18", resnet18),
    real("MobileNet", mobilenet, "6.weight"),
    real("MLP-Mixer", mixer),
    real("U-Net, pooled", unet, output_fn=lambda out: out.mean((2, 3))),
    real("U-Net, one pixel", unet, output_fn=lambda out: out[:, :, 2, 3]),
    real("GPT", lambda: gpt(tied=False), "places.weight", output_fn=lambda out: out[:, -1, :2]),
    real("GPT with one table", lambda: gpt(tied=True), "places.weight", "tokens.weight",
        output_fn=lambda out: out[:, -1, [0, 4, 8]]),
    real("a table used as a matrix too", of(tied, lambda: indices(7, 4, 3), table=lambda: nn.Embedding(7, 4),
        mix=lambda: nn.Linear(4, 4)), "table.weight"),
    real("ViT", vit, "first", "places"),
    *(real(f"TransformerEncoder, {'batch' if batch_first else 'tokens'} first, {'pre' if norm_first else 'post'}-norm",
        lambda b=batch_first, n=norm_first: encoder(batch_first=b, norm_first=n))
        for batch_first in (True, False) for norm_first in (True, False)),
    real("Transformer", translator),
    real("MultiheadAttention", self_attention()),
    real("MultiheadAttention without bias", self_attention(bias=False)),
    real("MultiheadAttention with a bias key", self_attention(add_bias_kv=True, add_zero_attn=True), "body.bias_?"),
    real("MultiheadAttention across", cross_attention()),
    real("MultiheadAttention across widths", cross_attention(kdim=3, vdim=5)),
    real("LSTM of two layers, both ways", recurrent(nn.LSTM, num_layers=2, bidirectional=True)),
    real("LSTM with a projection, tokens first", recurrent(nn.LSTM, batch_first=False, proj_size=2)),
    real("GRU", recurrent(nn.GRU, num_layers=2)),
    real("GRU without bias, both ways, tokens first",
        recurrent(nn.GRU, batch_first=False, bias=False, bidirectional=True)),
    real("RNN", recurrent(nn.RNN, nonlinearity="relu")),
    real("Bilinear", of(lambda m, a, b: m.out(m.pair(a, b).tanh()), lambda: (normal(5, 3), normal(5, 4)),
        pair=lambda: nn.Bilinear(3, 4, 5), out=lambda: nn.Linear(5, 2)), "pair.weight"),
    real("Embedding with padding", of(lambda m, x: m.out(m.table(x).tanh().mean(1)), lambda: indices(4, 5, 3),
        table=lambda: nn.Embedding(6, 4, padding_idx=1), out=lambda: nn.Linear(4, 2))),
    *(real(f"EmbeddingBag, {mode}", of(lambda m, x: m.out(m.table(x).tanh()), lambda: indices(4, 5, 3),
        table=lambda mode=mode: nn.EmbeddingBag(6, 4, mode=mode, padding_idx=1), out=lambda: nn.Linear(4, 2)),
        *(["table.weight"] if mode == "max" else [])) for mode in ("mean", "sum", "max")),
    real("EmbeddingBag with weights", of(lambda m, x, w: m.out(m.table(x, per_sample_weights=w).tanh()),
        lambda: (indices(6, 5, 3), normal(5, 3)), table=lambda: nn.EmbeddingBag(6, 4, mode="sum"),
        out=lambda: nn.Linear(4, 2)), "table.weight"),
    real("graph convolution", graphs),
    real("siamese network", siamese),
    real("DeepSets", deep_sets),
    real("experts chosen by tokens", mixture, "experts.*"),
    real("experts mixed softly", soft_mixture),
    real("hypernetwork", hypernetwork),
    real("functional weights", of(functional, lambda: normal(4, 3, 4), heads=lambda: normal(2, 4, 3),
        w1=lambda: normal(5, 6), b1=lambda: normal(5), w2=lambda: normal(5, 2), shift=lambda: normal(2)),
        "heads", "w1", "w2"),
    real("Fourier filter", of(fourier, lambda: normal(4, 6), filter=lambda: normal(4), out=lambda: nn.Linear(6, 2))),
    real("LoRA", lora),
    # Operations whose batching rules are wrong for some sizes.
    real("PReLU, samples as many as outputs", lambda: (nn.Sequential(nn.Linear(4, 3), nn.PReLU(), nn.Linear(3, 3),
        nn.PReLU(3)).double(), normal(3, 4))),
    real("PReLU of images, samples as many as outputs", lambda: (nn.Sequential(nn.Conv2d(2, 3, 3), nn.PReLU(3),
        nn.Conv2d(3, 4, 2), nn.PReLU(), nn.Flatten(), nn.Linear(4, 4)).double(), normal(4, 2, 4, 4))),
    real("distances to learned centers", of(lambda m, x: m.out((-torch.cdist(x, m.centers)).exp()), lambda: normal(5, 4),
        centers=lambda: normal(3, 4), out=lambda: nn.Linear(3, 2)), "centers"),
    real("losses of samples as output", labeled, output_fn=losses),
    real("weight norm by hooks", with_weights_by(nn.utils.weight_norm), "*_v", "*_g"),
    real("spectral norm by hooks", with_weights_by(nn.utils.spectral_norm), "*_orig"),
    real("weight norm by parametrization", with_weights_by(parametrizations.weight_norm), "*.original*"),
    real("spectral norm by parametrization", with_weights_by(parametrizations.spectral_norm), "*.original*"),
    real("orthogonal weights", with_weights_by(lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley")
        if isinstance(layer, nn.Linear) else layer), "*.original*", "*.base"),
    real("activation checkpointing", checkpointed, "body.*"),
    real("bfloat16", in_dtype(torch.bfloat16), tolerance=0.15),
    real("float16", in_dtype(torch.float16), tolerance=0.02),
    real("bfloat16 trunk, float32 head", mixed, tolerance=0.15),
)  # fmt: skip
