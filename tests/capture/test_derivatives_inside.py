"""Models that differentiate, hook or transform in their forward pass: features equal plain autograd's, sample by sample."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import adaptive_tangents as at
import reference
from adaptive_tangents.capture import lease
from cases import Forward, normal
from prepared import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def summed_gradient(m: nn.Module, x: Tensor) -> Tensor:
    x.requires_grad_()
    return torch.autograd.grad(m.net(x).sum(), x, create_graph=True)[0]


def value_and_gradient(m: nn.Module, x: Tensor) -> Tensor:
    x = x.requires_grad_()
    y = m.net(x)
    return torch.cat([y, torch.autograd.grad(y.sum(), x, create_graph=True)[0]], 1)


def laplacian(m: nn.Module, x: Tensor) -> Tensor:
    x = x.requires_grad_()
    g = torch.autograd.grad(m.net(x).sum(), x, create_graph=True)[0]
    second = [torch.autograd.grad(g[:, k].sum(), x, create_graph=True)[0][:, k] for k in range(x.shape[1])]
    return torch.stack(second, 1).sum(1, keepdim=True)


def forces(m: nn.Module, z: Tensor, place: Tensor) -> Tensor:
    """Minus the gradient of an energy by the places of atoms."""
    place.requires_grad_()
    near = torch.exp(-(place[:, :, None] - place[:, None]).square().sum(-1)).sum(-1, keepdim=True)
    energy = m.net(torch.cat([m.kinds(z), near], -1)).sum()
    return -torch.autograd.grad(energy, place, create_graph=True)[0].flatten(1)


def by_grad(m: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda z: m.net(z)[0]))(x)


def by_hessian(m: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.hessian(lambda z: m.net(z)[0]))(x).flatten(1)


def by_jacrev(m: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.jacrev(m.net))(x).flatten(1)


def by_jacfwd(m: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.jacfwd(m.net))(x).flatten(1)


def by_jvp(m: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jvp(m.net, (x,), (torch.ones_like(x),))[1]


def by_vjp(m: nn.Module, x: Tensor) -> Tensor:
    y, back = torch.func.vjp(m.net, x)
    return back(torch.ones_like(y))[0]


def by_dual_numbers(m: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(m.net(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def inner_step(m: nn.Module, x: Tensor) -> Tensor:
    """One step of gradient descent for each sample, by autograd, with a learned step size."""
    out = []
    for row in x:
        w, b = m.net[0].weight, m.net[0].bias
        g = torch.autograd.grad((row @ w.T + b).square().sum(), w, create_graph=True)[0]
        out.append(row @ (w - m.rate * g).T + b)
    return torch.stack(out)


def inner_step_by_func(m: nn.Module, x: Tensor) -> Tensor:
    """The same by torch.func, on all parameters of a part."""
    names = dict(m.net[0].named_parameters())

    def adapted(row: Tensor) -> Tensor:
        g = torch.func.grad(lambda p: (row @ p["weight"].T + p["bias"]).square().sum())(names)
        return row @ (names["weight"] - m.rate * g["weight"]).T + names["bias"]

    return torch.stack([adapted(row) for row in x])


def overwritten(m: nn.Module, x: Tensor) -> Tensor:
    """An in-place operation before the inner derivative."""
    x = x.requires_grad_()
    return torch.autograd.grad(m.net[2](m.net[0](x).tanh_()).sum(), x, create_graph=True)[0]


def hooked(m: nn.Module, x: Tensor) -> Tensor:
    y = m.net[0](x)
    y.register_hook(lambda g: None)
    y.retain_grad()
    return m.net[1:](y)


def hooked_parameter(m: nn.Module, x: Tensor) -> Tensor:
    m.net[0].weight.register_hook(lambda g: None)
    return m.net(x)


def graph_asked_for(m: nn.Module, x: Tensor) -> Tensor:
    y = m.net[0](x)
    assert y.grad_fn.name()
    return m.net[1:](y)


def ragged(m: nn.Module, x: Tensor) -> Tensor:
    rows = torch.nested.nested_tensor_from_jagged(x.flatten(0, 1), torch.arange(len(x) + 1) * x.shape[1])
    return m.net(rows).values().view(len(x), -1, 1).sum(1)


def padded(m: nn.Module, x: Tensor) -> Tensor:
    rows = torch.nested.nested_tensor(list(x), layout=torch.strided)
    return torch.nested.to_padded_tensor(m.net[0](rows), 0.0).sum(1)


def three() -> Tensor:
    return normal(5, 3)


def sequences() -> Tensor:
    return normal(5, 4, 3)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], Any]]] = {
    function.__name__: (function, three)
    for function in (
        summed_gradient, value_and_gradient, laplacian, by_grad, by_hessian, by_jacrev, by_jacfwd, by_jvp, by_vjp,
        by_dual_numbers, inner_step, inner_step_by_func, overwritten, hooked, hooked_parameter, graph_asked_for,
    )
} | {
    "forces": (forces, lambda: (torch.randint(3, (5, 4)), normal(5, 4, 3))),
    "ragged": (ragged, sequences),
    "padded": (padded, sequences),
}  # fmt: skip
every_case = pytest.mark.parametrize("name", CASES)


def build(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    function, x = CASES[name]
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    return Forward(function, net=net, kinds=nn.Embedding(3, 2), rate=torch.tensor(0.1)), x()


@functools.cache
def true(name: str) -> reference.Array:
    """The Jacobian of plain autograd."""
    return reference.jacobian(*build(name))


def close(found: Tensor, expected: reference.Array) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@every_case
def test_features_and_kernels_are_autograds(name: str) -> None:
    model, x = build(name)
    before = fingerprint(model, x)
    phi = true(name)
    close(at.tangent_features(model, x).dense(), phi)
    close(at.tangent_kernel(model, x, outputs="trace", tile=3), reference.kernel(phi, phi, "trace"))
    assert fingerprint(model, x) == before


@every_case
def test_features_of_some_parameters_are_autograds(name: str) -> None:
    model, x = build(name)
    shapes = {k: tuple(p.shape) for k, p in model.named_parameters()}
    phi = reference.restricted(true(name), shapes, ["net.0.bias"])
    close(at.tangent_features(model, x, wrt="net.0.bias").dense(), phi)
    state = {k: v + 0.1 for k, v in model.state_dict().items()}
    close(at.tangent_features(model, x, params=state).dense(), reference.jacobian(model, x, state=state))


@every_case
def test_the_linearized_module_moves_by_the_features(name: str) -> None:
    model, x = build(name)
    module = at.TangentModule(model, at.Fixed())
    for matrix in module.inner.values():
        matrix.data = torch.randn_like(matrix)
    feats, out = module.features(x), module(x)
    beta = feats.join(module.effective_coefficients())
    close(out - module.initial(x), true(name) @ beta.numpy())
    out.square().sum().backward()
    back = 2 * feats.rmatvec(out.detach())
    grads = {name: module.inner["block:" + name.replace(".", "/")].grad for name in module.blocks}
    close(feats.join(grads), back.numpy())


@pytest.mark.parametrize("name", ["summed_gradient", "by_grad", "hooked", "inner_step"])
def test_path_averages_hold_the_identity(name: str) -> None:
    model, x = build(name)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    end = {k: v + 0.05 for k, v in start.items()}
    assert at.average_features(model, start, end, x, tol=1e-6).error <= 1e-6


def test_watching_saved_tensors_keeps_second_derivatives() -> None:
    """The hooks with which bytes are counted and copies kept pass a saved tensor's history on."""
    from adaptive_tangents.capture.derivatives import saved_copies
    from adaptive_tangents.capture.recording import bytes_kept

    model, x = build("laplacian")
    plain = laplacian(model, x.clone())
    wanted = torch.autograd.grad(plain.sum(), list(model.net.parameters()), materialize_grads=True)
    with saved_copies():
        copied = laplacian(model, x.clone())
    counted, kept = bytes_kept(lambda: laplacian(model, x.clone()), set())
    assert kept > 0
    for out in (copied, counted):
        found = torch.autograd.grad(out.sum(), list(model.net.parameters()), materialize_grads=True)
        for one, two in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-13)


