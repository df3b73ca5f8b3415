"""Rows of 0 and 1, the labels of each sample, are judged by binary cross-entropy; other targets by their squared error."""

from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
from adaptive_tangents.inspection import InspectConfig, run
from adaptive_tangents.inspection.first_screen import tiles
from adaptive_tangents.loading import Data

X = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
SEVERAL = (X > 0.3).long()
ONE_EACH = nn.functional.one_hot(X.argmax(1), 3)


def trained(y: Tensor) -> tuple[nn.Module, dict[str, Mapping[str, Tensor]]]:
    """A network of three labels, whose logits become so large that they are far from 0 and 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)).eval()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(X), y.float()).backward()
        optimizer.step()
    end = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(start)
    model.zero_grad()
    return model, {"start": start, "end": end}


@pytest.mark.parametrize(
    ("y", "says_so"), [(SEVERAL, False), (SEVERAL.double(), False), (ONE_EACH, False), (ONE_EACH.double(), True)]
)
def test_rows_of_0_and_1_are_labels_and_large_logits_no_error(y: Tensor, says_so: bool) -> None:
    model, states = trained(y)
    if says_so:
        model.config = SimpleNamespace(problem_type="multi_label_classification")  # type: ignore[assignment]
    held = torch.arange(32) >= 24
    found = run(model, states, Data(X, y, held_out=held), InspectConfig(nodes=1)).results  # a warning would be an error
    wanted = []
    for state in states.values():
        f = torch.func.functional_call(model, dict(state), (X,)).detach().double()
        wanted.append(-(y * f.sigmoid().log() + (1 - y.double()) * (1 - f.sigmoid()).log()).mean(1))
    assert float(((f - y) ** 2).mean()) > 1  # which would say that the network got worse
    for when, each in zip(("start", "end"), wanted, strict=True):
        assert found["performance"][when] == {"bce": pytest.approx(float(each.mean()), rel=1e-5)}
        unseen = found["held_out"]["held_out"]["performance"][when]
        assert unseen == {"bce": pytest.approx(float(each[held].mean()), rel=1e-5)}
    assert not any("in doubt" in words for words in found["limits"])
    assert "the binary cross-entropy goes from" in found["held_out"]["sentence"]


def test_real_rows_with_a_single_1_and_other_amounts_keep_their_squared_error() -> None:
    model, states = trained(SEVERAL)
    swapped = {"start": states["end"], "end": states["start"]}
    for y in (ONE_EACH.double(), 0.5 * SEVERAL.double()):
        found = run(model, swapped, Data(X, y), InspectConfig(nodes=1)).results
        f = torch.func.functional_call(model, dict(swapped["end"]), (X,)).detach().double()
        assert found["performance"]["end"] == {"mse": pytest.approx(float((f - y).square().mean()), rel=1e-5)}


def test_labels_that_are_learned_worse_are_doubted_and_the_table_and_page_say_what_is_told() -> None:
    model, states = trained(SEVERAL)
    with pytest.warns(at.TangentWarning, match="binary cross-entropy rises from"):
        found = at.inspect(model, states["end"], states["start"], (X, SEVERAL), nodes=1)
    assert [row["bce"] for row in found.trajectory] == [
        point["performance"]["bce"] for point in found.results["trajectory"]
    ]
    assert "Binary cross-entropy" in [tile.title for tile in tiles(found.results)]
