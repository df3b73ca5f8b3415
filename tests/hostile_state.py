"""Models that remember, count, draw, write into weights or inputs, or change shared flags."""

import collections
import functools
import random
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases import Forward, normal
from hostile_case import Case, Made

CHANGED = "chang|writ|overwr|renormali|in place|in-place"


def net() -> dict[str, nn.Module]:
    return {"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)}


def of(
    function: Callable[..., Any], *, x: Callable[[], Any] = lambda: normal(4, 3), **parts: Any
) -> Callable[[], Made]:
    """A network a, b and further parts; a callable part is called, others are used as they are."""

    def make() -> Made:
        more = {k: part() if callable(part) and not isinstance(part, nn.Module) else part for k, part in parts.items()}
        return Forward(function, **{**net(), **more}), x()

    return make


def with_attributes(function: Callable[..., Any], **attributes: Callable[[], Any]) -> Callable[[], Made]:
    """A network a, b with attributes that are made after the module."""

    def make() -> Made:
        model = Forward(function, **net())
        for name, made in attributes.items():
            setattr(model, name, made())
        return model, normal(4, 3)

    return make


# Caches of what depends on parameters.


class Held:
    """An object of the user's own, with slots."""

    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.value, self.count = None, 0


def in_dict(m: Any, x: Tensor) -> Tensor:
    if "c" not in m.cache:
        m.cache["c"] = m.a.bias * 2
    return m.b(torch.tanh(m.a(x) + m.cache["c"]))


def in_nested_dict(m: Any, x: Tensor) -> Tensor:
    layer = m.cache.setdefault("layers", [{}, {}])[1]
    if not m.training and "w" not in layer:
        layer["w"] = m.b.weight @ m.a.weight
    return torch.tanh(F.linear(x, layer.get("w", m.b.weight @ m.a.weight))) + m.b.bias


def in_list(m: Any, x: Tensor) -> Tensor:
    if not m.cache:
        m.cache.append(m.a.weight.square())
    return m.b(torch.tanh(F.linear(x, m.cache[-1], m.a.bias)))


def in_attribute(m: Any, x: Tensor) -> Tensor:
    if m.cache is None:
        m.cache = m.a.weight.exp()
    return m.b(torch.tanh(F.linear(x, m.cache, m.a.bias)))


def in_object(m: Any, x: Tensor) -> Tensor:
    m.cache.count += 1
    if m.cache.value is None:
        m.cache.value = torch.softmax(m.a.weight, 0)
    return m.b(F.linear(x, m.cache.value, m.a.bias))


def in_closure() -> Made:
    cache: dict[str, Tensor] = {}

    def run(m: Any, x: Tensor) -> Tensor:
        if "c" not in cache:
            cache["c"] = m.a.bias.sin()
        return m.b(torch.tanh(m.a(x) * cache["c"]))

    return Forward(run, **net()), normal(4, 3)


def in_nonlocal() -> Made:
    held = None

    def run(m: Any, x: Tensor) -> Tensor:
        nonlocal held
        if held is None:
            held = m.a.weight.tanh()
        return m.b(torch.tanh(F.linear(x, held)))

    return Forward(run, **net()), normal(4, 3)


class ByMethod(nn.Module):
    """A method remembers its result."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def gains(self, power: int) -> Tensor:
        return self.a.bias.exp() ** power

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x) * self.gains(2)))


class ByProperty(ByMethod):
    @functools.cached_property
    def mixed(self) -> Tensor:
        return self.b.weight @ self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.mixed.T) + self.b.bias


class ByClass(ByMethod):
    """The class has the cache."""

    cache: ClassVar[dict[str, Tensor]]

    def forward(self, x: Tensor) -> Tensor:
        if "c" not in self.cache:
            self.cache["c"] = self.a.bias.cos()
        return self.b(torch.tanh(self.a(x) + self.cache["c"]))


def made_on_the_class() -> Made:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(type(self), "scale"):
                type(self).scale = self.b.weight.sum()  # type: ignore[attr-defined]
            return self.b(torch.tanh(self.a(x))) * type(self).scale  # type: ignore[attr-defined, no-any-return]

    return Scaled(), normal(4, 3)


def by_class() -> Made:
    return type("OfOneModel", (ByClass,), {"cache": {}})(), normal(4, 3)


class ByMode(ByMethod):
    """train(False) fuses the layers and train(True) forgets."""

    fused: Tensor | None = None

    def train(self, mode: bool = True) -> "ByMode":
        super().train(mode)
        self.fused = None
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.b(self.a(x)).sigmoid()
        if self.fused is None:
            self.fused = self.b.weight @ self.a.weight
        return (x @ self.fused.T + self.b(self.a.bias)).sigmoid()


def by_version(m: Any, x: Tensor) -> Tensor:
    key = (id(m.a.weight), m.a.weight._version)
    if m.cache.get("key") != key:
        m.cache.update(key=key, value=m.a.weight.square())
    return m.b(torch.tanh(F.linear(x, m.cache["value"], m.a.bias)))


def by_address(m: Any, x: Tensor) -> Tensor:
    if m.cache.get("key") != m.a.weight.data_ptr():
        m.cache.update(key=m.a.weight.data_ptr(), value=m.a.weight.square())
    return m.b(torch.tanh(F.linear(x, m.cache["value"], m.a.bias)))


def already_called() -> Made:
    """The cache holds the values of an earlier call, as a constant."""
    model, x = with_attributes(in_attribute, cache=lambda: None)()
    with torch.no_grad():
        model.eval()(x)
    return model, x


def keys_and_values(m: Any, x: Tensor) -> Tensor:
    """A list that a call empties and fills."""
    m.keys.clear()
    for part in x.unbind(1):
        m.keys.append(m.a.weight[:, 0] * part[:, None])
    return m.b(torch.tanh(torch.stack(m.keys, 1).sum(1)))


# Counters, flags, logs.


def counted(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    m.ready = True
    m.last = x.shape
    return m.b(torch.tanh(m.a(x)))


def logged(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    m.log.append(h)
    return m.b(h)


class Sums(dict[str, int]):
    """Adds to what it holds, however it is updated."""

    def update(self, *others: Any, **named: int) -> None:
        for key, value in dict(*others, **named).items():
            self[key] = self.get(key, 0) + value


def logged_everywhere(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    m.recent.append(h.mean().item())
    m.seen.add(x.shape[0])
    m.by_size[x.shape[0]].append(h.detach())
    m.ordered["last"] = h
    m.ordered.move_to_end("last", last=False)
    m.total["calls"] += 1
    m.sums.update(calls=1)
    m.plain["h"] = [h]
    return m.b(h)


def statistics_updated(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    with torch.no_grad():
        m.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
        m.calls += 1
    return m.b(torch.tanh(h))


def statistics_replaced(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    m.mean = 0.9 * m.mean + 0.1 * h.detach().mean(0)
    return m.b(torch.tanh(h))


def with_buffers(function: Callable[..., Any]) -> Callable[[], Made]:
    def make() -> Made:
        model = Forward(function, **net())
        model.register_buffer("mean", normal(4))
        model.register_buffer("calls", torch.zeros((), dtype=torch.long))
        return model, normal(4, 3)

    return make


def buffer_on_demand(m: Any, x: Tensor) -> Tensor:
    if not hasattr(m, "places"):
        m.register_buffer("places", torch.arange(3.0, dtype=x.dtype), persistent=False)
    return m.b(torch.tanh(m.a(x + m.places)))


def layer_on_demand(m: Any, x: Tensor) -> Tensor:
    if not hasattr(m, "act"):
        m.act = nn.Softplus()
    return m.b(m.act(m.a(x)))


class Reused(nn.Module):
    """A layer that holds another's parameter, made in the first call."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def tied_on_demand(m: Any, x: Tensor) -> Tensor:
    if "back" not in m._modules:
        m.back = Reused(m.a.weight)
    return m.b(torch.tanh(m.a(m.back(torch.tanh(m.a(x))))))


def layer_replaced(m: Any, x: Tensor) -> Tensor:
    """Every call wraps the activation once more, to no effect."""
    m.act = nn.Sequential(nn.Identity(), m.act) if len(list(m.act.modules())) < 9 else m.act
    return m.b(m.act(m.a(x)))


def part_exchanged(m: Any, x: Tensor) -> Tensor:
    """The first call exchanges a part for another with the same layer, as BigBird does for short texts."""
    if isinstance(m.part, nn.Sequential):
        m.part = Forward(lambda part, h: torch.tanh(part.layer(h)), layer=m.part[0])
    return m.b(m.part(x))


def hooks_on_demand(m: Any, x: Tensor) -> Tensor:
    """The first call installs hooks that collect outputs, as transformers does."""
    if not getattr(m, "installed", False):
        m.installed, m.collected = True, {}
        m.a.register_forward_hook(lambda layer, given, out: m.collected.update(a=out))
        m.b.register_forward_pre_hook(lambda layer, given: None)
    return m.b(torch.tanh(m.a(x)))


# Writes into weights and inputs.


class Renormed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.copy_(torch.renorm(self.weight.data, 2, 0, 0.3))
        return super().forward(x)


class Divided(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.div_(self.weight.norm())
        return super().forward(x)


class Projected(nn.Linear):
    """The data are exchanged for other data."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data / self.weight.data.norm(dim=1, keepdim=True)
        return super().forward(x)


class Replaced(nn.Linear):
    """A new Parameter takes the place of the old."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight = nn.Parameter(self.weight.detach().clamp(-0.2, 0.2))
        return super().forward(x)


class HalvedOnce(nn.Linear):
    """Scaled once per mode, as some merged adapters are."""

    merged = False

    def train(self, mode: bool = True) -> "HalvedOnce":
        if mode and self.merged:
            self.weight.data.mul_(2)
            self.merged = False
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and not self.merged:
            self.weight.data.div_(2)
            self.merged = True
        return super().forward(x)


class BoundedBias(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.bias.data.clamp_(-0.05, 0.05)
        return super().forward(x)


class BoundedByNothing(nn.Linear):
    """The bound is not reached, so the same values are written."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-1e3, 1e3)
        return super().forward(x)


class Shaken(nn.Linear):
    """Noise is added for the call, then taken away."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.linspace(-1, 1, self.weight.numel(), dtype=x.dtype).view_as(self.weight)
        old = self.weight.data.clone()
        self.weight.data.add_(noise)
        out = super().forward(x)
        self.weight.data.copy_(old)
        return out


def first(layer: Callable[[int, int], nn.Module]) -> Callable[[], Made]:
    return lambda: (nn.Sequential(layer(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), normal(4, 3))


def looked_up(m: Any, i: Tensor) -> Tensor:
    return m.b(torch.tanh(F.embedding(i, m.table, max_norm=0.5)).mean(1))


def looked_up_bags(m: Any, i: Tensor) -> Tensor:
    return m.b(torch.tanh(F.embedding_bag(i, m.table, max_norm=0.5)))


def ids() -> Tensor:
    return torch.randint(5, (4, 3))


def overwrites(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    x.mul_(2).sub_(1)
    return m.b(torch.tanh(h)) * x[:, :1]


def overwrites_dict(m: Any, x: Tensor, scale: Tensor) -> Tensor:
    scale.add_(1)
    x[:, 0] = 0
    return m.b(torch.tanh(m.a(x))) * scale


def detaches_in_place(m: Any, x: Tensor) -> Tensor:
    x.detach_().requires_grad_(False)
    return m.b(F.relu_(m.a(x)).sigmoid_())


# Draws.


def draws(m: Any, x: Tensor) -> Tensor:
    torch.rand(3)
    np.random.rand(2)  # noqa: NPY002
    random.random()
    return m.b(torch.tanh(m.a(x)))


def seeds(m: Any, x: Tensor) -> Tensor:
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    random.seed(7)
    return m.b(torch.tanh(m.a(x) + 0.1 * torch.randn(4, dtype=x.dtype) + random.random() + np.random.rand()))  # noqa: NPY002


def own_generators(m: Any, x: Tensor) -> Tensor:
    torch.randn(2, generator=m.drawn)
    m.numbers.normal()
    m.plain.random()
    return m.b(torch.tanh(m.a(x)))


def reseeds_its_own(m: Any, x: Tensor) -> Tensor:
    m.drawn.manual_seed(3)
    return m.b(torch.tanh(m.a(x) + torch.randn(4, generator=m.drawn, dtype=x.dtype)))


def random_features() -> Made:
    """A layer built in the call from a seed."""

    def run(m: Any, x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            frozen = nn.Linear(4, 4).double()
        return m.b(torch.tanh(frozen(m.a(x))))

    return of(run)()


# What is held out of the way.


class Counts:
    """A helper that counts on its class, and is hashed by identity."""

    total = 0

    def __init__(self) -> None:
        self.count = 0


class Registered(type(nn.Module)):  # type: ignore[misc]
    """A metaclass that counts the calls of its classes' instances."""

    calls = 0


class ByMetaclass(nn.Module, metaclass=Registered):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = net().values()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        Registered.calls += 1
        out: Tensor = self.b(torch.tanh(self.a(x)))
        return out


def old_generator(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x)) * float(1 + m.drawn.rand()))


def in_weak_keys(m: Any, x: Tensor) -> Tensor:
    if m.a not in m.cache:
        m.cache[m.a] = m.a.weight * 2
    return m.b(torch.tanh(x @ m.cache[m.a].T))


def in_weak_values(m: Any, x: Tensor) -> Tensor:
    known = "last" in m.cache
    m.cache["last"] = m.a
    return m.b(torch.tanh(m.a(x) + float(known)))


def counted_on_keys(m: Any, x: Tensor) -> Tensor:
    for helper in (*m.by_helper, *m.helpers):
        helper.count += 1
    return m.b(torch.tanh(m.a(x) + sum(helper.count for helper in m.by_helper)))


def behind_a_view() -> Made:
    view = types.MappingProxyType({"log": list[int]()})

    def run(m: Any, x: Tensor) -> Tensor:
        view["log"].append(1)
        return m.b(torch.tanh(m.a(x)))

    return Forward(run, **net()), normal(4, 3)


def counted_on_a_helpers_class(m: Any, x: Tensor) -> Tensor:
    type(m.helper).total += 1
    return m.b(torch.tanh(m.a(x)))


def noted_on_a_parameter(m: Any, x: Tensor) -> Tensor:
    m.a.weight.calls = getattr(m.a.weight, "calls", 0) + 1
    return m.b(torch.tanh(m.a(x) + m.a.weight.calls))


class WithLaw(nn.Module):
    """A network that holds a distribution made from a parameter."""

    def __init__(self, law: Callable[[nn.Parameter], Any]) -> None:
        super().__init__()
        self.a, self.b = net().values()
        self.location = nn.Parameter(torch.randn(2))
        self.double()
        self.law = law(self.location)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.tanh(self.a(x))) * self.law.mean
        return out


# Shared flags.


def sets_flags(m: Any, x: Tensor) -> Tensor:
    torch.backends.mkldnn.enabled = False
    torch.set_float32_matmul_precision("high")
    sys.setrecursionlimit(3210)
    return m.b(torch.tanh(m.a(x)))


def sets_default_dtype(m: Any, x: Tensor) -> Tensor:
    torch.set_default_dtype(torch.float64)
    return m.b(torch.tanh(m.a(x) + torch.linspace(0, 1, 4)))


def sets_attention(m: Any, x: Tensor) -> Tensor:
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.mha.set_fastpath_enabled(False)
    h = m.a(x)[:, None].unflatten(-1, (2, 2)).transpose(1, 2)
    return m.b(F.scaled_dot_product_attention(h, h, h).flatten(1))


def chooses_attention(m: Any, x: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    h = m.a(x).unflatten(0, (len(x), 1)).unflatten(-1, (2, 2)).transpose(1, 3)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        return m.b(F.scaled_dot_product_attention(h, h.cos(), h).flatten(1))


def turns_gradients_on(m: Any, x: Tensor) -> Tensor:
    torch.set_grad_enabled(True)
    return m.b(torch.tanh(m.a(x)))


CACHED = "cache|remember|kept|stale|depend|state"
CASES = (
    Case("cache in a dict", with_attributes(in_dict, cache=dict)),
    Case("cache in a list within a dict", with_attributes(in_nested_dict, cache=dict)),
    Case("cache in a list", with_attributes(in_list, cache=list)),
    Case("cache in an attribute", with_attributes(in_attribute, cache=lambda: None)),
    Case("cache in an object with slots", with_attributes(in_object, cache=Held)),
    Case("cache in a closure's dict", in_closure, or_error=CACHED, module=False),
    Case("cache in a closure's variable", in_nonlocal, or_error=CACHED, module=False),
    Case("cache of a method", lambda: (ByMethod(), normal(4, 3)), or_error=CACHED, module=False),
    Case("cached property", lambda: (ByProperty(), normal(4, 3))),
    Case("cache made on the class", made_on_the_class, module=False),
    Case("cache of a class", by_class, or_error=CACHED, module=False),
    Case("cache emptied by train", lambda: (ByMode(), normal(4, 3))),
    Case("cache valid for a version", with_attributes(by_version, cache=dict)),
    Case("cache valid for an address", with_attributes(by_address, cache=dict)),
    Case("cache filled before", already_called, or_error=CACHED),
    Case("keys emptied and filled", with_attributes(keys_and_values, keys=list)),
    Case("counters and flags", with_attributes(counted, calls=int, ready=bool)),
    Case("a log of activations", with_attributes(logged, log=list)),
    Case("logs of every kind", with_attributes(logged_everywhere, recent=lambda: collections.deque(maxlen=2), seen=set,
        by_size=lambda: collections.defaultdict(list), ordered=collections.OrderedDict, total=collections.Counter, sums=Sums,
        plain=dict)),
    Case("statistics updated in eval mode", with_buffers(statistics_updated)),
    Case("statistics replaced in eval mode", with_buffers(statistics_replaced)),
    Case("a buffer made on demand", of(buffer_on_demand)),
    Case("a layer made on demand", of(layer_on_demand)),
    Case("a tied layer made on demand", lambda: (Forward(tied_on_demand, **net()), normal(4, 3))),
    Case("a layer wrapped at every call", of(layer_replaced, act=nn.Tanh)),
    Case("hooks installed by the first call", of(hooks_on_demand)),
    Case("a part exchanged by the first call", of(part_exchanged, part=lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh()))),
    Case("weight renormalized through data", first(Renormed), error=CHANGED),
    Case("weight divided under no_grad", first(Divided), error=CHANGED),
    Case("data of a weight exchanged", first(Projected), error=CHANGED),
    Case("a weight replaced by a new Parameter", first(Replaced), error=CHANGED),
    Case("weight halved once in eval mode", first(HalvedOnce), error=CHANGED),
    Case("bias clamped", first(BoundedBias), error=CHANGED),
    Case("weight written with its own values", first(BoundedByNothing), or_error=CHANGED),
    Case("weight shaken and put back", lambda: (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Shaken(4, 2)).double(),
        normal(4, 3)), warns="gradient is not"),
    Case("embedding with max_norm as a function", of(looked_up, x=ids, table=lambda: normal(5, 4)), error=CHANGED),
    Case("bags with max_norm as a function", of(looked_up_bags, x=ids, table=lambda: normal(5, 4)), error=CHANGED),
    Case("writes into its input", of(overwrites)),
    Case("writes into a dict's tensors", of(overwrites_dict, x=lambda: {"x": normal(4, 3), "scale": normal(4, 1)})),
    Case("activations in place", of(detaches_in_place)),
    Case("draws without use", of(draws)),
    Case("seeds what it draws", of(seeds)),
    Case("draws from its own generators", with_attributes(own_generators, drawn=torch.Generator,
        numbers=lambda: np.random.default_rng(0), plain=lambda: random.Random(0))),
    Case("seeds its own generator", with_attributes(reseeds_its_own, drawn=torch.Generator)),
    Case("random features from a seed", random_features),
    Case("draws from NumPy's old generator", with_attributes(old_generator, drawn=lambda: np.random.RandomState(0))),
    Case("cache by weak keys", with_attributes(in_weak_keys, cache=weakref.WeakKeyDictionary)),
    Case("weak values", with_attributes(in_weak_values, cache=weakref.WeakValueDictionary)),
    Case("counts on keys and on members", with_attributes(counted_on_keys, by_helper=lambda: {Counts(): 1},
        helpers=lambda: frozenset({Counts()}))),
    Case("counts behind a view", behind_a_view, module=False),
    # The truth calls the model, too, which counts: so no modules.
    Case("counts on a helper's class", with_attributes(counted_on_a_helpers_class, helper=Counts), module=False),
    Case("counts on a metaclass", lambda: (ByMetaclass(), normal(4, 3)), module=False),
    Case("notes on a parameter", of(noted_on_a_parameter)),
    Case("a distribution of a parameter", lambda: (WithLaw(lambda p: torch.distributions.Normal(p, torch.ones_like(p))),
        normal(4, 3))),
    Case("a distribution computed from a parameter", lambda: (WithLaw(lambda p: torch.distributions.Exponential(p.exp())),
        normal(4, 3)), error=CACHED),
    Case("sets flags of torch", of(sets_flags)),
    Case("sets the default dtype", of(sets_default_dtype)),
    Case("switches attention kernels off", of(sets_attention)),
    Case("chooses its attention kernel", of(chooses_attention)),
    Case("turns gradients on", of(turns_gradients_on)),
)  # fmt: skip
