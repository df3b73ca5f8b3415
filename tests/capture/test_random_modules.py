"""Features of random modules are those of plain autograd, one sample at a time."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given

import adaptive_tangents as at
import reference
from draws import examples
from random_modules import OPERATIONS, Recipe, recipes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning")


def check(recipe: Recipe) -> None:
    model, x = recipe.make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        phi = reference.jacobian(model, x)
    except RuntimeError as refused:  # autograd's reason, for in-place operations on what it saved
        error = str(refused)
    else:
        error = ""
    assume("modified by an inplace operation" not in error)
    assert not error
    size = np.abs(phi).max(initial=0)
    assume(1e-6 < size < 1e6)
    feats = at.tangent_features(model, x)
    np.testing.assert_allclose(feats.dense().numpy(), phi, rtol=0, atol=1e-9 * size)
    np.testing.assert_allclose(
        feats.kernel().numpy(), reference.kernel(phi, phi), rtol=0, atol=1e-9 * size**2 * phi.shape[-1]
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@examples(150)
@given(recipes())
def test_random_modules_are_what_autograd_says_of_one_sample(recipe: Recipe) -> None:
    check(recipe)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_occurs(name: str) -> None:
    """Each operation fits some module, alone or after a layer."""
    starts = (("tokens", (3, 4, 4, 2)), ("flat", (3, 4, 4, 2)), ("image", (3, 2, 4, 3)))
    for start, sizes in starts:
        for first in ((), (("linear", 2, 1),), (("linear", 2, 1), ("activation", 0, 0))):
            model, _ = Recipe(start, sizes, (*first, (name, 0, 0)), True, 0).make()
            if len(first) + 1 in model.program:
                return
    pytest.fail(f"{name} fits none of these")