def test_bytes_are_counted_where_saved_tensors_cannot_be_watched() -> None:
    from adaptive_tangents.capture.recording import bytes_kept

    model, x = build("by_grad")
    assert bytes_kept(lambda: by_grad(model, x), set())[1] > len(x) * 5 * 8


class Leaves(nn.Module):
    """A network that keeps what it sees, also inside transforms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.seen = nn.Linear(3, 2), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        out: Tensor = self.a(x)
        return out


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.jacrev(lambda x: f(x).sum())])
def test_tensors_that_a_transform_left_in_a_model_are_let_be(
    transform: Callable[[nn.Module], Callable[[Tensor], Tensor]],
) -> None:
    model, x = Leaves().double(), normal(4, 3)
    transform(model)(x)
    left = list(model.seen)
    for _ in range(2):
        feats = at.tangent_features(model, x).dense().numpy()
        assert abs(feats - reference.jacobian(Unseen(model.a), x)).max() < 1e-12
    assert len(model.seen) == len(left) == 1
    assert model.seen[0] is left[0]


class Unseen(nn.Module):
    def __init__(self, a: nn.Module) -> None:
        super().__init__()
        self.a = a

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x)
        return out


def test_a_loan_ends_although_something_cannot_be_put_back() -> None:
    model, done = nn.Linear(3, 2), list[int]()

    def fails() -> None:
        raise ValueError("not to be put back")

    def lent(loan: lease.Loan) -> None:
        loan._undo += [lambda: done.append(1), fails, lambda: done.append(2)]

    with pytest.raises(ValueError, match="not to be put back"):
        lease.on_loan(model, lent)
    assert set(done) == {1, 2}
    assert lease.current(model) is None
    assert at.tangent_features(model, torch.randn(4, 3)).n == 4
