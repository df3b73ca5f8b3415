"""Models built in unusual ways: shared parts, closures, parameters asked for by name, parametrizations, odd inputs."""

import copy
import dataclasses
import functools
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from cases import Forward, normal
from hostile_case import Case, Made
from hostile_state import ids, of

# One module, parameter or buffer in several places.


class TwoPaths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l1, self.l2 = nn.Linear(3, 4), nn.Linear(4, 2)
        self.net = nn.Sequential(self.l1, nn.Tanh(), self.l2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class UsedByBoth(TwoPaths):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.l2(self.l1(x).sin())


def listed_and_named() -> Made:
    a, b = nn.Linear(3, 3), nn.Linear(3, 2)
    model = Forward(lambda m, x: m.last(m.layers[1](torch.tanh(m.layers[0](x)))), layers=nn.ModuleList([a, a]), first=a,
        last=b, table=nn.ModuleDict({"a": a, "b": b}))  # fmt: skip
    return model, normal(4, 3)


def under_three_names() -> Made:
    model = Forward(lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(x))))) + x @ m.free, a=nn.Linear(3, 3),
        b=nn.Linear(3, 3), c=nn.Linear(3, 3))  # fmt: skip
    model.b.weight = model.c.weight = model.a.weight
    model.free = model.a.weight
    return model, normal(4, 3)


def bias_of_all() -> Made:
    model = Forward(
        lambda m, x: m.b(torch.tanh(m.norm(m.a(x)))), a=nn.Linear(3, 3), b=nn.Linear(3, 3), norm=nn.LayerNorm(3)
    )
    model.a.bias = model.b.bias = model.norm.bias
    return model, normal(4, 3)


class Adapted(nn.Module):
    """VeRA: frozen random factors that all layers share, and two trained vectors."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.register_buffer("down", down)
        self.register_buffer("up", up, persistent=False)
        self.d, self.b = nn.Parameter(normal(2)), nn.Parameter(normal(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b * ((self.d * (x @ self.down)) @ self.up)


def shared_buffers() -> Made:
    down, up = normal(3, 2), normal(2, 3)
    return nn.Sequential(Adapted(down, up), nn.Tanh(), Adapted(down, up), nn.Linear(3, 2).double()), normal(4, 3)


def copied_and_tied() -> Made:
    """A teacher is a copy whose head is the student's own."""
    student = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    teacher = copy.deepcopy(student)
    teacher[2] = student[2]
    return Forward(lambda m, x: m.student(x) * m.teacher(x).sigmoid(), student=student, teacher=teacher), normal(4, 3)


# Closures, references, and parameters outside the registry.


