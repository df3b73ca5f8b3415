"""Models that could silently go wrong: features equal autograd's, or an error names a remedy."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import adaptive_tangents as at
import reference
from cases import Forward, mlp, normal
from prepared import fingerprint

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*as autograd's gradient says",  # for the cases of which that is true
    "ignore:There is a performance drop",
    "ignore:.*use_reentrant",
    "ignore:None of the",
)
Made = tuple[nn.Module, Any]


def of(function: Callable[..., Any], x: Callable[[], Any] = lambda: normal(5, 4), **parts: Any) -> Callable[[], Made]:
    return lambda: (Forward(function, **{name: part() for name, part in parts.items()}), x())


def linear(i: int, o: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(i, o)


class Square(torch.autograd.Function):
    """A function without a vmap rule or setup_context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class ByNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(np.tanh(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.from_numpy(1 - np.tanh(ctx.saved_tensors[0].detach().numpy()) ** 2)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Cut(torch.autograd.Function):
    """A function that gives no gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ x


def body() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))


def forces(m: nn.Module, x: Tensor) -> Tensor:
    """The gradient of an energy with respect to the input: features are second derivatives."""
    with torch.enable_grad():
        x = x.requires_grad_() if x.is_leaf else x
        return torch.autograd.grad(m.b(m.a(x).tanh()).sum(), x, create_graph=True)[0]


def with_tensor_hook(m: nn.Module, x: Tensor) -> Tensor:
    h = m.a(x)
    if h.requires_grad:
        h.register_hook(lambda gradient: 2 * gradient)
    return m.b(h.tanh())


def written_into(m: nn.Module, x: Tensor) -> Tensor:
    h = m.a(x)
    h[:, 0] = 0.0
    h.mul_(2).add_(1)
    return m.b(h)


def with_a_module_hook() -> Made:
    model = mlp(nn.Tanh)
    model[2].register_full_backward_hook(lambda module, inside, outside: None)
    return model, normal(5, 4)


def with_weights_out_of_order() -> Made:
    model = mlp(nn.Tanh, widths=(4, 4, 4, 2))
    model[0].weight = nn.Parameter(normal(4, 4).T)
    model[2].weight = nn.Parameter(model[0].weight.data)  # two parameters in one place
    return model, normal(5, 4)


def beside(dtype: torch.dtype) -> Callable[[], Made]:
    """A frozen parameter of a dtype that has no derivatives."""

    def make() -> Made:
        model = Forward(
            lambda m, x: m.fc(x) + x @ (m.table.real.double() if m.table.is_complex() else m.table.to(x.dtype)),
            fc=nn.Linear(4, 2),
        )
        model.table = nn.Parameter((4 * normal(4, 2)).float().to(dtype), requires_grad=False)
        return model, normal(5, 4)

    return make


def made_in_inference_mode() -> Made:
    with torch.inference_mode():
        return mlp(nn.Tanh), normal(5, 4)


def batch_made_in_inference_mode() -> Made:
    with torch.inference_mode():
        x = normal(5, 4)
    return mlp(nn.Tanh), x


def sparse(layer: type[nn.Module]) -> Callable[[], Made]:
    return of(lambda m, x: m.out(m.table(x).reshape(len(x), -1, 4).tanh().mean(1)), lambda: torch.randint(7, (5, 3)),
        table=lambda: layer(7, 4, sparse=True), out=linear(4, 2))  # fmt: skip


EXACT: dict[str, Any] = {
    "custom function without vmap": of(lambda m, x: m.b(Square.apply(m.a(x) * m.s)), a=linear(4, 5), b=linear(5, 2),
        s=lambda: normal(5)),
    "custom function in numpy": of(lambda m, x: m.b(ByNumpy.apply(m.a(x) * m.s)), a=linear(4, 5), b=linear(5, 2),
        s=lambda: normal(5)),
    "straight-through": of(lambda m, x: m.b(StraightThrough.apply(m.a(x))), a=linear(4, 5), b=linear(5, 2)),
    "custom product with a weight": of(lambda m, x: m.b(Product.apply(m.a(x), m.w)), a=linear(4, 5), b=linear(5, 2),
        w=lambda: normal(5, 5)),
    "custom function that cuts the graph": of(lambda m, x: m.b(Cut.apply(m.a(x), m.w)) + m.c(x), a=linear(4, 5),
        b=linear(5, 2), c=linear(4, 2), w=lambda: normal(5, 5)),
    "a part detached": of(lambda m, x: m.b(m.a(x).detach()), a=linear(4, 5), b=linear(5, 2)),
    "TorchScript inside": lambda: (nn.Sequential(torch.jit.script(mlp(nn.Tanh)), nn.Linear(3, 2).double()), normal(5, 4)),
    "complex input": of(lambda m, x: m.a(x.abs()), lambda: torch.complex(normal(5, 4), normal(5, 4)), a=linear(4, 2)),
    "truth values as input": of(lambda m, x: m.a(x.double()), lambda: torch.randint(2, (5, 4)).bool(), a=linear(4, 2)),
    "int8 parameter, frozen": beside(torch.int8),
    "float8 parameter, frozen": beside(torch.float8_e4m3fn),
    "complex parameter, frozen": beside(torch.complex64),
    "model made in inference mode": made_in_inference_mode,
    "batch made in inference mode": batch_made_in_inference_mode,
    "input with a graph": lambda: (mlp(nn.Tanh), normal(5, 4).requires_grad_() * 2),
    "input that is a parameter": lambda: (mlp(nn.Tanh), nn.Parameter(normal(5, 4))),
    "input expanded": lambda: (mlp(nn.Tanh), normal(1, 4).expand(5, 4)),
    "images with channels last": lambda: (nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))
        .double().to(memory_format=torch.channels_last), normal(4, 2, 5, 5).to(memory_format=torch.channels_last)),
    "weights out of order and in one place": with_weights_out_of_order,
    "forces": of(forces, a=linear(4, 5), b=linear(5, 1)),
    "jvp inside": of(lambda m, x: torch.func.jvp(lambda z: m.b(m.a(z).tanh()), (x,), (torch.ones_like(x),))[1],
        a=linear(4, 5), b=linear(5, 2)),
    "vmap inside": of(lambda m, x: torch.func.vmap(lambda z: m.b(m.a(z).tanh()))(x), a=linear(4, 5), b=linear(5, 2)),
    "a tensor's hook": of(with_tensor_hook, a=linear(4, 5), b=linear(5, 2)),
    "a module's backward hook": with_a_module_hook,
    "a layer's output written into": of(written_into, a=linear(4, 5), b=linear(5, 2)),
    "a checkpoint in a checkpoint": of(lambda m, x: checkpoint(m.a, checkpoint(m.a, x, use_reentrant=False).tanh(),
        use_reentrant=False), a=linear(4, 4)),
    "a lone parameter in a checkpoint": of(lambda m, x: checkpoint(lambda z: m.a(z) * m.s, x, use_reentrant=False),
        a=linear(4, 4), s=lambda: normal(4)),
    "averaged model": lambda: (torch.optim.swa_utils.AveragedModel(mlp(nn.Tanh)), normal(5, 4)),
    "sparse gradients of an Embedding": sparse(nn.Embedding),
    "sparse gradients of an EmbeddingBag": sparse(nn.EmbeddingBag),
}  # fmt: skip


def build(make: Callable[[], Made]) -> Made:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model, x = make()
        return model.eval(), x


@pytest.mark.parametrize("name", EXACT)
def test_features_are_what_autograd_says_of_one_sample(name: str) -> None:
    model, x = build(EXACT[name])
    before = fingerprint(model, x)
    feats = at.tangent_features(model, x)
    assert fingerprint(model, x) == before
    twin = model
    if name == "model made in inference mode":
        twin = mlp(nn.Tanh)
        twin.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    if name.startswith("sparse"):
        model.table.sparse = False
    phi = reference.jacobian(twin, x)
    made = feats.dense().numpy()
    assert made.shape == phi.shape
    np.testing.assert_allclose(made, phi, rtol=0, atol=1e-9 * np.abs(phi).max())
    kernel = at.tangent_kernel(model, x, tile=2).numpy()
    np.testing.assert_allclose(kernel, reference.kernel(phi, phi), rtol=0, atol=1e-9 * np.abs(kernel).max())


def test_autocast_inside_a_model() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.b(m.a(x).tanh()).float()

    model, x = build(of(run, lambda: normal(5, 4).float(), a=linear(4, 5), b=linear(5, 2)))
    model.float()
    feats = at.tangent_features(model, x)
    assert feats.dtype == torch.float32
    assert {block.kind for block in feats.blocks.values()} == {"factored"}
    phi = reference.jacobian(model, x)
    np.testing.assert_allclose(feats.dense().numpy(), phi, rtol=0, atol=0.05 * np.abs(phi).max())
    assert feats.kernel().dtype == torch.float32


# Behavior of only some samples of a batch, none of which is probed.


def sorted_where_rare(m: nn.Module, x: Tensor) -> Tensor:
    order = (x[:, 0] > 3).int().argsort(stable=True, descending=True)
    return m.b(m.a(x[order]).tanh()[order.argsort()])


def expert_where_rare(m: nn.Module, x: Tensor) -> Tensor:
    h, rare = m.a(x).tanh(), x[:, 0] > 3
    return m.b(h.index_add(0, rare.nonzero()[:, 0], m.c(x[rare])) if bool(rare.any()) else h)


def second_use_where_rare(m: nn.Module, x: Tensor) -> Tensor:
    h, rare = m.a(x).tanh(), x[:, :1] > 3
    return m.b(h + rare * F.linear(x, m.a.weight) ** 2 if bool(rare.any()) else h)


def mixed_where_rare(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(m.a(x)) * (2 if bool((x[:, 0] > 3).any()) else 1)


def with_a_rare_sample(function: Callable[..., Tensor]) -> Callable[[], Made]:
    def rare() -> Tensor:
        x = normal(40, 4).clamp(-2, 2)
        x[6, 0] = 5
        return x

    return of(function, rare, a=linear(4, 5), b=linear(5, 2), c=linear(4, 5))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(sorted_where_rare),
        expert_where_rare,
        second_use_where_rare,
    ],
)
def test_what_shows_in_samples_that_were_not_probed(function: Callable[..., Tensor]) -> None:
    model, x = build(with_a_rare_sample(function))
    phi = reference.jacobian(model, x)
    np.testing.assert_allclose(
        at.tangent_features(model, x).dense().numpy(), phi, rtol=0, atol=1e-9 * np.abs(phi).max()
    )
    made = at.tangent_kernel(model, x, outputs="trace", tile=7).numpy()
    expected = reference.kernel(phi, phi, "trace")
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_an_influence_of_a_sample_that_was_not_probed_is_refused() -> None:
    model, x = build(with_a_rare_sample(mixed_where_rare))
    with pytest.raises(at.TangentError, match="influence each other"):
        at.tangent_features(model, x)


# Refusals, and what their messages must say.


def reentrant(m: nn.Module, x: Tensor) -> Tensor:
    return m.out(checkpoint(m.body, m.first(x), use_reentrant=True))


def reentrant_from_the_input(m: nn.Module, x: Tensor) -> Tensor:
    return m.out(checkpoint(m.body, x.requires_grad_() if x.is_leaf else x, use_reentrant=True))


def reentrant_outside_the_graph(m: nn.Module, x: Tensor) -> Tensor:
    return m.out(checkpoint(m.body, x, use_reentrant=True))


def lazy() -> Made:
    return nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2)).double(), normal(5, 4)


def partly_meta() -> Made:
    model = mlp(nn.Tanh)
    model[2].to("meta")
    return model, normal(5, 4)


def complex_weights() -> Made:
    model = Forward(lambda m, x: (m.fc(x) * m.phase).real, fc=nn.Linear(4, 2))
    model.phase = nn.Parameter(torch.complex(normal(2), normal(2)))
    return model, normal(5, 4)


def int8_weights() -> Made:
    model = mlp(nn.Tanh)
    model.scales = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    return model, normal(5, 4)


def quantized(*, whole: bool) -> Made:
    model = torch.ao.quantization.quantize_dynamic(mlp(nn.Tanh).float(), {nn.Linear})
    return (model if whole else nn.Sequential(nn.Linear(4, 4), model)), normal(5, 4).float()


def looked_up(layer: Callable[[], nn.Module]) -> Callable[[], Made]:
    return of(lambda m, x: m.out(m.table(x).reshape(len(x), -1, 4).mean(1)), lambda: torch.randint(3, (5, 3)),
        table=layer, out=linear(4, 2))  # fmt: skip


def ragged() -> Made:
    rows = [normal(2, 4), normal(3, 4)]
    return mlp(nn.Tanh), torch.nested.nested_tensor(rows, layout=torch.jagged)


NO_GRADIENT = "no (derivative|gradient|path)|cannot (see|be seen)|outside the graph|depend"
REFUSED: dict[str, tuple[Callable[[], Made], str, dict[str, Any], str]] = {
    "output detached": (of(lambda m, x: m.fc(x).detach(), fc=linear(4, 2)), NO_GRADIENT, {}, "silently zero"),
    "output under no_grad": (of(torch.no_grad()(lambda m, x: m.fc(x)), fc=linear(4, 2)), NO_GRADIENT, {},
        "silently zero"),
    "output in inference mode": (of(torch.inference_mode()(lambda m, x: m.fc(x)), fc=linear(4, 2)), NO_GRADIENT, {},
        "silently zero"),
    "DataParallel": (lambda: (nn.DataParallel(mlp(nn.Tanh)), normal(5, 4)), r"DataParallel.*\.module", {},
        "RuntimeError: the stateless API"),
    "scripted": (lambda: (torch.jit.script(mlp(nn.Tanh)), normal(5, 4)), "[Ss]cript", {}, "RuntimeError: stateless API"),
    "traced": (lambda: (torch.jit.trace(mlp(nn.Tanh), normal(5, 4)), normal(5, 4)), "[Ss]cript|trace", {},
        "RuntimeError: the stateless API"),
    "lazy layer": (lazy, "'?1'?.*(initiali[sz]|run)", {}, "ValueError: uninitialized parameter"),
    "model on meta": (lambda: (mlp(nn.Tanh).to("meta"), normal(5, 4)), "meta", {}, ""),
    "all on meta": (lambda: (mlp(nn.Tanh).to("meta"), normal(5, 4).to("meta")), "meta", {}, "RuntimeError: item()"),
    "a part on meta": (partly_meta, "2.weight.*meta", {}, "RuntimeError: device meta"),
    "int8 parameter": (int8_weights, "scales.*int8", {"wrt": "*"}, "RuntimeError: only floating point"),
    "quantized": (lambda: quantized(whole=True), "no parameters", {}, ""),
    "quantized in the end": (lambda: quantized(whole=False), f"{NO_GRADIENT}|quanti|influence each other", {},
        "RuntimeError or silently zero"),
    "gradients scaled by frequency": (looked_up(lambda: nn.Embedding(3, 4, scale_grad_by_freq=True)),
        "table.*scale_grad_by_freq", {}, "features are autograd's, which are no derivatives"),
    "Embedding with max_norm": (looked_up(lambda: nn.Embedding(3, 4, max_norm=0.5)), "table.*max_norm", {},
        "the model's table is changed"),
    "EmbeddingBag with max_norm": (looked_up(lambda: nn.EmbeddingBag(3, 4, max_norm=0.5)), "table.*max_norm", {},
        "the model's table is changed"),
    "sparse batch": (lambda: (mlp(nn.Tanh), normal(5, 4).to_sparse()), "sparse", {}, "RuntimeError: reshape"),
    "ragged batch": (ragged, "nested|jagged|ragged", {}, "RuntimeError of nested tensors"),
    "no outputs": (of(lambda m, x: m.fc(x)[:, :0], fc=linear(4, 2)), "no output|c ≥ 1|0 outputs|empty", {},
        "RuntimeError: max() of nothing"),
}  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        of(reentrant, first=linear(4, 4), body=body, out=linear(4, 2)),
        of(reentrant_from_the_input, body=body, out=linear(4, 2)),
        of(reentrant_outside_the_graph, body=body, out=linear(4, 2)),
    ],
)
def test_reentrant_checkpoints_hide_no_parameters(make: Callable[[], Made], monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd cannot see inside them, so the reference runs without them."""
    model, x = build(make)
    made = at.tangent_features(model, x).dense().numpy()
    monkeypatch.setitem(globals(), "checkpoint", lambda function, *arguments, use_reentrant: function(*arguments))
    np.testing.assert_allclose(made, reference.jacobian(model, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_refused_by_name_with_a_remedy(name: str) -> None:
    make, message, keywords, _ = REFUSED[name]
    model, x = build(make)
    state = [] if name == "lazy layer" else [p.detach().clone() for p in model.parameters()]
    with pytest.raises(at.TangentError, match=f"(?s)tangent_features: .*(?:{message})"):
        at.tangent_features(model, x, **keywords)
    for old, new in zip(state, model.parameters(), strict=False):
        assert old.device.type == "meta" or torch.equal(old, new)


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_a_table_with_a_largest_norm_is_left_as_found(layer: type[nn.Module]) -> None:
    model, x = build(looked_up(lambda: layer(3, 4, max_norm=0.5)))
    before = fingerprint(model, x)
    with contextlib.suppress(at.TangentError):
        at.tangent_features(model, x)
    assert fingerprint(model, x) == before


def test_no_warning_of_torch_comes_from_how_features_are_made() -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 3, padding=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        at.tangent_features(nn.Sequential(layer, nn.Flatten(), nn.Linear(15, 2)), normal(3, 2, 5).float())
