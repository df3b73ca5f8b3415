"""What the gradient is told not to be, and what it is not: units on a kink, as with a bias of zero on an empty input."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
from cases import Forward


def on_a_kink(*, detached: bool, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """Hidden units of zero, where the outputs' slope is half of the gradient or none of it, however small the step."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = torch.relu(m.norm(torch.relu(m.a(x))))
        return m.b(h) + (m.a(x).detach() if detached else m.a(x)).tanh()

    torch.manual_seed(0)
    model = Forward(run, a=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), b=nn.Linear(4, 4)).to(dtype).eval()
    nn.init.zeros_(model.a.bias)
    return model, torch.cat([torch.zeros(1, 3), torch.randn(3, 3)]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_unit_on_a_kink_accuses_nobody(dtype: torch.dtype) -> None:
    model, x = on_a_kink(detached=False, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", at.TangentWarning)
        at.tangent_features(model, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_detached_value_is_told_beside_units_on_a_kink(dtype: torch.dtype) -> None:
    model, x = on_a_kink(detached=True, dtype=dtype)
    with pytest.warns(at.TangentWarning, match=r"do not change with .*a\.bias.* as autograd's gradient says"):
        at.tangent_features(model, x)


@pytest.mark.parametrize("kept", [0.0, 0.5], ids=["none of its gradient", "half of its gradient"])
@pytest.mark.parametrize("n", [4, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_gradient_of_a_hundredth_of_the_outputs_is_told_in_any_precision(
    dtype: torch.dtype, n: int, kept: float
) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        side = m.c(x)
        return m.b(m.a(x).tanh()) + 0.01 * (side.detach() + kept * (side - side.detach()))

    torch.manual_seed(0)
    model = Forward(run, a=nn.Linear(6, 8), b=nn.Linear(8, 3), c=nn.Linear(6, 3)).to(dtype)
    with pytest.warns(at.TangentWarning, match=r"do not change with c\.weight, c\.bias as autograd's gradient says"):
        at.tangent_features(model, torch.randn(n, 6).to(dtype))


def in_single_precision(run: Any) -> nn.Module:
    """A network in float64, a part of which is computed in float32, as in most language models."""
    return Forward(lambda m, x: m.b(run(m.a(x)).float().tanh().double()), a=nn.Linear(3, 4), b=nn.Linear(4, 2)).double()


def test_a_detached_value_is_told_though_a_part_is_in_single_precision() -> None:
    torch.manual_seed(0)
    model = in_single_precision(lambda h: h + 0.3 * h.detach())
    with pytest.warns(at.TangentWarning, match=r"do not change with a\.weight, a\.bias as autograd's gradient says"):
        at.tangent_features(model, torch.randn(3, 3).double())


def test_rounding_of_a_part_in_single_precision_is_no_influence_among_samples() -> None:
    torch.manual_seed(0)
    model = in_single_precision(lambda h: h * (1 + 3e-7 * (len(h) > 1)))
    assert at.tangent_features(model, torch.randn(3, 3).double()).n == 3


@pytest.mark.parametrize(("n", "place"), [(5, -1), (9, 4)], ids=["the last of few", "one in the middle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_influence_on_a_single_sample_of_a_small_batch_is_refused(n: int, place: int, dtype: torch.dtype) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        place_now = min(place, len(x) - 1) % len(x)
        return m.fc(x).tanh() + (torch.arange(len(x)) == place_now)[:, None] * (len(x) > 1) * 1e-3 * x[:1, :2]

    torch.manual_seed(0)
    model = Forward(run, fc=nn.Linear(4, 2)).to(dtype)
    with pytest.raises(at.TangentError, match="influence each other"):
        at.tangent_features(model, torch.randn(n, 4, dtype=dtype))


@pytest.mark.parametrize("width", [8, 400], ids=["float64 decides", "float32 decides"])
def test_a_gradient_that_is_wrong_by_a_tenth_is_told_of_small_batches(width: int) -> None:
    torch.manual_seed(0)
    model = Forward(
        lambda m, x: m.b((m.a(x) + 0.1 * m.a(x).detach()).tanh()), a=nn.Linear(300, width), b=nn.Linear(width, 2)
    ).float()  # fmt: skip
    with pytest.warns(at.TangentWarning, match=r"do not change with a\.weight"):
        at.tangent_features(model, torch.randn(3, 300))
