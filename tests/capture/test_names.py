"""Names are not identities: a function of one's own may have the name of any operation of torch."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
import reference
from adaptive_tangents.capture.graph import operation
from cases import Forward, normal

NAMES = [
    "Mul", "Add", "Sub", "Mm", "Addmm", "Bmm", "Convolution", "Embedding", "Expand", "NativeLayerNorm", "NativeGroupNorm",
    "PreluKernel", "Trilinear", "T", "View", "Slice", "Tanh", "AccumulateGrad", "CopySlices", "AddmmBackward0", "TBackward0",
]  # fmt: skip


def _product(name: str) -> type[torch.autograd.Function]:
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.variable = b  # as a leaf's node has
        return a * b

    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return g * b, (g * a).sum_to_size(b.shape)

    return type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )


@pytest.mark.parametrize("place", ["at the samples", "before the samples"])
@pytest.mark.parametrize("name", NAMES)
def test_a_function_named_like_an_operation_of_torch_is_not_taken_for_it(name: str, place: str) -> None:
    made: Any = _product(name)

    def function(self: Forward, x: Tensor) -> Tensor:
        if place == "at the samples":
            return self.last(torch.tanh(made.apply(x, self.w)))  # type: ignore[no-any-return]
        return self.last(torch.tanh(x * made.apply(self.w, self.v)))  # type: ignore[no-any-return]

    model = Forward(function, w=nn.Parameter(normal(3)), v=nn.Parameter(normal(3)), last=nn.Linear(3, 2).double())
    x = normal(5, 3)
    np.testing.assert_allclose(at.tangent_features(model, x).dense().numpy(), reference.jacobian(model, x), atol=1e-12)


def test_only_nodes_of_torchs_own_types_have_an_operation() -> None:
    x = torch.ones(2, requires_grad=True)
    assert [operation(node) for node in (x.tanh().grad_fn, (x * 2).grad_fn)] == ["Tanh", "Mul"]
    assert all(operation(_product(name).apply(x, x).grad_fn) == "" for name in NAMES)  # type: ignore[no-untyped-call]
