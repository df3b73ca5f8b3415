"""Random modules for property tests: short programs of layers, weights, slices, sums and reuse on a few numbers.

To add an operation, write a function of (module, h, a, b) under ``@operation``. ``a`` and ``b`` are small integers that are
drawn. Samples come first in h and never meet. Parts that the operation asks for are made when the module is built. Where an
operation does not fit the shape of h, the step is left out.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

MOST = 160  # numbers of one sample within a module
Operation = Callable[["RandomModule", Tensor, int, int], Tensor]
OPERATIONS: dict[str, Operation] = {}


def operation(function: Operation) -> Operation:
    OPERATIONS[function.__name__] = function
    return function


class Misfit(Exception):
    """An operation that does not fit the shape."""


def need(fits: bool) -> None:
    if not fits:
        raise Misfit


@dataclass(frozen=True)
class Recipe:
    """What a module is made from."""

    start: str
    sizes: tuple[int, int, int, int]
    steps: tuple[tuple[str, int, int], ...]
    head: bool
    seed: int

    def make(self) -> tuple[nn.Module, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            n, a, b, c = self.sizes
            shapes = {"flat": (n, a), "tokens": (n, a, b), "image": (n, a, b, c), "ids": (n, a)}
            x = torch.randn(shapes[self.start], dtype=torch.float64)
            if self.start == "ids":
                x = torch.randint(4, (n, a))
            model = RandomModule(self, x).eval()
        return model, x


class RandomModule(nn.Module):
    """A program that runs step by step; ``past`` are the values before each step."""

    def __init__(self, recipe: Recipe, x: Tensor) -> None:
        super().__init__()
        self.parts, self.weights = nn.ModuleDict(), nn.ParameterDict()
        self.recipe, self.program, self.past, self.place = recipe, [], [], ""
        self.building = True
        with torch.no_grad():
            self._run(x.clone())
        self.building = False
        self.past = []

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)

    def part(self, label: str, make: Callable[[], nn.Module]) -> Any:
        """A layer of this step."""
        name = f"{self.place}_{label}"
        if self.building and name not in self.parts:
            self.parts[name] = make().double().eval()
        return self.parts[name]

    def weight(self, *shape: int) -> Tensor:
        """A parameter of this step."""
        name = self.place
        if self.building and name not in self.weights:
            self.weights[name] = nn.Parameter(0.7 * torch.randn(shape, dtype=torch.float64))
        return self.weights[name]

    def earlier(self, kind: type[nn.Module], fits: Callable[[Any], bool], which: int) -> Any:
        """A layer of an earlier step."""
        steps = [(name.partition("_")[0], part) for name, part in self.parts.items()]
        found = [p for k, p in steps if k != "last" and int(k) < self.at and isinstance(p, kind) and fits(p)]
        need(bool(found))
        return found[which % len(found)]

    def before(self, fits: Callable[[Tensor], bool], which: int) -> Tensor:
        """A value of an earlier step."""
        found = [h for h in self.past[:-1] if fits(h)]
        need(bool(found))
        return found[which % len(found)]

    def _run(self, h: Tensor) -> Tensor:
        if not h.is_floating_point():
            self.place, self.at = "0_start", 0
            h = self.part("table", lambda: nn.Embedding(4, 3))(h)
        self.past = [h]
        for k, (name, a, b) in enumerate(self.recipe.steps, start=1):
            self.place, self.at = str(k), k
            if self.building:
                try:
                    made = OPERATIONS[name](self, h.clone(), a, b)
                    need(made.shape[0] == h.shape[0] and 1 < made.ndim < 5 and 0 < made[0].numel() <= MOST)
                    need(bool(made.isfinite().all()))
                    self.program.append(k)
                except Misfit:
                    continue
                h = made
            elif k in self.program:
                h = OPERATIONS[name](self, h, a, b)
            else:
                continue
            self.past.append(h)
        self.place, self.at = "last", 99
        h = h.flatten(1)
        if self.recipe.head or (self.building and not list(self.parameters())) or "last_head" in self.parts:
            return self.part("head", lambda: nn.Linear(h.shape[1], 2))(h)
        return h[:, :3]


# Layers.


@operation
def linear(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    return m.part("linear", lambda: nn.Linear(h.shape[-1], 2 + a, bias=b % 3 > 0))(h)


@operation
def mlp(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    d = h.shape[-1]
    return m.part("mlp", lambda: nn.Sequential(nn.Linear(d, 2 + a), nn.ReLU(inplace=b % 2 > 0), nn.Linear(2 + a, d)))(h)


@operation
def linear_again(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    return m.earlier(nn.Linear, lambda p: p.in_features == h.shape[-1], a)(h)


@operation
def tied_the_other_way(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    layer = m.earlier(nn.Linear, lambda p: p.out_features == h.shape[-1], a)
    return h @ layer.weight if b % 2 else F.linear(h, layer.weight.T)


@operation
def tied_into_a_new_layer(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    def make() -> nn.Module:
        old = m.earlier(nn.Linear, lambda p: p.in_features == h.shape[-1] and isinstance(p.weight, nn.Parameter), a)
        layer = nn.Linear(h.shape[-1], old.out_features)
        layer.weight = old.weight
        if b % 2 and old.bias is not None:
            layer.bias = old.bias
        return layer

    return m.part("tied", make)(h)


@operation
def linear_on_the_mean(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.ndim > 2)
    layer = m.part("both", lambda: nn.Linear(h.shape[-1], h.shape[-1]))
    return layer(h) + layer(h.mean(1, keepdim=True))


@operation
def linear_over_the_first(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.ndim > 2)
    return m.part("mix", lambda: nn.Linear(h.shape[1], 2 + a))(h.transpose(1, -1)).transpose(1, -1)


@operation
def linear_samples_second(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.ndim > 2)
    return m.part("second", lambda: nn.Linear(h.shape[-1], 2 + a))(h.transpose(0, 1)).transpose(0, 1)


@operation
def linear_on_rows(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.ndim > 2)
    rows = h.transpose(0, 1) if b % 2 else h
    made = m.part("rows", lambda: nn.Linear(h.shape[-1], 2 + a))(rows.reshape(-1, h.shape[-1]))
    made = made.unflatten(0, rows.shape[:-1])
    return made.transpose(0, 1) if b % 2 else made


@operation
def experts(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    d, first = h.shape[-1], h.flatten(1)[:, 0] > 0
    one, two = (m.part(label, lambda: nn.Linear(d, d)) for label in ("one", "two"))
    if b % 2:
        out = torch.zeros_like(h)
        out[first], out[~first] = one(h[first]), two(h[~first])
        return out
    return torch.where(first.view(-1, *[1] * (h.ndim - 1)), one(h), two(h))


@operation
def convolution(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.ndim in (3, 4) and min(h.shape[2:]) > 1)
    kind, width = (nn.Conv1d, nn.Conv2d)[h.ndim - 3], h.shape[1]
    groups = width if a % 3 == 0 else 1
    options = ({}, {"padding": 1}, {"stride": 2}, {"bias": False}, {"padding": "same"}, {"padding": 1, "dilation": 2})[
        b
    ]
    need(b != 5 or min(h.shape[2:]) > 2)
    return m.part("conv", lambda: kind(width, width if groups > 1 else 2 + a % 3, 2, groups=groups, **options))(h)


@operation
def transposed_convolution(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.ndim in (3, 4))
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d)[h.ndim - 3]
    return m.part("up", lambda: kind(h.shape[1], 2 + a % 2, 2, stride=1 + b % 2, bias=b % 3 > 0))(h)


@operation
def convolution_with_a_made_weight(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.ndim == 3 and h.shape[2] > 1)
    w = m.weight(2 + a % 2, h.shape[1], 2)
    return F.conv1d(h, w.tanh() if b % 2 else w - w.mean((1, 2), keepdim=True))


@operation
def norm(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    d, c = h.shape[-1], h.shape[1]
    need(d > 2)
    shape = tuple(h.shape[-2:]) if h.ndim > 2 and b % 2 else (d,)
    kinds: list[Callable[[], nn.Module]] = [
        lambda: nn.LayerNorm(shape), lambda: nn.LayerNorm(shape, bias=False), lambda: nn.RMSNorm(shape),
        lambda: nn.GroupNorm(1, c), lambda: nn.GroupNorm(c, c), lambda: nn.InstanceNorm1d(c, affine=True),
    ]  # fmt: skip
    need(a < 3 or (h.ndim > 2 if a == 4 else h.ndim == 3 if a == 5 else True))
    layer = m.part("norm", kinds[a])
    if m.building and layer.weight is not None:
        nn.init.normal_(layer.weight)
    return layer(h)


@operation
def batch_norm(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    def make() -> nn.Module:
        kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[h.ndim - 2]
        layer = kind(h.shape[1])
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        return layer

    return m.part("statistics", make)(h)


@operation
def attention(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.ndim == 3)
    d = h.shape[2]
    heads = 2 if d % 2 == 0 and a % 2 else 1
    if b % 3 == 0:
        return m.part("heads", lambda: nn.MultiheadAttention(d, heads, batch_first=True, bias=b % 2 == 0))(h, h, h)[0]
    q, k, v = m.part("qkv", lambda: nn.Linear(d, 3 * d))(h).chunk(3, -1)
    if b % 3 == 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=a % 2 > 0)
    return h + torch.softmax(q @ k.mT / d, -1) @ v


@operation
def learned_queries(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.ndim == 3)
    w = m.weight(1 + a, h.shape[2])
    keys = m.part("keys", lambda: nn.Linear(h.shape[2], h.shape[2]))(h) if b % 2 else h
    return torch.softmax(w @ keys.mT, -1) @ h


@operation
def recurrent(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.ndim == 3)
    kind = (nn.RNN, nn.GRU, nn.LSTM)[a % 3]
    out, last = m.part("recurrent", lambda: kind(h.shape[2], 2, batch_first=True, bias=b % 2 > 0))(h)
    return out if b < 3 or a % 3 == 2 else last[-1]


@operation
def looked_up(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    """A table's rows for the place of each largest entry."""
    place = h.argmax(-1)
    table = m.part("rows", lambda: nn.Embedding(h.shape[-1] + 1, h.shape[-1], padding_idx=0 if a % 2 else None))
    return h + table(place) if b % 2 else h * table(place).sin()


