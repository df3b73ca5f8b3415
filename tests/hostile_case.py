"""One model that plays tricks, what is expected of its features, and its true derivative.

The truth is the central difference of the model itself: it is built anew for every value, and its parameters are moved in
place. Nothing here imports the package.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snapshots import contained

Made = tuple[nn.Module, Any]
STEP = 3e-5


@dataclass(frozen=True)
class Case:
    """A model and a batch.

    Right numbers are expected unless a pattern says otherwise. ``error``: features make no sense, and the message of the
    TangentError matches. ``or_error``: an error with such a message will do. ``warns``: autograd's gradient is not the
    derivative, so features are autograd's, with a TangentWarning. ``module``: TangentModule must be right too.
    ``complex``: parameters are complex, so only kernels can be compared.
    """

    name: str
    make: Callable[[], Made]
    error: str | None = None
    or_error: str | None = None
    warns: str | None = None
    module: bool = True
    complex: bool = False
    output_fn: Callable[[Any], Tensor] | None = None
    tolerance: float = 1e-9  # to autograd
    gap: float = 1e-6  # to the difference
    step: float = STEP
    twin: Callable[[], Made] | None = (
        None  # the same function, for the truth, where the model does not run on one sample
    )

    def build(self, *, true: bool = False) -> Made:
        """The model in eval mode and the batch, always the same."""
        make = self.twin if true and self.twin is not None else self.make
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            default = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)  # whatever the model has set before
            model, x = make()
            torch.set_default_dtype(default)
        with contextlib.suppress(NotImplementedError):  # exported modules
            model.eval()
        return model, x

    def run(self, model: nn.Module, x: Any) -> Tensor:
        """Outputs (n, c), as a user calls the model."""
        out = model(**x) if hasattr(x, "items") else model(*x) if isinstance(x, tuple | list) else model(x)
        return out if self.output_fn is None else self.output_fn(out)


def sample(x: Any, k: int) -> Any:
    """One sample of a batch, which shares no memory with it; what is not a tensor stays."""
    if isinstance(x, Tensor):
        return x.detach()[k : k + 1].clone()
    if hasattr(x, "items"):
        return {name: sample(value, k) for name, value in x.items()}
    if isinstance(x, tuple | list):
        return type(x)(sample(value, k) for value in x)
    return x


def tensors(x: Any) -> Iterator[Tensor]:
    """The tensors of a batch."""
    if isinstance(x, Tensor):
        yield x
    elif hasattr(x, "values") or isinstance(x, tuple | list):
        for value in x.values() if hasattr(x, "values") else x:
            yield from tensors(value)


def moved(case: Case, state: Mapping[str, Tensor] | None, along: Mapping[str, Tensor], step: float, k: int) -> Tensor:
    """f of sample k at a state plus a multiple of a direction, in a new model."""
    model, x = case.build(true=True)
    if case.tolerance > 1e-6:
        model, x = model.double(), _doubled(x)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in (state or {}).items():
            if name in named:
                named[name].copy_(value)
        for name, direction in along.items():
            named[name].add_(direction, alpha=step)
    return case.run(model, sample(x, k))[0].detach().double()


def _doubled(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    return {k: _doubled(v) for k, v in x.items()} if hasattr(x, "items") else type(x)(map(_doubled, x))


@functools.cache
def samples(case: Case) -> int:
    return len(next(tensors(case.build(true=True)[1])))


def difference(case: Case, state: Mapping[str, Tensor] | None, along: Mapping[str, Tensor]) -> Tensor:
    """(f(θ + hv) − f(θ − hv))/2h for each sample, (n, c)."""
    rows = [
        (moved(case, state, along, case.step, k) - moved(case, state, along, -case.step, k)) / (2 * case.step)
        for k in range(samples(case))
    ]
    return torch.stack(rows)


@functools.cache
def parameters(case: Case) -> dict[str, Tensor]:
    """Those that require a gradient, in the model's order."""
    return {
        name: p.detach() for name, p in case.build(true=True)[0].named_parameters() if p.requires_grad and p.numel()
    }


def directions(case: Case) -> list[dict[str, Tensor]]:
    """A random one, which errors do not avoid; for complex parameters one for each real number."""
    named = parameters(case)
    if case.complex:
        units = [(name, p, unit) for name, p in named.items() for unit in ((1, 1j) if p.is_complex() else (1,))]
        return [
            {name: (unit * entry).to(p.dtype).view(p.shape)}
            for name, p, unit in units
            for entry in torch.eye(p.numel())
        ]
    generator = torch.Generator().manual_seed(3)
    return [{k: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for k, p in named.items()}]


@dataclass(frozen=True)
class Truth:
    """Derivatives along directions, and the whole Jacobian (n, c, p) of plain autograd if it agrees with them."""

    along: list[tuple[dict[str, Tensor], Tensor]]
    jacobian: Tensor | None
    autograd: Tensor | None


@functools.cache
def truth(case: Case, *, elsewhere: bool = False) -> Truth:
    """The derivative at the model's own parameters, or at ``other_state``."""
    with contained():
        state = other_state(case) if elsewhere else None
        along = [(v, difference(case, state, v)) for v in directions(case)]
        made = None if case.complex else _autograd(case, state)
    agrees = made is not None and all(
        close(times(made, v, parameters(case)), found, case.gap, scale(along)) for v, found in along
    )
    if case.complex:
        return Truth(along, torch.stack([found for _, found in along], -1), None)
    return Truth(along, made if agrees else None, made)


def scale(along: list[tuple[dict[str, Tensor], Tensor]]) -> float:
    return max((float(found.abs().max()) for _, found in along), default=0.0)


def close(made: Tensor, expected: Tensor, tolerance: float, size: float | None = None) -> bool:
    size = float(expected.abs().max()) if size is None else size
    return made.shape == expected.shape and bool((made.double() - expected.double()).abs().max() <= tolerance * size)


def times(jacobian: Tensor, along: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> Tensor:
    """φ(x)v, (n, c)."""
    flat = [along.get(name, torch.zeros_like(p)).double().flatten() for name, p in named.items()]
    return jacobian.double() @ torch.cat(flat)


def _autograd(case: Case, state: Mapping[str, Tensor] | None) -> Tensor | None:
    """Plain autograd, one sample at a time in a model of its own; None if torch refuses it."""
    rows = []
    for k in range(samples(case)):
        model, x = case.build(true=True)
        named = dict(model.named_parameters())
        if state is not None:
            with torch.no_grad():
                for name, p in named.items():
                    p.copy_(state[name])
        chosen = [p for p in named.values() if p.requires_grad and p.numel()]
        try:
            out = case.run(model, sample(x, k))[0]
            found = [torch.autograd.grad(y, chosen, retain_graph=True, materialize_grads=True) for y in out]
        except RuntimeError:
            return None
        rows.append(torch.stack([torch.cat([g.double().flatten() for g in row]) for row in found]))
    return torch.stack(rows)


def other_state(case: Case) -> dict[str, Tensor]:
    """A state dict with other parameters."""
    model, _ = case.build()
    generator = torch.Generator().manual_seed(5)
    new: dict[int, Tensor] = {}
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        new[id(p)] = p.detach() * 1.2 + 0.1 * noise if p.is_floating_point() or p.is_complex() else p.detach().clone()
    held = {**dict(model.named_parameters()), **model.state_dict(keep_vars=True)}
    held = {name: t for name, t in held.items() if isinstance(t, Tensor)}
    return {name: new[id(t)] if id(t) in new else t.detach().clone() for name, t in held.items()}
