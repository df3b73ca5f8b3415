"""Average features equal a dense average of Jacobians and obey the path identity."""

import inspect
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
import reference
from adaptive_tangents.features import blocks
from cases import Forward, by_name, mlp, normal
from finite_differences import Estimate, derivative

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

SMOOTH = (
    "linear map", "bare Linear", "Tanh", "GELU", "one sample", "one output", "tokens", "attention",
    "a layer called twice",
    "two layers with one weight", "a weight also used beside its layer", "a lone scale", "an unused layer", "LayerNorm",
    "BatchNorm in eval", "LSTM", "embedding of indices", "control flow by item()", "a learned query", "experts",
    "an input shifted in place",
)  # fmt: skip
States = tuple[nn.Module, object, dict[str, Tensor], dict[str, Tensor]]


def segment(name: str, *, step: float = 0.4) -> States:
    """A case's model and batch, and two state dicts that differ in its parameters only."""
    model, x = by_name[name].build()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    seeded = torch.Generator().manual_seed(3)
    parameters = {k for k, _ in model.named_parameters(remove_duplicate=False)}
    moves = {id(p): step * torch.randn(p.shape, generator=seeded, dtype=p.dtype) for p in model.parameters()}
    named = dict(model.named_parameters(remove_duplicate=False))
    end = {k: v + moves[id(named[k])] if k in parameters else v.clone() for k, v in start.items()}
    return model, x, start, end


