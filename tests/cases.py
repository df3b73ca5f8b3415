"""The networks on which every promise about features is tested. To add one, add an entry to CASES.

Models are in eval mode and made under a fixed seed; ``Case.build`` leaves the global random state alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One network on one batch, and what its features must be like.

    ``factored`` names the blocks that must come in factors; no others may. Large networks give ``may_be_whole`` instead:
    patterns of the only parameters of two or more dimensions that may be materialized. ``output`` and ``wrt`` are
    arguments of tangent_features, and ``names`` the parameters that ``wrt`` means, if given. If autograd refuses the model
    as written, ``twin`` makes the same function for the reference. ``tolerance`` is for a dtype less precise than float32;
    the case is skipped without the package ``requires``.
    """

    name: str
    make: Callable[[], tuple[nn.Module, Batch]]
    factored: tuple[str, ...] = ()
    output_fn: Callable[[Any], Tensor] | None = None
    wrt: str | tuple[str, ...] | None = None
    names: tuple[str, ...] | None = None
    twin: Callable[[], nn.Module] | None = None
    may_be_whole: tuple[str, ...] | None = None
    tolerance: float | None = None
    requires: str | None = None

    def build(self, seed: int = 0) -> tuple[nn.Module, Batch]:
        """The model in eval mode and the batch."""
        if self.requires is not None:
            pytest.importorskip(self.requires)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, x = self.make()
        return model.eval(), x

    def reference_model(self, model: nn.Module) -> nn.Module:
        """A model that autograd differentiates as it is, with the same parameters."""
        if self.twin is None:
            return model
        twin = self.twin().to(next(model.parameters()).dtype).eval()
        twin.load_state_dict(model.state_dict())
        return twin


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def mlp(activation: Callable[[], nn.Module], *, bias: bool = True, widths: tuple[int, ...] = (4, 6, 5, 3)) -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o, bias=bias), activation()]
    return nn.Sequential(*layers[:-1]).double()


class Forward(nn.Module):
    """A module from parts and a function of (self, x, ...), so that a case defines both in one place."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.double()

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.function(self, *arguments, **keywords)


def with_shared_weight(*, bias: bool) -> nn.Module:
    model = Forward(
        lambda m, x: m.out(torch.tanh(m.b(torch.tanh(m.a(x))))),
        a=nn.Linear(4, 4, bias=bias),
        b=nn.Linear(4, 4, bias=bias),
        out=nn.Linear(4, 2),
    )
    model.b.weight = model.a.weight
    return model


def with_frozen(model: nn.Module, *names: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)
    return model


def with_statistics(model: nn.Module) -> nn.Module:
    """Running statistics of batch norms other than those of a new layer."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.normal_()
    return model


def with_hook(model: nn.Module) -> nn.Module:
    model[0].register_forward_hook(lambda module, arguments, out: 2 * out.sin())
    model[2].register_forward_pre_hook(lambda module, arguments: (arguments[0] ** 2,))
    return model


def with_own_forward_on_the_instance() -> nn.Module:
    model = mlp(nn.Tanh)
    model[0].forward = MethodType(lambda layer, x: F.linear(x, layer.weight, layer.bias) * (1 + 1e-7), model[0])
    return model


class Scaled(nn.Linear):
    """A layer that looks like Linear but is not."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * (1 + 1e-7)


class Renamed(nn.Linear):
    """A Linear layer with another name and one more attribute."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.extra = nn.Parameter(torch.ones(()))


def overwritten(m: nn.Module, x: Tensor) -> Tensor:
    h = m.fc(x)
    x.relu_()
    return m.out(torch.tanh(h)) + x[:, :2]


def not_overwritten(m: nn.Module, x: Tensor) -> Tensor:
    return m.out(torch.tanh(m.fc(x))) + x.relu()[:, :2]


def shifted_input(m: nn.Module, x: Tensor) -> Tensor:
    x.sub_(0.5)
    return m.fc(x).tanh()


def branch(m: nn.Module, x: Tensor) -> Tensor:
    """A scale that depends on the sample through .item(), which vmap refuses."""
    signs = [1.0 if row.sum().item() > 0 else -0.5 for row in x]
    return m.fc(x) * torch.tensor(signs, dtype=x.dtype)[:, None] * m.scale


def routed(m: nn.Module, x: Tensor) -> Tensor:
    """A layer that sees the batch in another order: sorted by a gate, then restored."""
    order = x[:, 0].argsort(descending=True)
    return m.out(torch.tanh(m.fc(x[order]))[order.argsort()])


