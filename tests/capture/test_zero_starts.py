"""Networks that begin at zero somewhere: what a zero gradient hides at θ₀ is found elsewhere along training."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
import reference
from adaptive_tangents.capture.capture import Capture


def zeroed(layer: nn.Linear) -> nn.Linear:
    """A layer that begins at zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Encoder(nn.Module):
    """Attention over (t, n, d), as torch's default is, below a head of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Linear(3, 8), zeroed(nn.Linear(8, 2))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(self.embedding(x).transpose(0, 1)).mean(0))
        return out


class Recurrent(nn.Module):
    """An LSTM over (t, n, d) below a head of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Linear(3, 6), nn.LSTM(6, 6), zeroed(nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(self.embedding(x.transpose(0, 1)))[0][-1])
        return out


class LowRank(nn.Module):
    """An adapter BA on (t, n, d), with B = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 6), nn.Linear(6, 2)
        self.a, self.b = nn.Linear(6, 2, bias=False), zeroed(nn.Linear(2, 6, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.transpose(0, 1))
        out: Tensor = self.head(torch.tanh(h + self.b(self.a(h))).cumsum(0)[-1])
        return out


class Alike(nn.Module):
    """Attention over (t, n, d) on samples that a first layer of zeros makes alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention, self.head = nn.Linear(3, 6), nn.MultiheadAttention(6, 2), nn.Linear(6, 2)
        nn.init.zeros_(self.first.weight)
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).transpose(0, 1)
        out: Tensor = self.head(self.attention(h, h, h)[0].tanh()[0])
        return out


UNSEEN: dict[str, Callable[[], nn.Module]] = {
    "attention below a head of zeros": Encoder, "LSTM below a head of zeros": Recurrent, "adapter of zeros": LowRank,
    "samples made alike": Alike,
}  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 5), (5, 5), (20, 5)], ids=str)
@pytest.mark.parametrize("name", UNSEEN)
def test_features_at_other_parameters_are_right_where_all_places_of_the_samples_fit_at_the_start(
    name: str, shape: tuple[int, int]
) -> None:
    model, x = UNSEEN[name]().double().eval(), torch.randn(*shape, 3, dtype=torch.float64)
    start = {key: value.detach().clone() for key, value in model.named_parameters()}
    end = {key: value + 0.1 * torch.randn_like(value) for key, value in start.items()}
    capture = Capture("features", model, x, None, None, None, None, whole=True)
    found = capture.at(end).features(x).dense().numpy()
    wanted = reference.jacobian(model, x, state=end)
    assert abs(found - wanted).max() < 1e-12 * abs(wanted).max()


class Gated(nn.Module):
    """Samples see the batch's mean behind a gate that is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.head = nn.Linear(3, 6), nn.Parameter(torch.zeros(1)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        out: Tensor = self.head(h + self.gate * (h - h.mean(0, keepdim=True)))
        return out


class Attending(nn.Module):
    """Samples attend to each other, as batch_first is forgotten, through a projection of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention, self.head = nn.Linear(3, 6), nn.MultiheadAttention(6, 2), nn.Linear(6, 2)
        zeroed(self.attention.out_proj)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        out: Tensor = self.head(h + self.attention(h[:, None], h[:, None], h[:, None])[0][:, 0])
        return out


CALLS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "tangent_features": at.tangent_features,
    "tangent_kernel": at.tangent_kernel,
    "TangentModule": lambda model, x: at.TangentModule(model, at.Fixed())(x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [3, 40])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("network", [Gated, Attending])
def test_samples_that_influence_each_other_in_the_gradient_alone_are_refused(
    network: Callable[[], nn.Module], call: str, n: int, dtype: torch.dtype
) -> None:
    model = network().to(dtype).eval()
    with pytest.raises(
        at.TangentError, match=f"{call}: the output of the .* sample .* samples of a batch influence each"
    ):
        CALLS[call](model, torch.randn(n, 3, dtype=dtype))


def test_a_gate_that_is_not_selected_stays_zero_so_that_samples_have_no_influence() -> None:
    model, x = Gated().double().eval(), torch.randn(5, 3, dtype=torch.float64)
    found = at.tangent_features(model, x, wrt=["first.*", "head.*"]).dense().numpy()
    names = [name for name, _ in model.named_parameters() if name != "gate"]
    assert abs(found - reference.jacobian(model, x, names=names)).max() < 1e-12


@pytest.mark.parametrize("x", [torch.randn(1, 3), torch.randn(5, 3)], ids=["one sample first", "many first"])
def test_a_module_finds_the_influence_in_the_first_batch_that_can_show_it(x: Tensor) -> None:
    module = at.TangentModule(Attending().eval(), at.Fixed())
    if len(x) == 1:
        module(x)
    with pytest.raises(at.TangentError, match="influence each other"):
        module(torch.cat([x, x + 1]))
