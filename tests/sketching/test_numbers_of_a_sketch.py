"""The numbers of a sketch are whole, of any type of whole numbers."""

from typing import Any

import numpy as np
import pytest
import torch

import adaptive_tangents as at


@pytest.mark.parametrize(
    "change", [{"dim": 12.5}, {"seed": 1.5}, {"seed": True}, {"repetitions": 3.0}, {"dim": "many"}]
)
def test_what_is_not_whole_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(at.TangentError, match=rf"^Sketch: {next(iter(change))} is a whole number, got "):
        at.Sketch(**{"dim": 64, **change})


def test_whole_numbers_of_numpy_make_the_same_sketch() -> None:
    model, x = torch.nn.Linear(40, 30), torch.randn(5, 40)
    plain, given = at.Sketch(64, 3, 4), at.Sketch(*(np.int64(value) for value in (64, 3, 4)))
    assert plain == given
    assert torch.equal(at.sketch_features(model, x, plain).kernel(), at.sketch_features(model, x, given).kernel())
