"""Classes of one name are told apart by their numbers wherever names are keys, choices or labels of figures."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
from adaptive_tangents.inspection import Inspection
from adaptive_tangents.inspection.figures import class_name
from adaptive_tangents.inspection.names import told_apart
from adaptive_tangents.loading import Data

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))


def inspected(names: tuple[str, ...], **options: Any) -> Inspection:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    start: dict[str, Tensor] = {name: value.clone() for name, value in model.state_dict().items()}
    end = {name: value + 0.4 * torch.randn_like(value) for name, value in start.items()}
    y = torch.func.functional_call(model, end, (X,)).argmax(1)
    return at.inspect(model, start, end, Data(X, y, names), nodes=1, **options)


def test_each_output_has_its_weight() -> None:
    found = inspected(("crane", "owl", "crane"))
    weights = found.results["outputs"]["weights"]
    assert list(weights) == ["crane (0)", "owl", "crane (2)"]
    moved = found.arrays["outputs.end"].astype(float) - found.arrays["outputs.start"]
    moved = moved - moved.mean(0)
    moved = moved - moved.mean(1, keepdims=True)
    direction = np.linalg.svd(moved)[2][0]
    assert abs(float(direction @ [*weights.values()])) == pytest.approx(1, abs=1e-5)
    assert found.results["data"]["classes"] == ["crane", "owl", "crane"]
    assert [class_name(found.results, kind) for kind in range(3)] == ["crane (0)", "owl", "crane (2)"]
    assert at.compare(found, found).results["outputs"]["same"]


def test_an_output_is_chosen_by_the_name_that_tells_it_apart() -> None:
    found = inspected(("crane", "owl", "crane"), outputs="crane (2)")
    change = found.arrays["outputs.end"] - found.arrays["outputs.start"]
    assert found.arrays["change"][:, 0] == pytest.approx(change[:, 2])
    with pytest.raises(at.TangentError, match="'crane' is the name of several outputs, 0, 2; give their numbers"):
        inspected(("crane", "owl", "crane"), outputs="crane")


@pytest.mark.parametrize(
    "names", [("a", "a", "a (0)"), ("a", "b", "a"), ("a", "b", "c"), ("a (2)", "a", "a"), ("", "", "")]
)
def test_no_two_names_are_alike(names: tuple[str, ...]) -> None:
    told = told_apart(names)
    assert len(set(told)) == 3
    assert all(after.startswith(before) for before, after in zip(names, told, strict=True))