class ByClosure(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.l = nn.Embedding(5, 4).double(), nn.Linear(4, 4).double()
        self.head = lambda h: h @ self.e.weight.T

    def forward(self, i: Tensor) -> Tensor:
        return self.head(torch.tanh(self.l(self.e(i)))).mean(1)


def keyword_only(weight: Tensor) -> Callable[[Tensor], Tensor]:
    def multiplied(h: Tensor, *, w: Tensor = weight) -> Tensor:
        return F.linear(h, w)

    return multiplied


def attributed(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    def applied(h: Tensor) -> Tensor:
        return applied.layer(h)  # type: ignore[attr-defined, no-any-return]

    applied.layer = layer  # type: ignore[attr-defined]
    return applied


class Bound(nn.Module):
    """Methods and partial functions kept as attributes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.kind, weight = kind, self.b.weight
        self.ways = [lambda h: F.linear(h, self.b.weight)]
        self.method, self.partial = self.project, functools.partial(Bound.project, self)
        self.default = lambda h, w=weight: F.linear(h, w)
        self.fixed = functools.partial(F.linear, weight=weight)
        self.bound, me = self.b.forward, weakref.ref(self)
        self.weak = lambda h: me().b(h)  # type: ignore[union-attr]
        self.plain, self.named = [self.a.weight, self.b.weight], {"w": self.b.weight}
        self.config = SimpleNamespace(last=self.b, scales=(2.0, self.b.bias))
        object.__setattr__(self, "unregistered", self.b)
        self.steps = [self.a, torch.tanh, self.b]
        inner, project = functools.partial(lambda h: self.b(h)), self.project
        self.around = lambda h: inner(h)
        self.of_method = lambda h: project(h)
        self.by_keyword = keyword_only(weight)
        self.cached = functools.lru_cache(lambda h: self.b(h))
        holder = SimpleNamespace(layer=self.b)
        self.of_object = lambda h: holder.layer(h)
        self.by_attribute = attributed(self.b)
        self.pair = (torch.tanh, lambda h: self.b(h))
        in_dict = {"last": lambda h: self.b(h)}
        self.of_dict = lambda h: in_dict["last"](h)

    def project(self, h: Tensor) -> Tensor:
        return F.linear(h, self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        match self.kind:
            case "list of lambdas":
                return self.ways[0](h) + self.b.bias
            case "parameters in a list":
                return F.linear(torch.tanh(F.linear(x, self.plain[0])), self.plain[-1])
            case "parameters in a dict":
                return F.linear(h, self.named["w"])
            case "object":
                return self.config.last(h) + self.config.scales[1]
            case "unregistered":
                return self.unregistered(h)
            case "pair":
                return self.pair[1](h)
            case "steps":
                return functools.reduce(lambda z, step: step(z), self.steps, x)
        return getattr(self, self.kind)(h)


KINDS = {
    "method": "a method as an attribute", "partial": "a partial function over the module",
    "default": "a parameter as a default value", "fixed": "a parameter in a partial function",
    "bound": "a layer's forward as an attribute", "weak": "a closure over a weak reference",
    "list of lambdas": "closures in a list", "parameters in a list": "parameters in a list",
    "parameters in a dict": "parameters in a dict", "object": "a layer in a plain object",
    "unregistered": "a layer set past the registry", "steps": "layers in a plain list",
    "around": "a closure over a partial function", "of_method": "a closure over a method",
    "by_keyword": "a parameter as a keyword's default", "cached": "a cached function as an attribute",
    "of_object": "a closure over a plain object", "by_attribute": "an attribute of a function",
    "pair": "functions in a tuple", "of_dict": "a closure over a dict of functions",
}  # fmt: skip


def over_a_parameter() -> Made:
    weight = nn.Parameter(normal(2, 4))
    model = Forward(lambda m, x: torch.tanh(m.a(x)) @ weight.T, a=nn.Linear(3, 4), w=weight)
    model.w = weight
    return model, normal(4, 3)


class Child(nn.Module):
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.parent = [parent]

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.parent[0].a.weight


class Parent(nn.Module):
    """A part knows the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(3, 2).double()
        self.child = Child(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.child(torch.tanh(self.a(x))))


# Questions about parameters.


def asks_dtype(m: Any, x: Tensor) -> Tensor:
    p = next(m.parameters())
    return m.b(torch.tanh(m.a(x.to(p.dtype).to(p.device))))


def asks_names(m: Any, x: Tensor) -> Tensor:
    size = sum(p.square().sum() for name, p in m.named_parameters() if name.endswith("weight"))
    return m.b(torch.tanh(m.a(x))) * size


def asks_type(m: Any, x: Tensor) -> Tensor:
    gain = 2.0 if isinstance(m.a.weight, nn.Parameter) and m.a.weight.is_leaf else -1.0
    return m.b(torch.tanh(gain * m.a(x)))


def asks_registry(m: Any, x: Tensor) -> Tensor:
    w, named = m.a._parameters["weight"], dict(m.named_modules())
    return named["b"](torch.tanh(x @ w.T)) + m.get_submodule("b").get_parameter("bias")


def asks_state(m: Any, x: Tensor) -> Tensor:
    state = m.state_dict(keep_vars=True)
    return F.linear(torch.tanh(m.a(x)), state["b.weight"], state["b.bias"])


def asks_vector(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x))) + nn.utils.parameters_to_vector(m.parameters()).sin().sum()


