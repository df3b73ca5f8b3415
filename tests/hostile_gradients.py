"""Models with derivatives of their own: custom functions, hooks, derivatives inside forward, gradients that are none."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from cases import normal
from hostile_case import Case, Made
from hostile_state import of

NO_DERIVATIVE = "not the derivative|no derivative|not a derivative|detach|differ"


def tanh_net(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


# Backward passes that run modules again.


class Rerun(torch.autograd.Function):
    """A callable is run without a graph, and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor, *held: Tensor) -> Tensor:
        ctx.run, ctx.x, ctx.held = run, x, held
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Any, ...]:
        again = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run(again)
        return None, *torch.autograd.grad(out, (again, *ctx.held), signal, allow_unused=True)


class RerunModule(torch.autograd.Function):
    """The backward pass asks the module for its parameters."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: Tensor, *held: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Any, ...]:
        again = ctx.saved_tensors[0].detach().requires_grad_()
        held = tuple(ctx.module.parameters())
        with torch.enable_grad():
            found = torch.autograd.grad(ctx.module(again), (again, *held), signal)
        return None, *found


class Accumulating(torch.autograd.Function):
    """The backward pass adds to .grad of the parameters itself, which torch.autograd.grad does not see."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Any, ...]:
        again = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.module(again).backward(signal)
        return None, again.grad


class Adjoint(torch.autograd.Function):
    """Euler steps, and the adjoint steps of an ODE solver backwards."""

    @staticmethod
    def forward(ctx: Any, field: nn.Module, steps: int, x: Tensor, *held: Tensor) -> Tensor:
        states = [x]
        with torch.no_grad():
            for _ in range(steps):
                states.append(states[-1] + field(states[-1]) / steps)
        ctx.field, ctx.held = field, held
        ctx.save_for_backward(*states)
        return states[-1]

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Any, ...]:
        *states, _ = ctx.saved_tensors
        total = [torch.zeros_like(p) for p in ctx.held]
        for state in reversed(states):
            with torch.enable_grad():
                state = state.detach().requires_grad_()
                slope = ctx.field(state) / len(states)
            back, *found = torch.autograd.grad(slope, (state, *ctx.held), signal)
            signal = signal + back
            total = [t + g for t, g in zip(total, found, strict=True)]
        return None, None, signal, *total


