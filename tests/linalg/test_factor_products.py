"""Products with factors do not depend on the factors' memory layout and leave it unchanged."""

import pytest
import torch
from torch import Tensor

from adaptive_tangents.linalg import factor_products as products
from cases import normal

LAYOUTS = ("units innermost", "pixels innermost")


def laid(layout: str, n: int, t: int, *rest: int) -> Tensor:
    """Random numbers (n, t, ...) in one of the layouts."""
    return normal(n, *rest, t).movedim(-1, 1) if layout == "pixels innermost" else normal(n, t, *rest)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rest", [(5,), (3, 5)])
@pytest.mark.parametrize("t", [1, 4])
def test_rows_times_a_matrix(layout: str, rest: tuple[int, ...], t: int) -> None:
    x, matrix = laid(layout, 6, t, *rest), normal(5, 2)
    made = products.times(x, matrix)
    torch.testing.assert_close(made, torch.einsum("...d,dk->...k", x, matrix))
    assert products.pixels_innermost(made) == products.pixels_innermost(x) == (layout == LAYOUTS[1] and t > 1)
    assert torch.equal(products.times(x[0, 0], matrix), x[0, 0] @ matrix)


@pytest.mark.parametrize("signals", LAYOUTS)
@pytest.mark.parametrize("vectors", LAYOUTS)
@pytest.mark.parametrize("t", [4, 40])
def test_sums_over_positions(signals: str, vectors: str, t: int) -> None:
    a, b, h, w = laid(signals, 6, t, 3, 5), laid(vectors, 6, t, 2, 5), laid(vectors, 6, t, 7), normal(6, 3)
    torch.testing.assert_close(products.over_positions(a, b), torch.einsum("ntco,ntko->nck", a, b))
    expected = torch.einsum("nc,ntco,nti->oi", w, a, h)
    torch.testing.assert_close(products.weighted_outer(w, a, h), expected)
    made = products.weighted_outer(w, a.requires_grad_(), h)
    torch.testing.assert_close(made.detach(), expected)
    (gradient,) = torch.autograd.grad(made.sum(), a)
    torch.testing.assert_close(gradient, torch.einsum("nc,nti->ntc", w, h)[..., None].expand_as(a))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("size", [3, 400])
def test_joining_keeps_the_layout(layout: str, positions: bool, size: int) -> None:
    parts = [laid(layout, 6, 4, size, size) for _ in range(2)]
    made = products.joined(parts, positions=positions)
    assert torch.equal(made, torch.cat(parts, int(positions)))
    assert products.pixels_innermost(made) == (layout == LAYOUTS[1])
    mixed = products.joined([parts[0], parts[1].contiguous()], positions=positions)
    assert torch.equal(mixed, made)
    wider = products.joined([parts[0], parts[1].float()], positions=positions)
    assert wider.dtype == torch.float64
    parts[0].requires_grad_()
    assert products.joined(parts, positions=positions).requires_grad


def test_a_product_is_that_of_matrices_and_can_be_differentiated() -> None:
    a, b = normal(7, 300, 40), normal(7, 40, 500)
    assert torch.equal(products.product(a, b), a @ b)
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(products.product(a, b).square().sum(), a)
    (expected,) = torch.autograd.grad((a @ b).square().sum(), a)
    assert torch.equal(gradient, expected)