def asks_gradient(m: Any, x: Tensor) -> Tensor:
    h = m.a(x) if m.a.weight.requires_grad and m.a.weight.grad is None else -m.a(x)
    return m.b(torch.tanh(h))


def asks_count(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x))) / len(list(m.parameters())) + sum(p.numel() for p in m.buffers())


class Delegating(nn.Module):
    """Unknown attributes come from the wrapped module."""

    def __init__(self) -> None:
        super().__init__()
        self.wrapped = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.wrapped(x) * self.in_scale if hasattr(self, "in_scale") else self.wrapped(x)


class Strict(nn.Module):
    """Attributes may be set in the constructor only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.closed = True

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "closed", False) and name != "training":
            raise AttributeError(f"{name} is fixed")
        super().__setattr__(name, value)

    @property
    def gain(self) -> Tensor:
        return self.b.weight.exp()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.a(x)), self.gain)


class Called(nn.Module):
    """__call__ does more than forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([normal(3, 4), normal(4, 2)])
        self.gains = nn.ParameterDict({"last": normal(2)})

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x / 2) * self.gains["last"]

    def forward(self, x: Tensor) -> Tensor:
        for w in self.weights:
            x = torch.tanh(x @ w)
        return x


# Made by other tools.


def traced() -> Made:
    x = normal(4, 3)
    return nn.Sequential(torch.jit.trace(nn.Linear(3, 4).double(), x), nn.Tanh(), nn.Linear(4, 2).double()), x


def small() -> Made:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), normal(4, 3)


@functools.cache
def export(*, any_size: bool) -> nn.Module:
    torch.manual_seed(0)
    model, x = small()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},) if any_size else None
    return torch.export.export(model, (x,), dynamic_shapes=shapes).module()


def exported(*, any_size: bool) -> Callable[[], Made]:
    def make() -> Made:
        _, x = small()
        return copy.deepcopy(export(any_size=any_size)), x

    return make


def symbolic() -> Made:
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    return model, normal(4, 3)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


scripted_swish = torch.jit.script(swish)


def jagged(m: Any, x: Tensor) -> Tensor:
    rows = torch.nested.nested_tensor_from_jagged(x.flatten(0, 1), torch.arange(len(x) + 1) * x.shape[1])
    return m.b(torch.tanh(m.a(rows).values()).view(len(x), -1, 4).sum(1))


def padded_from_nested(m: Any, x: Tensor) -> Tensor:
    rows = torch.nested.as_nested_tensor([m.a(row) for row in x], layout=torch.jagged)
    return m.b(torch.tanh(rows.to_padded_tensor(0.0)).mean(1))


# Parametrizations and pruning.


def with_first(change: Callable[[nn.Linear], Any], *, calls: int = 0) -> Callable[[], Made]:
    """A network whose first layer is changed and, for spectral norms, run in training mode."""

    def make() -> Made:
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        change(model[0])
        model.train()
        for _ in range(calls):
            model(normal(4, 3))
        return model, normal(4, 3)

    return make


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.triu()


