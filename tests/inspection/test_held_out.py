"""Samples that training did not see are drawn beside the others, and told apart from them."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
from adaptive_tangents.inspection import InspectConfig, run
from adaptive_tangents.inspection.first_screen import tiles
from adaptive_tangents.inspection.held_out import sentence
from adaptive_tangents.loading import Data, as_data, output_of
from adaptive_tangents.loading.draws import sampled


def network(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs)).eval()


def trained(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Mapping[str, Tensor]]:
    """The state before and after training, and the model as before."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    end = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(start)
    model.zero_grad()
    return {"start": start, "end": end}


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, dict[str, Mapping[str, Tensor]], Data]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, generator=generator)
    y = ((x[:, 0] + 0.8 * torch.randn(40, generator=generator)) > 0).long()
    model = network(2)
    return model, trained(model, x[:30], y[:30]), as_data((x[:30], y[:30]), held_out=(x[30:], y[30:]))


def test_numbers_of_both_kinds_are_those_of_an_inspection_of_these_samples_alone(
    case: tuple[nn.Module, dict[str, Mapping[str, Tensor]], Data],
) -> None:
    model, states, data = case
    found = run(model, states, data, InspectConfig(nodes=4, outputs="all")).results
    held = data.held_out
    assert held is not None
    x = torch.as_tensor(data.x)
    for side, rows in (("trained", ~held), ("held_out", held)):
        told = found["held_out"][side]
        kernels = [
            at.tangent_kernel(model, x[rows], params=state, outputs="trace").double() for state in states.values()
        ]
        f0, f1 = (torch.func.functional_call(model, dict(state), (x[rows],)).detach() for state in states.values())
        assert told["samples"] == int(rows.sum())
        assert told["growth"]["final"] == pytest.approx(float(kernels[1].trace() / kernels[0].trace()), rel=1e-4)
        assert told["cka"]["final"] == pytest.approx(at.cka(kernels[0], kernels[1]), rel=1e-3)
        for kernel, stage in zip(kernels, ("initial", "final"), strict=True):
            for centered, name in ((False, "alignment"), (True, "alignment_centered")):
                wanted = at.alignment(kernel, (f1 - f0).double(), centered=centered)
                assert told[name]["change"][stage] == pytest.approx(wanted, abs=1e-4)
        assert data.y is not None
        accuracy = float((f1.argmax(1) == data.y[rows]).double().mean())
        assert told["performance"]["end"]["accuracy"] == pytest.approx(accuracy)
    assert found["held_out"]["sentence"].startswith("On 10 samples that training did not see, accuracy goes from ")
    assert any("10 of the 40 samples measured are held out" in limit for limit in found["limits"])
    assert any("10 samples are held out" in limit for limit in found["limits"])


def test_the_second_finding_and_the_first_tile_tell_of_samples_held_out(
    case: tuple[nn.Module, dict[str, Mapping[str, Tensor]], Data],
) -> None:
    model, states, data = case
    found = at.inspect(model, states["start"], states["end"], data, nodes=1)
    held = found.results["held_out"]
    assert found.findings[1] == held["sentence"]
    before, after = (held["held_out"]["performance"][end]["accuracy"] for end in ("start", "end"))
    assert f"{100 * before:.0f} % → {100 * after:.0f} % on the 10 of them held out" in tiles(found.results)[0].note


def test_without_samples_held_out_nothing_is_told_of_them(
    case: tuple[nn.Module, dict[str, Mapping[str, Tensor]], Data],
) -> None:
    model, states, data = case
    assert run(model, states, Data(data.x, data.y), InspectConfig(samples=8, nodes=2)).results["held_out"] is None


def test_the_mean_loss_is_the_performance_where_losses_are_measured(
    case: tuple[nn.Module, dict[str, Mapping[str, Tensor]], Data],
) -> None:
    model, states, data = case
    assert data.y is not None
    outs = [torch.func.functional_call(model, dict(state), (data.x,)) for state in states.values()]
    wanted = [float(nn.functional.cross_entropy(out, data.y)) for out in outs]
    measured, given = output_of("loss", model, data)
    found = run(measured, states, given, InspectConfig(nodes=2)).results
    assert [found["performance"][end]["loss"] for end in ("start", "end")] == pytest.approx(wanted, rel=1e-5)
    assert found["network"]["class"] == "Sequential"
    assert list(found["blocks"]) == ["0", "2"]
    assert any("The output measured is the loss of each sample" in limit for limit in found["limits"])


