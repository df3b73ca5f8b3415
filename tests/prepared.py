"""The registry's networks prepared for tests: captured once per process; and a fingerprint of a model's state."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
import reference
from adaptive_tangents.capture.batches import take
from adaptive_tangents.features.blocks import Block
from cases import Case
from registry import CASES

OUTPUTS = ("full", "trace", "diagonal")


def over(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """A test for each case. All tests of one case run in one process (``--dist loadgroup``), which captures it once."""
    groups = [pytest.param(case, id=case.name, marks=pytest.mark.xdist_group(case.name)) for case in cases]
    return pytest.mark.parametrize("case", groups)


every_case = over(CASES)


def every_case_and(name: str, *choices: Sequence[Any]) -> pytest.MarkDecorator:
    """As ``every_case`` with an argument more: of each sequence of choices, the cases take one after the other in turn."""
    pairs = [(case, values[k % len(values)]) for k, case in enumerate(CASES) for values in choices]
    groups = [
        pytest.param(
            case, value, id=f"{case.name}-{getattr(value, '__name__', value)}", marks=pytest.mark.xdist_group(case.name)
        )
        for case, value in pairs
    ]
    return pytest.mark.parametrize(("case", name), groups)


@dataclass(frozen=True)
class Prepared:
    """A case with features on two batches, and dense references for both; and whether making them changed the model."""

    model: nn.Module
    x: object
    other_x: object
    feats: at.TangentFeatures
    other: at.TangentFeatures
    phi: reference.Array
    other_phi: reference.Array
    tolerance: float
    left_as_found: bool

    def agrees(self, made: Tensor, expected: reference.Array, *, scale: float | None = None) -> bool:
        gap = np.abs(made.detach().double().numpy() - expected)
        scale = float(np.abs(expected).max(initial=0)) if scale is None else scale
        return made.shape == expected.shape and bool((gap <= self.tolerance * scale).all())


@functools.cache
def prepare(case: Case) -> Prepared:
    model, x = case.build()
    _, other_x = case.build(seed=1)
    other_x = take(other_x, slice(0, 2))
    ready = case.reference_model(model)
    phi, other_phi = (reference.jacobian(ready, z, output_fn=case.output_fn, names=case.names) for z in (x, other_x))
    with_gradients(model)
    before = fingerprint(model, x)
    feats, other = (at.tangent_features(model, z, wrt=case.wrt, output_fn=case.output_fn) for z in (x, other_x))
    left = fingerprint(model, x) == before
    tolerance = case.tolerance or (1e-9 if feats.dtype == torch.float64 else 1e-4)
    return Prepared(model, x, other_x, feats, other, phi, other_phi, tolerance, left)


def with_gradients(model: nn.Module) -> nn.Module:
    """A model with a gradient at every parameter, as one has in training."""
    for k, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, k)
    return model


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slots(block: Block) -> list[str]:
    return [slot.parameter for slot in block.slots]


def tensors_of(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x.values() if hasattr(x, "values") else x)


KNOWN_TO_NUMPY = (torch.float16, torch.float32, torch.float64)


def raw(tensor: Tensor | None) -> bytes | None:
    if tensor is None:
        return None
    tensor = tensor.detach().clone()  # numpy refuses tensors of inference mode
    return (
        (tensor.float() if tensor.is_floating_point() and tensor.dtype not in KNOWN_TO_NUMPY else tensor)
        .numpy()
        .tobytes()
    )


def fingerprint(model: nn.Module, x: Any) -> list[Any]:
    """Everything a capture could have left behind: tensors by identity and value, flags, hooks, random state."""
    held = []
    for module in model.modules():
        for role in (module._parameters, module._buffers):
            held += [(name, id(t), raw(t)) for name, t in role.items()]
        held += [(t.requires_grad, raw(t.grad)) for t in module.parameters()]
        held += [module.training, sorted(vars(module))]
        plain = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
        held += [(name, id(t), t.grad_fn, raw(t)) for name, t in plain.items()]
        hooks = [found for name, found in vars(module).items() if "hook" in name and isinstance(found, dict)]
        held += [(list(found), [id(hook) for hook in found.values()]) for found in hooks]
    held += [(raw(t), t.requires_grad, t.grad if t.is_leaf else None) for t in tensors_of(x)]
    # Python's own generator is left out: the run-time type checks of the tests draw from it.
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    drawn = [torch.get_rng_state().numpy().tobytes(), kind, keys.tobytes(), *rest]
    return [*held, *drawn, torch.is_grad_enabled()]