class Exponential(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return torch.matrix_exp(w - w.mT)


def twice_parametrized(layer: nn.Linear) -> None:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    parametrize.register_parametrization(layer, "weight", Exponential(), unsafe=True)


def parametrized_and_cached(m: Any, x: Tensor) -> Tensor:
    with parametrize.cached():
        return m.b(torch.tanh(m.layer(torch.tanh(m.layer(m.a(x))))))


# Complex parameters, dtypes, recurrent layers.


def spectral_convolution(m: Any, x: Tensor) -> Tensor:
    """A layer of a Fourier neural operator."""
    h = m.up(x.unsqueeze(-1)).mT
    modes = torch.fft.rfft(h)[..., :2]
    out = torch.fft.irfft(F.pad(torch.einsum("nik,iok->nok", modes, m.modes), (0, 1)), n=x.shape[1])
    return m.down(torch.tanh(out + h).mean(-1))


def with_complex(function: Callable[..., Any], *, x: Callable[[], Tensor] = lambda: normal(4, 3), **parts: Any) -> Any:
    """Parts with complex values are registered after the conversion to double."""

    def make() -> Made:
        made = {name: part() for name, part in parts.items()}
        whole = {name: part for name, part in made.items() if isinstance(part, nn.Module)}
        model = Forward(function, **whole)
        for name, part in made.items():
            if name not in whole:
                setattr(model, name, nn.Parameter(part))
        return model, x()

    return make


def complexes(*shape: int) -> Tensor:
    return torch.complex(normal(*shape), normal(*shape))


def mixed_dtypes() -> Made:
    model = Forward(
        lambda m, x: m.b(torch.tanh(m.a(x.to(m.a.weight.dtype))).to(x.dtype)), a=nn.Linear(3, 4), b=nn.Linear(4, 2)
    )
    model.a.float()
    return model, normal(4, 3)


def recurrent(kind: type[nn.RNNBase], **options: Any) -> Callable[[], Made]:
    return lambda: (Forward(lambda m, x: m.out(m.r(x)[0][:, -1]), r=kind(2, 3, batch_first=True, **options),
        out=nn.Linear(options.get("proj_size", 0) or 3, 2)), normal(4, 3, 2))  # fmt: skip


def encoder() -> Made:
    layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)
    model = Forward(lambda m, x: m.out(m.e(x).mean(1)), e=nn.TransformerEncoder(layer, 1), out=nn.Linear(4, 2))
    return model, normal(3, 3, 4)


# Inputs.


def with_flags(m: Any, x: Tensor, mask: Tensor | None = None, scale: bool = False, mode: str = "mean") -> Tensor:
    h = torch.tanh(m.a(x)) if mask is None else torch.tanh(m.a(x)) * mask
    return m.b(h * 2 if scale else h) if mode == "mean" else m.b(h) * 0


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: Any = None


def as_encoding() -> Any:
    transformers = __import__("transformers")
    return transformers.BatchEncoding({"x": normal(4, 3), "mask": torch.rand(4, 4, dtype=torch.float64)})