def experts(m: nn.Module, x: Tensor) -> Tensor:
    """Each sample goes through one of two layers, so each layer sees part of the batch."""
    first = x[:, 0] > 0
    out = x.new_zeros(len(x), 2)
    out[first] = m.a(x[first])
    out[~first] = m.b(x[~first])
    return m.out(out.tanh())


def attention(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = m.q(x), m.k(x), m.v(x)
    return m.out((torch.softmax(q @ k.mT / 2, -1) @ v).mean(1))


def pooled_by_query(m: nn.Module, x: Tensor) -> Tensor:
    """One learned query for all samples has its own layer, whose first dimension is not the samples."""
    weights = torch.softmax((m.keys(x) @ m.to_query(m.query).mT)[..., 0], -1)
    return m.out((weights[:, :, None] * x).sum(1))


def two_queries(m: nn.Module, x: Tensor) -> Tensor:
    scores = m.keys(x) @ m.to_query(m.query).mT
    return m.out((torch.softmax(scores, 1).mean(-1)[:, :, None] * x).sum(1))


def normed(weight: nn.Linear) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(weight)


def linear_with(shape: tuple[int, ...], function: Callable[..., Tensor]) -> Callable[[], tuple[nn.Module, Batch]]:
    return lambda: (Forward(function, free=normal(*shape), fc=nn.Linear(4, 3)), normal(5, 4))


CASES = (
    Case("linear map", lambda: (Forward(lambda m, x: x @ m.w.T, w=normal(2, 4)), normal(5, 4)), ("w",)),
    Case("bare Linear", lambda: (nn.Linear(4, 3).double(), normal(5, 4)), ("weight",)),
    Case("bare Linear without bias", lambda: (nn.Linear(4, 3, bias=False).double(), normal(5, 4)), ("weight",)),
    Case("ReLU", lambda: (mlp(nn.ReLU), normal(6, 4)), ("0", "2", "4")),
    Case("ReLU in place", lambda: (mlp(lambda: nn.ReLU(inplace=True)), normal(6, 4)), ("0", "2", "4")),
    Case("Tanh", lambda: (mlp(nn.Tanh), normal(6, 4)), ("0", "2", "4")),
    Case("GELU", lambda: (mlp(nn.GELU), normal(6, 4)), ("0", "2", "4")),
    Case("float32", lambda: (mlp(nn.Tanh).float(), normal(6, 4).float()), ("0", "2", "4")),
    Case("one sample", lambda: (mlp(nn.Tanh), normal(1, 4)), ("0", "2", "4")),
    Case("one output", lambda: (mlp(nn.Tanh, widths=(4, 6, 1)), normal(7, 4)), ("0", "2")),
    Case("no bias", lambda: (mlp(nn.ReLU, bias=False), normal(6, 4)), ("0", "2", "4")),
    Case("wide output", lambda: (mlp(nn.Tanh, widths=(3, 4, 17)), normal(4, 3)), ("0", "2")),
    Case("dropout in eval", lambda: (nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2)).double(),
        normal(5, 4)), ("0", "2")),
    Case("bias by keyword", lambda: (Forward(lambda m, x: m.fc(input=x).tanh(), fc=nn.Linear(4, 3)), normal(5, 4)),
        ("fc",)),
    Case("frozen layers", lambda: (with_frozen(mlp(nn.Tanh), "0.weight", "0.bias", "2.weight", "4.bias"), normal(5, 4)),
        ("2.bias", "4.weight")),
    Case("wrt patterns", lambda: (with_frozen(mlp(nn.Tanh), "0.weight"), normal(5, 4)), ("0", "4.weight"),
        wrt=("0.*", "4.weight"), names=("0.weight", "0.bias", "4.weight")),
    Case("wrt of the biases", lambda: (mlp(nn.Tanh), normal(5, 4)), ("0.bias", "2.bias", "4.bias"), wrt="*.bias",
        names=("0.bias", "2.bias", "4.bias")),
    Case("tokens", lambda: (Forward(lambda m, x: m.b(m.a(x).tanh()).mean(1), a=nn.Linear(4, 5), b=nn.Linear(5, 2)),
        normal(5, 3, 4)), ("a", "b")),
    Case("as many tokens as samples", lambda: (Forward(lambda m, x: m.b(m.a(x).tanh()).mean(1), a=nn.Linear(4, 5),
        b=nn.Linear(5, 2)), normal(3, 3, 4)), ("a", "b")),
    Case("tokens first", lambda: (Forward(lambda m, x: m.b(m.a(x.transpose(0, 1)).tanh()).mean(0), a=nn.Linear(4, 5),
        b=nn.Linear(5, 2)), normal(3, 3, 4)), ("a", "b")),
    Case("samples and tokens as one dimension", lambda: (Forward(
        lambda m, x: m.b(m.a(x.flatten(0, 1)).tanh().unflatten(0, x.shape[:2]).mean(1)), a=nn.Linear(4, 5),
        b=nn.Linear(5, 2)), normal(4, 3, 4)), ("a", "b")),
    Case("attention", lambda: (Forward(attention, q=nn.Linear(4, 4), k=nn.Linear(4, 4), v=nn.Linear(4, 4),
        out=nn.Linear(4, 2)), normal(4, 3, 4)), ("q", "k", "v", "out")),
    Case("a learned query", lambda: (Forward(pooled_by_query, query=normal(1, 4), to_query=nn.Linear(4, 4),
        keys=nn.Linear(4, 4), out=nn.Linear(4, 2)), normal(4, 3, 4)), ("keys", "out")),
    Case("a learned query and one sample", lambda: (Forward(pooled_by_query, query=normal(1, 4),
        to_query=nn.Linear(4, 4), keys=nn.Linear(4, 4), out=nn.Linear(4, 2)), normal(1, 3, 4)),
        ("to_query", "keys", "out")),
    Case("two learned queries and two samples", lambda: (Forward(two_queries, query=normal(2, 4),
        to_query=nn.Linear(4, 4), keys=nn.Linear(4, 4), out=nn.Linear(4, 2)), normal(2, 3, 4)), ("keys", "out")),
    Case("a layer called twice", lambda: (Forward(lambda m, x: m.out(m.fc(m.fc(x).tanh()).tanh()), fc=nn.Linear(4, 4),
        out=nn.Linear(4, 2)), normal(5, 4)), ("fc", "out")),
    Case("a layer called on tokens and on their mean", lambda: (Forward(
        lambda m, x: m.out(m.fc(m.fc(x).tanh().mean(1))), fc=nn.Linear(4, 4), out=nn.Linear(4, 2)), normal(5, 3, 4)),
        ("fc", "out")),
    Case("a layer whose second output is unused", lambda: (Forward(lambda m, x: (m.fc(x).tanh(), m.fc(x**2))[0],
        fc=nn.Linear(4, 2)), normal(5, 4)), ("fc",)),
    Case("a layer called under no_grad too", lambda: (Forward(
        lambda m, x: m.fc(x).tanh() + 0 * m.fc(x).detach(), fc=nn.Linear(4, 2)), normal(5, 4)), ("fc",)),
    Case("two layers with one weight", lambda: (with_shared_weight(bias=True), normal(5, 4)),
        ("a.weight", "a.bias", "b.bias", "out")),
    Case("two layers with one weight and no bias", lambda: (with_shared_weight(bias=False), normal(5, 4)),
        ("a", "out")),
    Case("a weight also used beside its layer", lambda: (Forward(
        lambda m, x: F.linear(m.fc(x).tanh(), m.fc.weight), fc=nn.Linear(4, 4)), normal(5, 4)), ("fc",)),
    Case("a weight penalized in the output", lambda: (Forward(
        lambda m, x: m.fc(x) + m.fc.weight.square().sum() + m.fc.bias[0], fc=nn.Linear(4, 3)), normal(5, 4))),
    Case("a weight penalized a little in the output", lambda: (Forward(
        lambda m, x: m.fc(x) + 1e-8 * m.fc.weight.square().sum(), fc=nn.Linear(4, 3)), normal(5, 4))),
    Case("a lone scale", linear_with((), lambda m, x: m.free * m.fc(x)), ("fc",)),
    Case("a lone vector", linear_with((4,), lambda m, x: m.fc(x * m.free)), ("fc",)),
    Case("a lone matrix", linear_with((4, 4), lambda m, x: m.fc((x @ m.free).tanh())), ("free", "fc")),
    Case("a lone empty parameter", linear_with((0,), lambda m, x: m.fc(x) + m.free.sum()), ("fc",)),
    Case("an unused parameter", linear_with((2, 2), lambda m, x: m.fc(x)), ("fc",)),
    Case("an unused layer", lambda: (Forward(lambda m, x: (m.out(x), m.spare(x))[0], spare=nn.Linear(4, 3),
        out=nn.Linear(4, 2)), normal(5, 4)), ("out",)),
    Case("LayerNorm", lambda: (nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)).double(),
        normal(5, 4)), ("0", "3")),
    Case("BatchNorm in eval", lambda: (with_statistics(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(),
        nn.Linear(5, 2)).double()), normal(5, 4)), ("0", "3")),
    Case("convolutions", lambda: (nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.Flatten(),
        nn.Linear(8, 2)).double(), normal(4, 2, 5, 5)), ("0", "2", "4")),
    Case("convolutions with strides, dilation and padding", lambda: (nn.Sequential(nn.Conv2d(2, 3, (3, 2), stride=(2, 1),
        padding=(1, 2), dilation=(1, 2)), nn.Tanh(), nn.Conv2d(3, 2, 2, padding="same", bias=False), nn.Flatten(),
        nn.Linear(42, 2)).double(), normal(4, 2, 5, 5)), ("0", "2", "4")),
    *(Case(f"{mode} padding", lambda mode=mode: (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).double(), normal(4, 2, 5, 4)), ("0", "4"))
        for mode in ("reflect", "replicate", "circular")),
    Case("convolution in one dimension", lambda: (nn.Sequential(nn.Conv1d(2, 3, 3, stride=2), nn.Tanh(), nn.Flatten(),
        nn.Linear(9, 2)).double(), normal(4, 2, 7)), ("0", "3")),
    Case("convolution in three dimensions", lambda: (nn.Sequential(nn.Conv3d(2, 3, (1, 2, 2), padding=(0, 1, 0)), nn.Tanh(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 2)).double(), normal(3, 2, 2, 3, 3)), ("0", "4")),
    Case("grouped and depthwise convolutions", lambda: (nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(),
        nn.Conv2d(6, 6, 2, groups=6, bias=False), nn.Flatten(), nn.Linear(24, 2)).double(), normal(4, 4, 4, 4)), ("4",)),
    Case("transposed convolutions", lambda: (nn.Sequential(nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0),
        output_padding=(1, 0)), nn.Tanh(), nn.ConvTranspose2d(3, 2, 2, dilation=2, bias=False), nn.Flatten(),
        nn.Linear(96, 2)).double(), normal(4, 2, 3, 3)), ("0.weight", "2.weight", "4")),
    Case("a transposed convolution with room left over", lambda: (nn.Sequential(nn.ConvTranspose1d(2, 3, 2, dilation=3,
        output_padding=2), nn.Flatten(), nn.Linear(27, 2)).double(), normal(4, 2, 4)), ("0.weight", "2")),
    Case("a grouped transposed convolution", lambda: (nn.Sequential(nn.ConvTranspose3d(4, 6, (1, 2, 2), stride=2, groups=2),
        nn.Tanh(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 2)).double(), normal(3, 4, 2, 2, 2)), ("4",)),
    Case("a convolution without samples", lambda: (Forward(lambda m, x: m.out(torch.stack([m.conv(one) for one in x])
        .mean((2, 3)).tanh()), conv=nn.Conv2d(4, 3, 2), out=nn.Linear(3, 2)), normal(4, 4, 3, 3)), ("out",)),
    Case("a convolution called twice", lambda: (Forward(lambda m, x: m.out(m.conv(m.conv(x).tanh()).mean((2, 3))),
        conv=nn.Conv2d(2, 2, 2), out=nn.Linear(2, 3)), normal(4, 2, 4, 4)), ("conv", "out")),
    Case("a frozen convolution's bias", lambda: (with_frozen(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(27, 2)).double(), "0.weight"), normal(4, 2, 5, 5)), ("0.bias", "3")),
    Case("norms of images", lambda: (with_statistics(nn.Sequential(nn.Conv2d(2, 4, 2, bias=False), nn.BatchNorm2d(4),
        nn.ReLU(inplace=True), nn.Conv2d(4, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.InstanceNorm2d(4, affine=True),
        nn.Flatten(), nn.Linear(36, 2)).double()), normal(4, 2, 5, 5)), ("0", "3", "8")),
    Case("InstanceNorm with running statistics", lambda: (with_statistics(nn.Sequential(nn.Conv1d(2, 3, 2),
        nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).double()),
        normal(4, 2, 5)), ("0", "4")),
    Case("norms of tokens", lambda: (Forward(lambda m, x: m.out(m.rms(m.layer(m.fc(x).tanh())).mean(1)),
        fc=nn.Linear(4, 5), layer=nn.LayerNorm((3, 5)), rms=nn.RMSNorm(5), out=nn.Linear(5, 2)), normal(4, 3, 4)),
        ("fc", "out")),
    Case("a residual network", lambda: (Forward(lambda m, x: m.out((m.c(F.relu(m.n(m.b(m.a(x))))) + m.a(x)).mean((2, 3))),
        a=nn.Conv2d(2, 3, 1), b=nn.Conv2d(3, 3, 3, padding=1), n=nn.BatchNorm2d(3), c=nn.Conv2d(3, 3, 3, padding=1),
        out=nn.Linear(3, 2)), normal(4, 2, 4, 4)), ("a", "b", "c", "out")),
    Case("LSTM", lambda: (Forward(lambda m, x: m.out(m.rnn(x)[0][:, -1]), rnn=nn.LSTM(3, 4, batch_first=True),
        out=nn.Linear(4, 2)), normal(4, 3, 3)), ("rnn.weight_ih_l0", "rnn.weight_hh_l0", "out")),
    Case("embedding of indices", lambda: (Forward(lambda m, x: m.out(m.table(x).mean(1)), table=nn.Embedding(7, 4),
        out=nn.Linear(4, 2)), torch.randint(7, (5, 3))), ("table", "out")),
    Case("control flow by item()", lambda: (Forward(branch, fc=nn.Linear(4, 2), scale=normal(2)), normal(5, 4)),
        ("fc",)),
    Case("control flow by numpy()", lambda: (Forward(
        lambda m, x: m.fc(x) * m.scale * torch.from_numpy(np.sign(x.detach().numpy())), fc=nn.Linear(2, 2),
        scale=normal(2)), normal(5, 2)), ("fc",)),
    Case("a gate that sorts the batch", lambda: (Forward(routed, fc=nn.Linear(4, 5), out=nn.Linear(5, 2)),
        normal(6, 4)), ("out",)),
    Case("experts", lambda: (Forward(experts, a=nn.Linear(4, 2), b=nn.Linear(4, 2), out=nn.Linear(2, 2)),
        normal(6, 4)), ("out",)),
    Case("a tuple of inputs", lambda: (Forward(lambda m, x, z: m.out(m.a(x).tanh() * m.b(z)), a=nn.Linear(4, 5),
        b=nn.Linear(2, 5), out=nn.Linear(5, 2)), (normal(5, 4), normal(5, 2))), ("a", "b", "out")),
    Case("a dict of inputs and an output picked", lambda: (Forward(
        lambda m, x, mask: {"logits": m.out(m.a(x).tanh() * mask), "other": x}, a=nn.Linear(4, 5),
        out=nn.Linear(5, 2)), {"x": normal(5, 4), "mask": torch.randint(2, (5, 5))}), ("a", "out"),
        output_fn=lambda out: out["logits"]),
    Case("an input overwritten after a layer saw it", lambda: (Forward(overwritten, fc=nn.Linear(4, 5),
        out=nn.Linear(5, 2)), normal(5, 4)), ("fc", "out"),
        twin=lambda: Forward(not_overwritten, fc=nn.Linear(4, 5), out=nn.Linear(5, 2))),
    Case("an input shifted in place", lambda: (Forward(shifted_input, fc=nn.Linear(4, 2)), normal(5, 4)), ("fc",)),
    Case("hooks of the user", lambda: (with_hook(mlp(nn.Tanh)), normal(5, 4)), ("0", "2", "4")),
    Case("a subclass with its own forward", lambda: (nn.Sequential(Scaled(4, 5), nn.Tanh(), nn.Linear(5, 2)).double(),
        normal(5, 4)), ("0.weight", "2")),
    Case("a subclass without its own forward", lambda: (nn.Sequential(Renamed(4, 5), nn.Tanh(),
        nn.Linear(5, 2)).double(), normal(5, 4)), ("0", "2")),
    Case("a forward set on the instance", lambda: (with_own_forward_on_the_instance(), normal(5, 4)), ("0.weight", "2", "4")),
    Case("weight norm", lambda: (nn.Sequential(normed(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2)).double(),
        normal(5, 4)), ("0.bias", "2")),
    Case("an input that requires a gradient", lambda: (mlp(nn.Tanh), normal(5, 4).requires_grad_()), ("0", "2", "4")),
)  # fmt: skip

by_name = {case.name: case for case in CASES}
assert len(by_name) == len(CASES)
