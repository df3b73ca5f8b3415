"""Two classes of any numbers: as one-hot columns, unless the numbers are two of −1, 0 and 1, which are amounts, too."""

import pytest
import torch
from torch.nn import functional

import adaptive_tangents as at

N = 10
A = torch.randn(N, 4, generator=torch.manual_seed(0), dtype=torch.float64)
K = A @ A.T
UPPER = (torch.arange(N) % 3 == 0).long()


@pytest.mark.parametrize("pair", [(1, 2), (2, 3), (0, 5), (-3, -2)])
def test_an_alignment_does_not_depend_on_what_two_classes_are_numbered(pair: tuple[int, int]) -> None:
    y, columns = torch.tensor(pair)[UPPER], functional.one_hot(UPPER).double()
    for centered in (False, True):
        assert at.alignment(K, y, centered=centered) == at.alignment(K, columns, centered=centered)
    found, wanted = (at.decompose(K, torch.eye(N), each) for each in (y, columns))
    assert found.target_weight == wanted.target_weight


def test_two_of_minus_one_nought_and_one_stay_amounts() -> None:
    for pair in ((0, 1), (-1, 1), (-1, 0)):
        y = torch.tensor(pair)[UPPER]
        assert at.alignment(K, y) == at.alignment(K, y.double())


def test_class_numbers_of_one_output_are_refused_with_their_values() -> None:
    message = (
        r"^representability: targets are integers of 2 values \(2, 3\), which are class numbers and no amounts; give"
    )
    with pytest.raises(at.TangentError, match=message):
        at.representability(K[:, None, :, None], UPPER + 2)
    with pytest.raises(at.TangentError, match=r"integers other than two of −1, 0 and 1 are classes, an output each"):
        at.representability(K, UPPER + 2)
