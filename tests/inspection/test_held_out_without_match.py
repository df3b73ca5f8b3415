"""Held-out samples without a match, counts that are none, arrays that cannot be written, and changes within rounding."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import adaptive_tangents as at
from adaptive_tangents.inspection.problem import InspectConfig

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
START = {name: value + 0.1 * torch.randn_like(value) for name, value in MODEL.state_dict().items()}
X = torch.randn(16, 3, dtype=torch.float64)
Y = MODEL(X).detach().argmax(1)


def inspected(**options: Any) -> Any:
    return at.inspect(MODEL, START, **{"data": (X, Y), "nodes": 2, **options})


@pytest.mark.parametrize("count", [1, 5, 16])
def test_labels_in_one_part_alone_are_told_whatever_their_number(count: int) -> None:
    with pytest.raises(
        at.TangentError, match=r"^inspect: the data has labels and the data \(held out\) has none; give la"
    ):
        inspected(held_out=X[:count])
    with pytest.raises(
        at.TangentError, match=r"^inspect: the data \(held out\) has labels and the data has none; give la"
    ):
        inspected(data=X, held_out=(X[:count], Y[:count]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": (X[:0], Y[:0])}, r"the data \(held out\) holds no samples; give some, or leave it out"),
        ({"data": (X[:0], Y[:0])}, r"the data holds no samples"),
        ({"data": X[:0]}, r"the data holds no samples"),
        ({"held_out": []}, r"the data hold no samples"),
        ({"data": {}}, r"the data hold no samples"),
    ],
)
def test_no_samples_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(at.TangentError, match=f"^inspect: {message}"):
        inspected(**options)


@pytest.mark.parametrize("options", [{"samples": 4.5}, {"nodes": 2.5}, {"samples": "many"}])
def test_counts_are_whole_numbers(options: dict[str, Any]) -> None:
    with pytest.raises(
        at.TangentError, match=r"^inspect: (--samples must be at least 4|nodes and tol must be positive), got"
    ):
        InspectConfig(**options)
    assert InspectConfig(samples=np.int64(8), nodes=np.int64(2)).samples == 8


def test_arrays_that_cannot_be_written_are_taken_without_a_warning_and_stay_as_they_are() -> None:
    x, y = X.numpy().copy(), Y.numpy().copy()
    x.flags.writeable = y.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = inspected(data=(x, y))
        flipped = inspected(data=(x[::-1], y[::-1]))
    assert found.headline == inspected().headline
    assert np.allclose(flipped.kernels["end"].trace(), found.kernels["end"].trace())


def test_a_change_within_rounding_is_doubted_and_a_small_one_above_it_is_not() -> None:
    state = MODEL.state_dict()
    for size, doubted in ((1e-16, True), (1e-9, False)):
        end = {name: value * (1 + size * (1 + torch.rand_like(value))) for name, value in state.items()}
        if all(torch.equal(end[name], value) for name, value in state.items()):
            pytest.fail("the change is lost")
        limits = at.inspect(MODEL, state, end, (X, Y), nodes=2).results["limits"]
        assert any("near the rounding of float64" in limit for limit in limits) == doubted


def test_what_is_no_inspection_is_not_compared() -> None:
    with pytest.raises(at.TangentError, match=r"^compare: takes inspections, or the folders of some, got int"):
        at.compare(inspected(data=X), 5)  # type: ignore[arg-type]