INPUT = "x (is|must)|batch|tensor|list|tuple|dict"
CASES = (
    Case("a module at two paths", lambda: (TwoPaths(), normal(4, 3))),
    Case("a module at two paths, both used", lambda: (UsedByBoth(), normal(4, 3))),
    Case("modules in a list, a dict and attributes", listed_and_named),
    Case("a weight under four names", under_three_names),
    Case("one bias for all", bias_of_all),
    Case("shared buffers", shared_buffers),
    Case("a copy with a part of the original", copied_and_tied),
    Case("a closure over the model", lambda: (ByClosure(), ids())),
    *(Case(title, lambda kind=kind: (Bound(kind), normal(4, 3))) for kind, title in KINDS.items()),
    Case("a closure over a parameter", over_a_parameter),
    Case("a part that knows the whole", lambda: (Parent(), normal(4, 3))),
    Case("asks for its dtype", of(asks_dtype)),
    Case("asks for names of parameters", of(asks_names)),
    Case("asks whether a weight is a Parameter", of(asks_type)),
    Case("asks the registry", of(asks_registry)),
    Case("asks its state dict", of(asks_state)),
    Case("asks for a vector of parameters", of(asks_vector)),
    Case("asks for gradients of parameters", of(asks_gradient)),
    Case("asks for the number of parameters", of(asks_count)),
    Case("unknown attributes delegated", lambda: (Delegating(), normal(4, 3))),
    Case("attributes that cannot be set", lambda: (Strict(), normal(4, 3))),
    Case("a call of its own", lambda: (Called(), normal(4, 3))),
    Case("a traced part", traced, or_error="[Ss]cript|trace"),
    Case("an exported module", exported(any_size=True), or_error="export"),
    Case("an exported module of one batch size", exported(any_size=False), or_error="export|batch|sample", twin=small),
    Case("a symbolic trace", symbolic),
    Case("a scripted function", of(lambda m, x: m.b(scripted_swish(m.a(x))))),
    Case("jagged rows inside", of(jagged, x=lambda: normal(4, 2, 3))),
    Case("rows nested, then padded", of(padded_from_nested, x=lambda: normal(4, 2, 3)), or_error="nested|jagged"),
    Case("weight norm", with_first(parametrizations.weight_norm)),
    Case("orthogonal weight", with_first(parametrizations.orthogonal)),
    Case("orthogonal weight by Cayley", with_first(lambda layer: parametrizations.orthogonal(layer, "weight", "cayley"))),
    Case("spectral norm", with_first(parametrizations.spectral_norm, calls=3)),
    Case("two parametrizations", with_first(twice_parametrized)),
    Case("cached parametrization", lambda: (Forward(parametrized_and_cached, a=nn.Linear(3, 3), b=nn.Linear(3, 2),
        layer=parametrizations.orthogonal(nn.Linear(3, 3))), normal(4, 3))),
    Case("old weight norm", with_first(nn.utils.weight_norm)),
    Case("old spectral norm", with_first(nn.utils.spectral_norm, calls=3)),
    Case("pruned weights", with_first(lambda layer: prune.random_unstructured(layer, "weight", amount=3))),
    Case("pruned weights and biases, twice", with_first(lambda layer: [prune.l1_unstructured(layer, "weight", amount=2),
        prune.ln_structured(layer, "weight", amount=1, n=2, dim=0), prune.identity(layer, "bias")])),
    Case("spectral convolution", with_complex(spectral_convolution, x=lambda: normal(3, 4), up=lambda: nn.Linear(1, 2),
        down=lambda: nn.Linear(2, 2), modes=lambda: complexes(2, 2, 2)), or_error="complex", complex=True),
    Case("complex phases", with_complex(lambda m, x: m.b((m.a(x) * m.phase.exp()).abs()), a=lambda: nn.Linear(3, 4),
        b=lambda: nn.Linear(4, 2), phase=lambda: complexes(4)), or_error="complex", complex=True),
    Case("mixed dtypes", mixed_dtypes, tolerance=1e-4, gap=1e-4),
    Case("a learned temperature", of(lambda m, x: m.b(torch.tanh(m.a(x) / m.t)), t=lambda: normal().exp())),
    Case("a learned exponent and threshold", of(lambda m, x: m.b(torch.where(m.a(x) > 0, m.a(x).abs() ** m.t, m.u)),
        t=lambda: normal().exp(), u=lambda: normal(1)), step=1e-6, gap=1e-5),
    Case("single precision", lambda: (nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)), normal(4, 3).float()),
        tolerance=1e-4, gap=1e-4),
    Case("functional dropout switched off", of(lambda m, x: m.b(F.dropout(F.elu_(m.a(x)), 0.5, training=False)))),
    Case("LSTM", recurrent(nn.LSTM)),
    Case("GRU of two layers", recurrent(nn.GRU, num_layers=2, dropout=0.3)),
    Case("transformer encoder", encoder),
    Case("a dict with None and flags", of(with_flags, x=lambda: {"x": normal(4, 3), "mask": None, "scale": True}),
        or_error=INPUT),
    Case("a dict with text", of(with_flags, x=lambda: {"x": normal(4, 3), "mode": "mean"}), or_error=INPUT),
    Case("a tuple with None and flags", of(with_flags, x=lambda: (normal(4, 3), None, True)), or_error=INPUT),
    Case("a list as from a DataLoader", of(with_flags, x=lambda: [normal(4, 3), normal(4, 4)]), or_error=INPUT),
    Case("a tuple in a tuple", of(lambda m, x, pair: m.b(torch.tanh(m.a(x) + pair[0] * pair[1])),
        x=lambda: (normal(4, 3), (normal(4, 4), normal(4, 4)))), or_error=INPUT),
    Case("a BatchEncoding", of(with_flags, x=as_encoding), or_error=INPUT),
    Case("an output object", of(lambda m, x: Output(m.b(torch.tanh(m.a(x))))), output_fn=lambda out: out.logits),
)  # fmt: skip