@pytest.mark.parametrize(
    ("seen", "unseen", "count", "wanted"),
    [
        (30, 10, 20, 5),
        (100, 10, 20, 5),
        (100, 2, 20, 2),
        (10, 100, 20, 15),
        (10, 30, 8, 6),
        (3, 100, 20, 17),
        (5, 5, 10, 5),
    ],
)
def test_samples_held_out_are_drawn_in_proportion_and_at_least_a_quarter(
    seen: int, unseen: int, count: int, wanted: int
) -> None:
    held = torch.arange(seen + unseen) >= seen
    order = torch.randperm(seen + unseen, generator=torch.Generator().manual_seed(0))
    rows = sampled(count, held, order)
    assert len(rows.unique()) == count
    assert torch.equal(rows, rows.sort().values)
    assert int(held[rows].sum()) == wanted
    assert torch.equal(sampled(count, None, order), order[:count].sort().values)


def test_what_is_not_known_of_samples_held_out_is_left_out_of_the_sentence() -> None:
    def side(**changes: Any) -> dict[str, Any]:
        empty = {"performance": {"start": None, "end": None}, "growth": {"final": None},
                 "alignment_centered": {"change": {"initial": None, "final": None}}}  # fmt: skip
        return {"samples": 3, **empty, **changes}

    assert sentence(None) is None
    assert sentence({"trained": side(), "held_out": side()}) is None
    known = side(performance={"start": {"mse": 2.0}, "end": {"mse": 0.5}}, growth={"final": 4.0})
    assert sentence({"trained": known, "held_out": known}) == (
        "On 3 samples that training did not see, the mean squared error goes from 2 to 0.5 (trained on: 2 to 0.5), and the "
        "kernel becomes 4 times as large (4)."
    )


def with_one_logit() -> tuple[nn.Module, dict[str, Mapping[str, Tensor]], Tensor, Tensor]:
    """A binary classifier of one logit, trained by cross-entropy until its logits are large."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 3, generator=generator)
    y = (x[:, 0] > 0).long()
    model = network(1)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], y.double().to(x)).backward()
        optimizer.step()
    end = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(start)
    model.zero_grad()
    return model, {"start": start, "end": end}, x, y


@pytest.mark.parametrize("lacking", ["held out", "trained on", "both"])
def test_one_logit_is_judged_by_accuracy_also_where_samples_lack_a_class(lacking: str) -> None:
    model, states, x, y = with_one_logit()
    one, all_of_them = (y == 1).nonzero()[:10, 0], torch.arange(40)
    trained_on, held = {"held out": (all_of_them, one), "trained on": (one, all_of_them), "both": (one, one)}[lacking]
    data = as_data((x[trained_on], y[trained_on]), held_out=(x[held], y[held]))
    found = run(model, states, data, InspectConfig(nodes=2)).results  # a TangentWarning would be an error
    for side, rows in (("trained", trained_on), ("held_out", held)):
        for when, state in states.items():
            logits = torch.func.functional_call(model, dict(state), (x[rows],)).detach()[:, 0]
            wanted = float(((logits > 0).long() == y[rows]).double().mean())
            assert found["held_out"][side]["performance"][when] == {"accuracy": pytest.approx(wanted)}
    assert "accuracy goes from" in found["held_out"]["sentence"]
    assert found["outputs"]["labels"] == "−1 for label 0, +1 for 1"
    assert not any("in doubt" in words for words in found["limits"])


def test_the_signs_of_two_classes_do_not_depend_on_the_samples_drawn() -> None:
    model, states, x, _ = with_one_logit()
    labels = torch.where(torch.arange(40) == 17, 1, 6)  # the class 1 has one sample, which the draw leaves out
    seed = next(seed for seed in range(9) if 17 not in run_samples(seed))
    found = run(model, states, Data(x, labels), InspectConfig(samples=8, nodes=1, seed=seed))
    assert found.arrays["target"][:, 0].tolist() == [1.0] * 8
    assert found.results["outputs"]["labels"] == "−1 for label 1, +1 for 6"
    logits = torch.func.functional_call(model, dict(states["end"]), (x[found.arrays["sample"]],)).detach()[:, 0]
    assert found.results["performance"]["end"] == {"accuracy": pytest.approx(float((logits > 0).double().mean()))}
    assert set(found.arrays["predicted"].tolist()) <= {1, 6}


def run_samples(seed: int) -> list[int]:
    return torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:8].tolist()