@operation
def bags(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.ndim == 3)
    return m.part("bags", lambda: nn.EmbeddingBag(h.shape[2], 2 + a, mode=("sum", "mean", "max")[b % 3]))(h.argmax(-1))


@operation
def bilinear(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    other = m.before(lambda z: z.shape[:-1] == h.shape[:-1], a)
    return m.part("bilinear", lambda: nn.Bilinear(h.shape[-1], other.shape[-1], 2 + b % 2))(h, other)


@operation
def normed_weight(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    change = (parametrizations.weight_norm, parametrizations.orthogonal, nn.utils.weight_norm)[a % 3]
    return m.part("normed", lambda: change(nn.Linear(h.shape[-1], 2 + b)))(h)


# Weights used as functions.


@operation
def scale(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    w = m.weight(*broadcast(h, a))
    return (h * w, h + w, h / (1 + w**2), torch.where(h > 0, h, w), h - h * w, w * h.sin())[b]


def broadcast(h: Tensor, a: int) -> tuple[int, ...]:
    """Shapes that broadcast against a sample."""
    rest = tuple(h.shape[1:])
    shapes = [(), (1,), rest[-1:], rest, (1, *rest), (*rest[:-1], 1)]
    return shapes[a]


@operation
def product(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    w = m.weight(h.shape[-1], 2 + a)
    return (h @ w, F.linear(h, w.T.tanh()), (w.T @ h.mT).mT if h.ndim > 2 else h @ w, h @ (w @ w.T),
        torch.matmul(h, w.softmax(0)), F.linear(h, w.mT.contiguous()))[b]  # fmt: skip


@operation
def einsum(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.ndim == 3)
    _, t, d = h.shape
    forms = {
        "nti,oi->nto": (2 + b, d), "nti,tio->nto": (t, d, 2 + b % 2), "nti,i->nt": (d,), "nti,ti->ni": (t, d),
        "nti,st->nsi": (2 + b, t), "nti,tis->ns": (t, d, 2 + b % 2),
    }  # fmt: skip
    form, shape = list(forms.items())[a]
    return torch.einsum(form, h, m.weight(*shape))


@operation
def joined_token(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.ndim == 3)
    w = m.weight(1 + a % 2, h.shape[2])
    token = w.expand(len(h), -1, -1) if b % 2 else w.repeat(len(h), 1, 1)
    return torch.cat([token, h] if b < 3 else [h, token], 1)


@operation
def places(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.ndim == 3)
    table = m.part("places", lambda: nn.Embedding(h.shape[1] + a, h.shape[2]))
    return h + (table(torch.arange(h.shape[1])) if b % 2 else table.weight[: h.shape[1]])


@operation
def weight_in_the_output(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    layer = m.earlier(nn.Linear, lambda p: True, a)
    return h + (layer.weight.square().sum() if b % 2 else layer.weight.sin().mean())


@operation
def adapter(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    layer = m.earlier(nn.Linear, lambda p: p.in_features == h.shape[-1], a)
    low = m.part("low", lambda: nn.Linear(h.shape[-1], 1, bias=False))
    high = m.part("high", lambda: nn.Linear(1, layer.out_features, bias=False))
    return layer(h) + high(low(h)) if b % 2 else F.linear(h, layer.weight + high.weight @ low.weight, layer.bias)


@operation
def hypernetwork(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.ndim == 3)
    made = m.part("hyper", lambda: nn.Linear(h.shape[2], h.shape[2] * 2))(h.mean(1)).unflatten(1, (h.shape[2], 2))
    return torch.bmm(h, made)


# Without parameters.


@operation
def activation(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    return (torch.tanh, F.gelu, F.softplus, F.silu, torch.sin, F.relu)[a](h)


@operation
def in_place(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    if a == 0:
        return h.tanh_()
    if a == 1:
        return h.mul_(1.5).add_(0.1)
    if a == 2:
        h[..., 0] = 0.3
        return h
    if a == 3:
        h[..., -1] *= 2
        return h
    if a == 4:
        return F.elu_(h)
    return h.add_(m.before(lambda z: z.shape == h.shape, b))


@operation
def residual(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    other = m.before(lambda z: z.shape == h.shape, a)
    return (
        h + other,
        h * other,
        other - h.tanh(),
        torch.maximum(h, other),
        h * other.sigmoid(),
        torch.lerp(h, other, 0.3),
    )[b]


@operation
def joined(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    other = m.before(lambda z: z.ndim == h.ndim and z.shape[:-1] == h.shape[:-1], a)
    return torch.cat([h, other] if b % 2 else [other, h], -1)


@operation
def gate(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.shape[-1] % 2 == 0)
    one, two = h.chunk(2, -1)
    return (F.glu(h), one * F.silu(two), one * two, one + two.softmax(-1), F.glu(h, -1).tanh(), torch.stack([one, two], 1)
        if h.ndim < 4 else one)[a]  # fmt: skip


@operation
def sliced(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.shape[-1] > 1 and h.shape[1] > 1)
    last = list(range(h.shape[-1]))[:: -1 if b % 2 else 1]
    return (h[..., 1:], h[:, ::2], h[..., :-1], h[..., last], h.narrow(1, 1, h.shape[1] - 1), h[:, :1])[a]


@operation
def turned(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.ndim > 2)
    return (h.transpose(1, 2), h.flip(1), h.roll(1, -1), h.flatten(1), h.flatten(-2), h.mT.contiguous())[a]


@operation
def split(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    d = h.shape[-1]
    need(h.ndim < 4 and d % 2 == 0)
    made = h.unflatten(-1, (2, d // 2))
    return made.transpose(1, 2) if b % 2 and made.ndim > 2 else made


@operation
def reduced(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.ndim > 2)
    dim = -1 if b % 2 else 1
    return (h.mean(dim), h.sum(dim), h.amax(dim), h.logsumexp(dim), h.norm(dim=dim), h.cumsum(dim))[a]


@operation
def softmax(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    return (
        h.softmax(-1),
        h.log_softmax(-1),
        h.softmax(1),
        F.normalize(h, dim=-1),
        h - h.mean(-1, True),
        h / (1 + h.abs()),
    )[a]


@operation
def with_itself(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.ndim == 3)
    return (h @ h.mT, h.mT @ h, torch.einsum("nti,nsi->nts", h, h.tanh()), torch.cdist(h, h.sin() + 1) ** 2,
        torch.bmm(h, h.mT).softmax(-1) @ h, h * h.mean(1, True))[a]  # fmt: skip


@operation
def picked(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    need(h.ndim == 3)
    order = h.detach().norm(dim=-1).argsort(1)
    if a % 3 == 0:
        return h.take_along_dim(order[:, :1, None], 1)
    if a % 3 == 1:
        return h.gather(1, order[..., None].expand_as(h))
    return h[torch.arange(len(h))[:, None], order[:, -2:]]


@operation
def several_times(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    """Each sample more than once, through one layer, then averaged."""
    layer = m.part("each", lambda: nn.Linear(h.shape[-1], h.shape[-1]))
    if a % 2:
        return layer(h.repeat_interleave(2, 0) ** 2).unflatten(0, (-1, 2)).mean(1)
    return layer(torch.cat([h, h.sin()])).unflatten(0, (2, -1)).sum(0)


@operation
def routed(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    order = h.detach().flatten(1)[:, 0].argsort(descending=b % 2 > 0)
    return m.part("sorted", lambda: nn.Linear(h.shape[-1], 2 + a))(h[order])[order.argsort()]


@operation
def checkpointed(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    layer = m.part("inside", lambda: nn.Linear(h.shape[-1], 2 + a))
    return checkpoint(lambda z: layer(z).tanh(), h, use_reentrant=False)


@operation
def vmapped(m: Any, h: Tensor, a: int, b: int) -> Tensor:
    layer = m.part("one", lambda: nn.Linear(h.shape[-1], 2 + a))
    return torch.func.vmap(lambda z: layer(z).tanh())(h)


@functools.cache
def recipes(most: int = 6) -> st.SearchStrategy[Recipe]:
    """Modules of up to so many steps."""
    small, size = st.integers(0, 5), st.integers(2, 4)
    return st.builds(
        Recipe,
        start=st.sampled_from(["flat", "tokens", "image", "ids"]),
        sizes=st.tuples(size, size, size, st.integers(2, 3)),
        steps=st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), small, small), min_size=1, max_size=most).map(
            tuple
        ),
        head=st.booleans(),
        seed=st.integers(0, 3),
    )