class Reversible(torch.autograd.Function):
    """Additive coupling: the backward pass makes the inputs from the outputs."""

    @staticmethod
    def forward(ctx: Any, f: nn.Module, g: nn.Module, a: Tensor, b: Tensor, *held: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            a = a + f(b)
            b = b + g(a)
        ctx.f, ctx.g = f, g
        ctx.save_for_backward(a, b)
        return a, b

    @staticmethod
    def backward(ctx: Any, to_a: Tensor, to_b: Tensor) -> tuple[Any, ...]:
        a, b = (t.detach() for t in ctx.saved_tensors)
        with torch.enable_grad():
            after = a.clone().requires_grad_()
            made = ctx.g(after)
        from_g = torch.autograd.grad(made, (after, *ctx.g.parameters()), to_b)
        to_a = to_a + from_g[0]
        with torch.enable_grad():
            before = (b - made.detach()).requires_grad_()
            made = ctx.f(before)
        from_f = torch.autograd.grad(made, (before, *ctx.f.parameters()), to_a)
        return None, None, to_a, to_b + from_f[0], *from_f[1:], *from_g[1:]


def reversible(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    for _ in range(2):
        held = (*m.f.parameters(), *m.g.parameters())
        h = torch.cat(Reversible.apply(m.f, m.g, *h.chunk(2, -1), *held), -1)
    return m.b(h)


def rerun_in_a_rerun(m: Any, x: Tensor) -> Tensor:
    held = tuple(m.f.parameters())
    return m.b(Rerun.apply(lambda z: Rerun.apply(m.f, z, *held).tanh(), m.a(x), *held))


def checkpointed(*, reentrant: bool) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: m.b(checkpoint(m.f, m.a(x), use_reentrant=reentrant))


def checkpointed_with_context(m: Any, x: Tensor) -> Tensor:
    def contexts() -> tuple[Any, Any]:
        return torch.enable_grad(), torch.enable_grad()

    return m.b(checkpoint(lambda z, gain: m.f(z) * gain, m.a(x), gain=2.0, use_reentrant=False, context_fn=contexts))


def checkpointed_without_state(m: Any, x: Tensor) -> Tensor:
    return m.b(checkpoint(m.f, m.a(x), use_reentrant=False, preserve_rng_state=False))


# Custom functions with names of torch's.


def named(name: str, forward: Callable[..., Tensor], backward: Callable[..., Any]) -> Any:
    return type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )


def saving(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def forward(ctx: Any, a: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(a, w)
        return function(a, w)

    return forward


def back_of_scale(ctx: Any, signal: Tensor) -> tuple[Tensor, Tensor]:
    a, w = ctx.saved_tensors
    return signal * w, (signal * a).sum(0)


def back_of_product(ctx: Any, signal: Tensor) -> tuple[Tensor, Tensor]:
    a, w = ctx.saved_tensors
    return signal @ w.T, a.T @ signal


def back_of_sum(ctx: Any, signal: Tensor) -> tuple[Tensor, Tensor]:
    return signal, signal.sum(0)


def back_of_lookup(ctx: Any, signal: Tensor) -> tuple[None, Tensor]:
    rows, table = ctx.saved_tensors
    return None, torch.zeros_like(table).index_add(0, rows, signal)


def with_function(function: Any, *shape: int) -> Callable[[], Made]:
    return of(lambda m, x: m.b(torch.tanh(function.apply(m.a(x), m.w))), w=lambda: normal(*shape))


def looked_up_by(function: Any) -> Callable[[], Made]:
    return of(
        lambda m, i: m.b(torch.tanh(function.apply(i, m.w))), x=lambda: torch.randint(5, (4,)), w=lambda: normal(5, 4)
    )


SCALES = ("Mul", "Expand", "NativeLayerNorm", "AccumulateGrad")
PRODUCTS = ("Mm", "Addmm", "Convolution", "T")
LOOKUPS = ("Embedding", "Index")


class Taken(torch.autograd.Function):
    """setup_context, an argument that is no tensor, and a gradient made only where it is asked for."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, power: int) -> tuple[Tensor, Tensor]:
        return x * w**power, x.detach().sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, w, ctx.power = inputs
        ctx.save_for_backward(x, w)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, signal: Tensor, _: Any) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        to_x = signal * w**ctx.power if ctx.needs_input_grad[0] else None
        to_w = (signal * x * ctx.power * w ** (ctx.power - 1)).sum(0) if ctx.needs_input_grad[1] else None
        return to_x, to_w, None


class Once(torch.autograd.Function):
    """Differentiable once, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.sin_()
        ctx.mark_dirty(x)
        ctx.cosine = (1 - x.detach() ** 2).sqrt()
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, signal: Tensor) -> Tensor:
        return signal * ctx.cosine


# Derivatives in forward.


def force(m: Any, x: Tensor) -> Tensor:
    x.requires_grad_()
    return torch.autograd.grad(m.f(x).sum(), x, create_graph=True)[0]


def force_with_enable_grad(m: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        energy = m.f(x)
        (slope,) = torch.autograd.grad(energy, x, torch.ones_like(energy), create_graph=True, retain_graph=True)
    return torch.cat([energy, slope], 1)


def residual(m: Any, x: Tensor) -> Tensor:
    """A PINN: u_t − u_xx, from two passes of autograd."""
    t, s = (x[:, k : k + 1].clone().requires_grad_() for k in (0, 1))
    u = m.f(torch.cat([t, s, x[:, 2:]], 1))
    ones = torch.ones_like(u)
    (u_t,) = torch.autograd.grad(u, t, ones, create_graph=True)
    (u_s,) = torch.autograd.grad(u, s, ones, create_graph=True)
    (u_ss,) = torch.autograd.grad(u_s, s, ones, create_graph=True)
    return torch.cat([u_t - u_ss, u], 1)


def slope_by_backward(m: Any, x: Tensor) -> Tensor:
    """backward() on the input, in forward."""
    z = x.detach().clone().requires_grad_()
    m.f(z).sum().backward(create_graph=True, inputs=[z])
    return m.b(m.a(x)) + z.grad[:, :1]


def adapted(m: Any, x: Tensor) -> Tensor:
    """MAML: a step on an inner loss, then the output with the adapted weights, sample by sample."""
    rows = []
    for row in x:
        weights = {"a": m.a.weight, "b": m.b.weight}
        for _ in range(2):
            loss = (F.linear(torch.tanh(F.linear(row, weights["a"])), weights["b"]) - 1).square().sum()
            found = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {k: w - 0.1 * g for (k, w), g in zip(weights.items(), found, strict=True)}
        rows.append(F.linear(torch.tanh(F.linear(row, weights["a"], m.a.bias)), weights["b"], m.b.bias))
    return torch.stack(rows)


def adapted_functionally(m: Any, x: Tensor) -> Tensor:
    start = dict(m.f.named_parameters())

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return (torch.func.functional_call(m.f, weights, (row,)) - 1).square().sum()

    def one(row: Tensor) -> Tensor:
        found = torch.func.grad(loss)(start, row)
        return torch.func.functional_call(m.f, {k: w - 0.1 * found[k] for k, w in start.items()}, (row,))

    return torch.func.vmap(one)(x)


def first_order(m: Any, x: Tensor) -> Tensor:
    """The inner gradient is a constant."""
    z = x.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(m.f(z).sum(), z)
    return m.b(torch.tanh(m.a(x + slope)))


def implicit(m: Any, x: Tensor) -> Tensor:
    """A fixed point without a graph, one step with one, and a hook that solves for the gradient."""
    injected = m.a(x)
    with torch.no_grad():
        z = torch.zeros_like(injected)
        for _ in range(60):
            z = torch.tanh(injected + 0.1 * z @ m.w)
    z = torch.tanh(injected + 0.1 * z @ m.w)
    if z.requires_grad:
        start = z.detach().requires_grad_()
        step = torch.tanh(injected.detach() + 0.1 * start @ m.w.detach())

        def solve(signal: Tensor) -> Tensor:
            found = signal
            for _ in range(60):
                found = signal + torch.autograd.grad(step, start, found, retain_graph=True)[0]
            return found

        z.register_hook(solve)
    return m.b(z)


# Hooks.


def hooked_tensor(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h.register_hook(lambda signal: None)
    h.retain_grad()
    return m.b(torch.tanh(h))


def reversal(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    if h.requires_grad:
        h.register_hook(lambda signal: -signal)
    return m.b(torch.tanh(h))


def hooked(*registered: Callable[[nn.Sequential], Any]) -> Callable[[], Made]:
    def make() -> Made:
        model = tanh_net(3, 4, 2).double()
        for register in registered:
            register(model)
        return model, normal(4, 3)

    return make


def remembers_outputs(model: nn.Sequential) -> None:
    model.seen = []
    model[0].register_forward_hook(lambda module, arguments, out: model.seen.append(out))


# Gradients that are not the derivative, or are although a part is detached.


def straight_through(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(h + (h.round() - h).detach())


def quantized_weights(m: Any, x: Tensor) -> Tensor:
    w = m.a.weight
    return m.b(torch.tanh(F.linear(x, w + ((8 * w).round() / 8 - w).detach(), m.a.bias)))


def detached_norm(m: Any, x: Tensor) -> Tensor:
    """DoRA: the norm of the weight is taken for a constant."""
    w = m.a.weight
    return m.b(F.linear(x, m.g[:, None] * w / w.norm(dim=1, keepdim=True).detach()))


def stable_softmax(m: Any, x: Tensor) -> Tensor:
    """The detached maximum has no influence."""
    h = m.a(x)
    e = (h - h.max(1, keepdim=True).values.detach()).exp()
    return m.b(e / e.sum(1, keepdim=True))


def detached_to_no_effect(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(torch.tanh(h + (h - h).detach())) + 0 * m.b(h).detach()


class TrainedOnly(torch.autograd.Function):
    """A backward pass that refuses, as a reversible network's does in eval mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> Tensor:
        raise AssertionError("If you want to train, make sure to use `model.train()`")


def normalized(normalization: nn.Module, samples: int) -> Callable[[], Made]:
    """Of one sample, torch's backward pass of a normalization misreads gradients in the order of a transpose."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.norm(m.a(x).unflatten(-1, (4, 2, 2)))
        return m.b(F.layer_norm(h.flatten(2).transpose(1, 2), (4,)).sin()).mean(1)

    def make() -> Made:
        return of(
            run, x=lambda: normal(samples, 3), a=lambda: nn.Linear(3, 16), norm=lambda: copy.deepcopy(normalization)
        )()

    return make


def all_of(*names: str) -> dict[str, Any]:
    return {name: lambda: tanh_net(4, 4, 4) for name in names}


NET = {"f": lambda: tanh_net(3, 5, 1)}
CASES = (
    Case("rerun of a closure", of(lambda m, x: m.b(Rerun.apply(lambda z: m.f(z).tanh(), m.a(x), *m.f.parameters())),
        **all_of("f"))),
    Case("rerun of a module", of(lambda m, x: m.b(RerunModule.apply(m.f, m.a(x), *m.f.parameters())), **all_of("f"))),
    Case("rerun of a method twice", of(lambda m, x: m.b(Rerun.apply(m.f.forward, RerunModule.apply(m.f, m.a(x),
        *m.f.parameters()), *m.f.parameters())), **all_of("f"))),
    Case("rerun in a rerun", of(rerun_in_a_rerun, **all_of("f"))),
    Case("rerun that adds to .grad", of(lambda m, x: m.b(Accumulating.apply(m.f, m.a(x))), **all_of("f")),
        or_error="backward|gradient|deriv|differ", module=False),
    Case("adjoint of an ODE", of(lambda m, x: m.b(Adjoint.apply(m.f, 3, m.a(x), *m.f.parameters())), **all_of("f"))),
    Case("reversible blocks", of(reversible, f=lambda: tanh_net(2, 3, 2), g=lambda: tanh_net(2, 2))),
    Case("checkpoint", of(checkpointed(reentrant=False), **all_of("f"))),
    Case("reentrant checkpoint", of(checkpointed(reentrant=True), **all_of("f"))),
    Case("checkpoint with contexts", of(checkpointed_with_context, **all_of("f"))),
    Case("checkpoint without random state", of(checkpointed_without_state, **all_of("f"))),
    Case("sequence of checkpoints", of(lambda m, x: m.b(checkpoint_sequential(m.f, 2, m.a(x), use_reentrant=False)),
        **all_of("f"))),
    *(Case(f"a function named {name}, a scale", with_function(named(name, saving(lambda a, w: a * w), back_of_scale), 4))
        for name in SCALES),
    *(Case(f"a function named {name}, a product", with_function(named(name, saving(lambda a, w: a @ w), back_of_product),
        4, 4)) for name in PRODUCTS),
    *(Case(f"a function named {name}, a lookup", looked_up_by(named(name, saving(lambda i, w: w[i]), back_of_lookup)))
        for name in LOOKUPS),
    *(Case(f"a function named {name}, a sum", with_function(named(name, saving(lambda a, w: a + w), back_of_sum), 4))
        for name in ("Add", "Sub")),
    Case("a function with parts of an interface", of(lambda m, x: m.b(torch.tanh(Taken.apply(m.a(x), m.w, 3)[0])),
        w=lambda: normal(4))),
    Case("a function in place, differentiable once", of(lambda m, x: m.b(Once.apply(0.1 * m.a(x))))),
    Case("force", of(force, **NET)),
    Case("force with gradients enabled", of(force_with_enable_grad, **NET)),
    Case("residual of a differential equation", of(residual, **NET)),
    Case("slope by backward", of(slope_by_backward, **NET), or_error="backward|gradient|deriv"),
    Case("inner loop", of(adapted)),
    Case("inner loop by torch.func", of(adapted_functionally, f=lambda: tanh_net(3, 4, 2))),
    Case("func.grad", of(lambda m, x: torch.func.grad(lambda z: m.f(z).sum())(x), **NET)),
    Case("vmap of func.grad", of(lambda m, x: torch.func.vmap(torch.func.grad(lambda z: m.f(z)[0]))(x), **NET)),
    Case("jacrev", of(lambda m, x: torch.func.vmap(torch.func.jacrev(m.f))(x)[:, 0], **NET)),
    Case("jacfwd", of(lambda m, x: torch.func.vmap(torch.func.jacfwd(m.f))(x)[:, 0], **NET)),
    Case("hessian", of(lambda m, x: torch.func.vmap(torch.func.hessian(lambda z: m.f(z)[0]))(x).flatten(1), **NET)),
    Case("Laplacian by a trace", of(lambda m, x: torch.func.vmap(lambda z: torch.func.hessian(lambda y: m.f(y)[0])(z)
        .trace())(x)[:, None] + m.f(x), **NET)),
    Case("jvp", of(lambda m, x: torch.cat(torch.func.jvp(m.f, (x,), (x.cos(),)), 1), **NET)),
    Case("vjp", of(lambda m, x: torch.func.vjp(m.f, x)[1](torch.ones(len(x), 1).to(x))[0], **NET)),
    Case("autograd.functional.jacobian", of(lambda m, x: torch.autograd.functional.jacobian(lambda z: m.f(z).sum(), x,
        create_graph=True), **NET)),
    Case("func.functional_call inside", of(lambda m, x: torch.func.functional_call(m.f, {k: 2 * v for k, v in
        m.f.named_parameters()}, (x,)), **NET)),
    Case("implicit layer", of(implicit, w=lambda: normal(4, 4)), gap=2e-6),
    Case("a hook on a tensor", of(hooked_tensor)),
    Case("full backward hooks", hooked(lambda s: s[2].register_full_backward_hook(lambda m, i, o: None),
        lambda s: s[0].register_full_backward_pre_hook(lambda m, o: None))),
    Case("a full backward hook on the whole", hooked(lambda s: s.register_full_backward_hook(lambda m, i, o: None))),
    Case("forward hooks that change", hooked(lambda s: s[0].register_forward_hook(lambda m, a, out: 2 * out.sin()),
        lambda s: s.register_forward_pre_hook(lambda m, a: (a[0] + 1,)))),
    Case("forward hooks with keywords", hooked(lambda s: s[0].register_forward_hook(lambda m, a, k, out: out + len(k),
        with_kwargs=True, always_call=True))),
    Case("a hook that remembers outputs", hooked(remembers_outputs)),
    Case("hooks of parameters", hooked(lambda s: s[0].weight.register_hook(lambda signal: 2 * signal),
        lambda s: s[2].bias.register_post_accumulate_grad_hook(lambda p: None))),
    Case("gradient turned round", of(reversal), warns=NO_DERIVATIVE),
    Case("straight through", of(straight_through), warns=NO_DERIVATIVE),
    Case("quantized weights", of(quantized_weights), warns=NO_DERIVATIVE),
    Case("detached norm", of(detached_norm, g=lambda: normal(4)), warns=NO_DERIVATIVE),
    Case("detached features", of(lambda m, x: m.b(torch.tanh(m.a(x)).detach()) + m.a(x)[:, :2]), warns=NO_DERIVATIVE),
    Case("slope as a constant", of(first_order, **NET), warns=NO_DERIVATIVE),
    *(Case(f"{kind.__name__} before a transpose, {n} samples", normalized(kind(4, affine=True), n))
        for kind in (nn.BatchNorm2d, nn.InstanceNorm2d) for n in (1, 4)),
    Case("a backward pass that asserts", of(lambda m, x: m.b(TrainedOnly.apply(m.a(x)))),
        error=r"derivatives cannot be computed \(AssertionError: If you want to train"),
    Case("stable softmax", of(stable_softmax)),
    Case("detached to no effect", of(detached_to_no_effect)),
)  # fmt: skip