def close(made: Tensor, expected: np.ndarray, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(made.double().numpy(), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("name", SMOOTH)
def test_average_features_and_their_kernels_equal_a_dense_average(name: str) -> None:
    model, x, start, end = segment(name)
    av = at.average_features(model, start, end, x, nodes=5)
    phi = reference.average(model, start, end, x, nodes=5)
    assert av.nodes == 5
    close(av.dense(), phi)
    for outputs in ("full", "trace", "diagonal"):
        close(av.kernel(outputs=outputs), reference.kernel(phi, phi, outputs))
    close(sum(av.kernel(by_block=True).values()), reference.kernel(phi, phi))
    first = at.tangent_features(model, x, params=start)
    at_start = reference.jacobian(model, x, state=start)
    close(av.kernel(first), reference.kernel(phi, at_start))
    close(first.kernel(av), reference.kernel(at_start, phi))


@pytest.mark.parametrize(
    "name", ["Tanh", "attention", "a layer called twice", "LayerNorm", "BatchNorm in eval", "LSTM", "a lone scale"]
)
def test_the_change_of_the_outputs_is_average_features_times_the_change_of_parameters(name: str) -> None:
    model, x, start, end = segment(name, step=0.2)
    av = at.average_features(model, start, end, x, tol=1e-8)
    delta = torch.cat([(end[k] - start[k]).flatten() for k in av.parameters])
    change = []
    for state in (start, end):
        model.load_state_dict(state)
        change.append(reference.evaluate(model, x).detach())
    assert av.error <= 1e-8
    close(av.matvec(delta), (change[1] - change[0]).numpy(), 2e-8)
    close(av.change, (change[1] - change[0]).numpy())


def test_the_average_is_that_of_another_quadrature() -> None:
    model, x, start, end = segment("Tanh")
    av = at.average_features(model, start, end, x, tol=1e-9)
    close(av.dense(), reference.midpoints(model, start, end, x, points=60), 5e-4)


def test_the_error_is_the_relative_residual_of_the_identity() -> None:
    model, x, start, end = segment("Tanh", step=1.0)
    av = at.average_features(model, start, end, x, nodes=2)
    phi = reference.average(model, start, end, x, nodes=2)
    delta = torch.cat([(end[k] - start[k]).flatten() for k in av.parameters]).numpy()
    residual = np.linalg.norm(av.change.numpy() - phi @ delta) / np.linalg.norm(av.change.numpy())
    assert residual > 1e-4
    assert av.error == pytest.approx(residual, rel=1e-9)
    assert av.error_db == pytest.approx(-20 * math.log10(residual), rel=1e-9)


def test_nodes_are_doubled_until_the_tolerance_is_met_and_no_further() -> None:
    model, x, start, end = segment("Tanh", step=1.0)
    errors = {nodes: at.average_features(model, start, end, x, nodes=nodes).error for nodes in (4, 8, 16)}
    assert errors[4] > errors[8] > errors[16]
    for nodes in (8, 16):
        av = at.average_features(model, start, end, x, tol=1.01 * errors[nodes])
        assert (av.nodes, av.error) == (nodes, errors[nodes])


def test_a_tolerance_that_is_not_met_is_told_and_the_last_average_returned() -> None:
    model, x, start, end = segment("ReLU", step=1.0)
    message = (
        r"average_features: the path identity holds to \d.* at 6 nodes, not to tol = 1e-12; raise max_nodes or tol"
    )
    with pytest.warns(at.TangentWarning, match=message):
        av = at.average_features(model, start, end, x, tol=1e-12, max_nodes=6)
    assert av.nodes == 6
    assert av.error > 1e-12
    close(av.dense(), reference.average(model, start, end, x, nodes=6))


def test_a_fixed_number_of_nodes_does_not_warn() -> None:
    model, x, start, end = segment("ReLU", step=1.0)
    assert at.average_features(model, start, end, x, nodes=1, tol=1e-12).nodes == 1


def test_an_average_over_some_parameters_holds_where_only_they_change() -> None:
    model, x, start, end = segment("Tanh")
    end = {k: end[k] if k.startswith("2.") else v for k, v in start.items()}
    av = at.average_features(model, start, end, x, tol=1e-8, wrt="2.*")
    assert list(av.parameters) == ["2.weight", "2.bias"]
    assert av.error <= 1e-8


def test_average_features_adapt_and_select_as_features_do() -> None:
    model, x, start, end = segment("LayerNorm")
    av = at.average_features(model, start, end, x, nodes=3)
    phi = reference.average(model, start, end, x, nodes=3)
    left = normal(5, 5)
    moved = av.transformed({"0": at.features.transforms.Sides(at.features.transforms.Matrix(left), None, 1.5)})[
        slice(1, 4)
    ]
    expected = reference.sided(phi[1:4], av.parameters, ["0.weight", "0.bias"], left=left.numpy(), scale=1.5)
    close(moved.kernel(), reference.kernel(expected, expected))


def test_the_model_is_left_where_it_was() -> None:
    model, x, start, end = segment("BatchNorm in eval")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    moved = {k: v + 0.1 if k.endswith(("weight", "bias")) else v for k, v in start.items()}
    at.average_features(model, moved, {k: end[k] for k in start}, x, nodes=2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# Refusals.


def refused(message: str, *arguments: object, **keywords: object) -> None:
    with pytest.raises(at.TangentError, match="average_features: " + message):
        at.average_features(*arguments, **keywords)


def test_ends_that_are_the_same_are_refused() -> None:
    model, x, start, _ = segment("Tanh")
    refused(
        "the network's outputs are the same at start and end; there is no change to average", model, start, start, x
    )


def test_parameters_that_change_outside_wrt_are_refused() -> None:
    model, x, start, end = segment("Tanh")
    message = (
        r"0.weight, 0.bias, 4.weight, 4.bias change along the path but wrt leaves them out.*widen wrt, or give both"
    )
    refused(message, model, start, end, x, wrt="2.*")


def test_parameters_that_change_without_a_gradient_are_refused_in_these_words() -> None:
    model, x, start, end = segment("Tanh")
    model[0].requires_grad_(False)
    try:
        message = (
            r"0\.weight, 0\.bias change along the path but require no gradient \(requires_grad=False\).*let wrt be '\*'"
        )
        refused(message, model, start, end, x)
        assert at.average_features(model, start, end, x, wrt="*").error <= 1e-3  # as the message says
        same = {**end, "0.weight": start["0.weight"], "0.bias": start["0.bias"]}
        assert at.average_features(model, start, same, x).error <= 1e-3
    finally:
        model[0].requires_grad_(True)


def test_buffers_that_change_are_refused() -> None:
    model, x, start, end = segment("BatchNorm in eval")
    end["1.running_var"] = end["1.running_var"] + 1
    refused(
        r"buffer '1.running_var' differs between start and end.*or move them along the path with buffers='path'",
        model,
        start,
        end,
        x,
    )


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"tol": 0.0}, "tol is a positive number, got 0"),
        ({"tol": math.nan}, "tol is a positive number, got nan"),
        ({"nodes": 0}, "nodes is a positive number, got 0"),
        ({"max_nodes": -1}, "nodes is a positive number, got -1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(keywords: dict[str, float], message: str) -> None:
    model, x, start, end = segment("Tanh")
    refused(message, model, start, end, x, **keywords)


@pytest.mark.parametrize("which", [0, 1])
def test_state_dicts_at_either_end_that_do_not_fit_are_refused(which: int) -> None:
    model, x, *ends = segment("Tanh")
    ends[which] = {k: v for k, v in ends[which].items() if k != "2.bias"}
    refused("the state dict does not fit the model: missing 2.bias; pass a state dict", model, *ends, x)


def test_an_end_with_non_finite_outputs_is_refused_naming_the_sample() -> None:
    model = Forward(lambda m, x: m.fc(x) / (m.fc.bias[0] - x[:, :1]), fc=nn.Linear(4, 1))
    x = normal(4, 4)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    end = start | {"fc.bias": x[2, :1].clone()}
    refused("the output of sample 2 is not finite", model, start, end, x)


def normed(*, dtype: torch.dtype = torch.float64) -> States:
    """A network with batch norms whose parameters and running statistics both move."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))
        model = nn.Sequential(*layers, nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)).to(dtype).eval()
        start = {k: v.clone() for k, v in model.state_dict().items()}
        end = {k: v + 0.3 * torch.rand_like(v) if v.is_floating_point() else v + 7 for k, v in start.items()}
    return model, normal(6, 2, 4, 4).to(dtype), start, end


def test_buffers_that_move_with_the_path_keep_the_identity() -> None:
    model, x, start, end = normed()
    av = at.average_features(model, start, end, x, tol=1e-8, buffers="path")
    assert av.error <= 1e-8
    assert av.buffer_change is not None
    delta = torch.cat([(end[k] - start[k]).flatten() for k in av.parameters])
    close(av.matvec(delta) + av.buffer_change, av.change.numpy(), 2e-8)
    assert float(av.buffer_change.norm()) > 0.05 * float(av.change.norm())


def test_the_change_by_buffers_is_that_of_finite_differences_along_the_path() -> None:
    model, x, start, end = normed()
    av = at.average_features(model, start, end, x, nodes=5, buffers="path")
    names = [k for k, b in model.named_buffers() if b.is_floating_point()]
    points, weights = np.polynomial.legendre.leggauss(5)

    def moved(t: float) -> Tensor:
        model.load_state_dict(here | {k: here[k] + t * (end[k] - start[k]) for k in names})
        return reference.evaluate(model, x).detach()

    value, error = 0.0, 0.0
    for s, w in zip((points + 1) / 2, weights / 2, strict=True):
        here = {k: torch.lerp(start[k], end[k], s) if v.is_floating_point() else v for k, v in start.items()}
        along = derivative(moved, 1e-4)
        value, error = value + w * along.value, error + w * along.error
    Estimate(value, error).check(av.buffer_change)


def test_features_on_the_way_are_taken_with_the_buffers_there() -> None:
    model, x, start, end = normed()
    av = at.average_features(model, start, end, x, nodes=1, buffers="path")
    middle = {k: torch.lerp(start[k], end[k], 0.5) if v.is_floating_point() else v for k, v in start.items()}
    close(av.dense(), at.tangent_features(model, x, params=middle).dense().numpy())


def test_buffers_without_forward_mode_fall_back_to_differences() -> None:
    class Patched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4, dtype=torch.float64)
            self.norm = nn.InstanceNorm1d(2, track_running_stats=True, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.fc(x).reshape(-1, 2, 2).tanh()).flatten(1)

    model = Patched().eval()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    end = {k: v + 0.2 if v.is_floating_point() else v for k, v in start.items()}
    av = at.average_features(model, start, end, normal(5, 3), tol=1e-5, buffers="path")
    assert av.error <= 1e-5
    assert float(av.buffer_change.norm()) > 0


def test_buffers_that_stay_give_no_change_by_buffers() -> None:
    model, x, start, end = segment("Tanh")
    assert at.average_features(model, start, end, x, nodes=2, buffers="path").buffer_change is None
    assert at.average_features(model, start, end, x, nodes=2).buffer_change is None


def test_other_words_for_buffers_are_refused() -> None:
    model, x, start, end = segment("Tanh")
    unchecked = inspect.unwrap(at.average_features)
    with pytest.raises(at.TangentError, match="average_features: buffers is 'same' or 'path', got 'end'"):
        unchecked(model, start, end, x, buffers="end")


def test_nodes_of_many_positions_are_summed_where_that_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_WORTH_SUMMING", 0)
    model, x, start, end = normed()
    few = at.average_features(model, start, end, x, nodes=1, buffers="path")
    many = at.average_features(model, start, end, x, nodes=16, buffers="path")
    assert (few.blocks["4"].kind, many.blocks["4"].kind) == ("factored", "summed")
    assert many.bytes <= 6 * 2 * many.p * 8
    close(many.dense(), reference_sum(model, start, end, x, 16))


def reference_sum(
    model: nn.Module, start: dict[str, Tensor], end: dict[str, Tensor], x: Tensor, nodes: int
) -> np.ndarray:
    points, weights = np.polynomial.legendre.leggauss(nodes)
    total = 0.0
    for s, w in zip((points + 1) / 2, weights / 2, strict=True):
        state = {k: torch.lerp(start[k], end[k], s) if v.is_floating_point() else v for k, v in start.items()}
        total = total + w * at.tangent_features(model, x, params=state).dense().numpy()
    return total


def test_too_little_memory_for_the_nodes_is_refused() -> None:
    model, x, start, end = segment("tokens")
    size = at.tangent_features(model, x).bytes
    message = (
        r"needs .* of memory and the limit is .*; take fewer samples or outputs, narrow wrt, or lower max_nodes "
        r"\(now at 8 nodes\)"
    )
    refused(message, model, start, end, x, nodes=8, memory_limit=size)
    assert at.average_features(model, start, end, x, nodes=8, memory_limit=16 * size).nodes == 8


def test_relu_networks_converge_slowly_but_do() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = mlp(nn.ReLU, widths=(4, 20, 1))
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    end = {k: v + 0.3 * torch.randn(v.shape, generator=torch.Generator().manual_seed(1)) for k, v in start.items()}
    av = at.average_features(model, start, end, x, tol=3e-3)
    assert av.error <= 3e-3
    assert av.nodes >= 8


@pytest.mark.filterwarnings("ignore:.*as autograd's gradient says")
def test_an_error_that_more_nodes_do_not_change_is_told_as_that_of_the_gradient() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h * h.detach().square().sum(1, keepdim=True).sqrt())

    torch.manual_seed(0)
    model, x = Detached().double(), torch.randn(6, 3, dtype=torch.float64)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    end = {name: value + 0.3 * torch.randn_like(value) for name, value in start.items()}
    with pytest.warns(
        at.TangentWarning, match=r"holds to .*e-0\d at 16 nodes.* more nodes do not change that: .*detached"
    ):
        average = at.average_features(model, start, end, x)
    assert average.nodes == 16


class Still(nn.Module):
    """A linear map that moves, and a gain at zero that stands still while its features oscillate along the path."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gain = nn.Linear(3, 8), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return h.sum(1, keepdim=True) + (torch.sin(6 * h) * self.gain).sum(1, keepdim=True)


def test_the_identity_says_nothing_about_features_of_parameters_that_stand_still() -> None:
    torch.manual_seed(0)
    model, x = Still().double(), torch.randn(20, 3, dtype=torch.float64)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    end = {name: value + 2 * torch.randn_like(value) * (name != "gain") for name, value in start.items()}
    paths = [torch.nn.functional.linear(x, state["inner.weight"], state["inner.bias"]) for state in (start, end)]
    steps = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    wanted = torch.stack([torch.sin(6 * torch.lerp(*paths, float(s))) for s in steps]).mean(0)

    def missed(average: at.TangentFeatures) -> float:
        return float((average.blocks["gain"].features().reshape(20, 8) - wanted).norm() / wanted.norm())

    few, many = at.average_features(model, start, end, x), at.average_features(model, start, end, x, nodes=64)
    assert few.error < 1e-12
    assert missed(few) > 0.5
    assert missed(many) < 1e-5
