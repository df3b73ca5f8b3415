"""Coefficients meet features of the very blocks they are of, or are refused: never part of them alone."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import adaptive_tangents as at

X = torch.randn(12, 3, generator=torch.manual_seed(0), dtype=torch.float64)


def network(*widths: int) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))[:-1].double()


MODEL = network(3, 6, 1)
FIT = at.fit(at.tangent_features(MODEL, X), X[:, :1], structure=at.LayerScale(), ridge=0.1)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (MODEL, {"wrt": "0.*"}),
        (MODEL, {"wrt": "2.bias"}),
        (network(3, 6, 6, 1), {}),
        (network(3, 7, 1), {}),
        (nn.Sequential(nn.Identity(), *MODEL), {}),
    ],
    ids=["fewer blocks", "part of a block", "more blocks", "wider blocks", "blocks of other names"],
)
def test_a_fit_does_not_predict_with_part_of_its_coefficients(model: nn.Module, options: dict[str, Any]) -> None:
    feats = at.tangent_features(model, X, **options)
    message = (
        r"the coefficients are of blocks {'0': \(6, 4\), '2': \(1, 7\)}, these features have .*same model, wrt and out"
    )
    with pytest.raises(at.TangentError, match=message):
        FIT.predict(feats)
    for call in (feats.inner, feats.join):
        with pytest.raises(at.TangentError, match=message):
            call(FIT.coefficients)


def test_at_other_parameters_and_samples_of_the_same_blocks_it_predicts() -> None:
    other = at.tangent_features(MODEL, 2 * X[:5], params={k: v * 1.1 for k, v in MODEL.state_dict().items()})
    torch.testing.assert_close(FIT.predict(other), other.matvec(other.join(FIT.coefficients)))
