"""Features of some of the samples, chosen in any of the ways that choose rows of an array."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import adaptive_tangents as at
from adaptive_tangents import TangentError


@pytest.fixture(scope="module")
def feats() -> at.TangentFeatures:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return at.tangent_features(nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    "index",
    [
        slice(1, 4),
        [3],
        [-1, 0, 0],
        [],
        (2, 1),
        np.array([4, 2]),
        torch.tensor([1, 3], dtype=torch.int32),
        [True, False, False, True, True],
        np.arange(5) > 2,
        torch.arange(5) < 3,
    ],
    ids=repr,
)
def test_samples_are_chosen_as_rows_of_an_array_are(feats: at.TangentFeatures, index: Any) -> None:
    chosen = feats[index]
    expected = feats.dense().numpy()[
        index if isinstance(index, slice) else np.asarray(index, dtype=None if len(index) else int)
    ]
    assert chosen.n == len(expected)
    np.testing.assert_array_equal(chosen.dense().numpy(), expected)


@pytest.mark.parametrize("index", [3, [5], [-6], "0", [0.0], [[0, 1]], [True, False], None], ids=repr)
def test_what_chooses_no_samples_is_refused_in_words(feats: at.TangentFeatures, index: Any) -> None:
    with pytest.raises(
        TangentError, match=re.escape("features: samples are chosen by a slice, a vector of indices below 5")
    ):
        feats[index]
