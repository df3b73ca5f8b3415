"""Kernels with as many columns as rows: of a batch with itself, and of two batches, which are not symmetric."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn

import adaptive_tangents as at
import reference
from adaptive_tangents.kernels.operators import kernel_operator
from cases import Forward, mlp, normal
from prepared import OUTPUTS


def scaled(m: Any, x: Tensor) -> Tensor:
    return x * m.w


NETWORKS: dict[str, Callable[[int], tuple[nn.Module, Any]]] = {
    "MLP": lambda n: (mlp(nn.Tanh, widths=(4, 6, 3)), normal(n, 4)),
    "one linear layer": lambda n: (nn.Linear(4, 3).double(), normal(n, 4)),
    "bilinear": lambda n: (nn.Bilinear(4, 4, 1).double(), (normal(n, 4), normal(n, 4))),
    "a scale": lambda n: (Forward(scaled, w=nn.Parameter(normal(3))), normal(n, 3)),
    "convolution, one output": lambda n: (
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 1)).double(), normal(n, 1, 5, 5),
    ),
    "convolution, three outputs": lambda n: (
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)).double(), normal(n, 1, 5, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("n", [1, 6, 100])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_kernel_of_a_batch_with_itself_is_that_of_the_batch(name: str, n: int, outputs: Any) -> None:
    model, x = NETWORKS[name](n)
    found = at.tangent_kernel(model, x, x, outputs=outputs)
    torch.testing.assert_close(found, at.tangent_kernel(model, x, outputs=outputs), rtol=1e-12, atol=1e-12)
    if n < 100 and outputs == "full":
        phi = reference.jacobian(model, x)
        assert abs(found.numpy().reshape(phi.shape[0] * phi.shape[1], -1) - reference_kernel(phi)).max() < 1e-10


def reference_kernel(phi: Any) -> Any:
    rows = phi.reshape(-1, phi.shape[2])
    return rows @ rows.T


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_transposed_products_of_a_square_kernel_of_two_batches_are_those_of_its_transpose(outputs: Any) -> None:
    model = mlp(nn.Tanh, widths=(4, 6, 3))
    K = at.tangent_kernel(model, normal(6, 4), normal(6, 4), outputs=outputs)
    operator, n = kernel_operator(K), 6 * (1 if outputs == "trace" else 3)
    matrix = operator @ torch.eye(n, dtype=torch.float64).numpy()
    if outputs == "full":
        assert abs(matrix - K.numpy().reshape(n, n)).max() < 1e-12
    v = normal(n, 2).numpy()
    assert abs(operator.H @ v - matrix.T @ v).max() < 1e-11
    exact = torch.linalg.svdvals(torch.tensor(matrix))[:2].flip(0)
    torch.testing.assert_close(torch.tensor(svds(operator, k=2)[1].copy()).sort().values, exact, rtol=1e-9, atol=1e-9)
