"""Kernels made tile by tile equal those of dense features for any tile size."""

import functools
import inspect
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
import reference
from adaptive_tangents.capture.batches import take
from cases import Case, Forward, mlp, normal
from prepared import OUTPUTS, every_case_and, fingerprint, prepare, slots
from registry import by_name

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@every_case_and("batches", (1, 2))
def test_a_kernel_in_tiles_equals_that_of_the_dense_features(case: Case, batches: int) -> None:
    p = prepare(case)
    keywords = {"wrt": case.wrt, "output_fn": case.output_fn}
    before = fingerprint(p.model, p.x)
    x, phi = take(p.x, slice(0, 3)), p.phi[:3]
    if batches == 2:
        made = at.tangent_kernel(p.model, x, p.other_x, outputs="diagonal", tile=1, **keywords)
        assert p.agrees(made, reference.kernel(phi, p.other_phi, "diagonal"))
    for tile, outputs in ((2, "full"), (None, "trace")) if batches == 1 else ():
        made = at.tangent_kernel(p.model, x, outputs=outputs, tile=tile, **keywords)
        assert p.agrees(made, reference.kernel(phi, phi, outputs)), f"tile {tile}"
        assert torch.equal(made, made.permute(2, 3, 0, 1) if outputs == "full" else made.transpose(0, 1))
    assert fingerprint(p.model, p.x) == before


@functools.cache
def two_batches(rows: int) -> tuple[nn.Module, Tensor, Tensor, np.ndarray, np.ndarray]:
    """A network, a batch of that many rows and one of 12, and the dense features of both."""
    model, x, other = mlp(nn.Tanh), normal(rows, 4), normal(12, 4) + 1
    return model, x, other, reference.jacobian(model, x), reference.jacobian(model, other)


def in_turn(name: str, values: Sequence[Any], tiles: Sequence[int | None], each: int = 1) -> pytest.MarkDecorator:
    """Every value with every kind of outputs, and tiles in turn, so that over the values each kind comes with each tile."""
    rows = [
        (value, outputs, tiles[(i + j + turn) % len(tiles)])
        for i, value in enumerate(values)
        for j, outputs in enumerate(OUTPUTS)
        for turn in range(each)
    ]
    return pytest.mark.parametrize((name, "outputs", "tile"), rows)


@in_turn("rows", [12, 30], [None, 12, 5], each=2)
def test_two_batches_of_as_many_samples_are_two_batches(rows: int, outputs: str, tile: int | None) -> None:
    model, x, other, phi, other_phi = two_batches(rows)
    made = at.tangent_kernel(model, x, other, outputs=outputs, tile=tile)
    np.testing.assert_allclose(made.numpy(), reference.kernel(phi, other_phi, outputs), rtol=1e-9, atol=1e-12)
    turned = at.tangent_kernel(model, other, x, outputs=outputs, tile=tile)
    np.testing.assert_allclose(turned.numpy(), reference.kernel(other_phi, phi, outputs), rtol=1e-9, atol=1e-12)


@in_turn("name", ["Tanh", "attention", "a gate that sorts the batch"], [3, 4])
def test_ragged_tiles_of_two_batches_fall_into_place(name: str, outputs: str, tile: int) -> None:
    p = prepare(by_name[name])
    made = at.tangent_kernel(p.model, p.other_x, p.x, outputs=outputs, tile=tile)
    assert p.agrees(made, reference.kernel(p.other_phi, p.phi, outputs))
    made = at.tangent_kernel(p.model, p.x, outputs=outputs, tile=tile)
    assert p.agrees(made, reference.kernel(p.phi, p.phi, outputs))


@in_turn("name", ["tokens", "LayerNorm", "two layers with one weight", "experts"], [1, 2, None])
def test_kernels_by_block_in_tiles_are_those_of_their_parameters(name: str, outputs: str, tile: int | None) -> None:
    p = prepare(by_name[name])
    for x2, phi2 in ((None, p.phi), (p.other_x, p.other_phi)):
        made = at.tangent_kernel(p.model, p.x, x2, outputs=outputs, tile=tile, by_block=True)
        assert list(made) == list(p.feats.blocks)
        for block, kernel in made.items():
            parts = [reference.restricted(z, p.feats.parameters, slots(p.feats.blocks[block])) for z in (p.phi, phi2)]
            assert p.agrees(kernel, reference.kernel(*parts, outputs))


def test_a_kernel_is_taken_at_a_state_dict_and_for_some_parameters() -> None:
    case = by_name["Tanh"]
    model, x = case.build()
    state = case.build(seed=5)[0].state_dict()
    phi = reference.jacobian(model, x, state=state, names=("2.weight", "2.bias"))
    for tile in (None, 4):
        made = at.tangent_kernel(model, x, params=state, wrt="2.*", tile=tile)
        np.testing.assert_allclose(made.numpy(), reference.kernel(phi, phi), rtol=0, atol=1e-12)


def test_a_memory_limit_is_kept_by_smaller_tiles() -> None:
    sizes: SimpleQueue[int] = SimpleQueue()  # a list would be put back, as all that a model reaches

    def watched(m: nn.Module, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            sizes.put(len(x))
        return m.body(x)

    model = Forward(watched, body=mlp(nn.Tanh, widths=(20, 30, 1)))
    x = normal(40, 20)
    limit = 40 * 40 * 8 + 40_000
    made = at.tangent_kernel(model, x, memory_limit=limit)
    phi = reference.jacobian(model, x)
    np.testing.assert_allclose(made.numpy(), reference.kernel(phi, phi), rtol=0, atol=1e-10)
    assert 1 < max(sizes.get() for _ in range(sizes.qsize())) < 30
    at.tangent_kernel(model, x)
    assert max(sizes.get() for _ in range(sizes.qsize())) == 40


def test_a_kernel_that_does_not_fit_is_refused() -> None:
    model, x = by_name["Tanh"].build()
    message = (
        r"tangent_kernel: needs 2.59 kB .* 2 kB; use outputs='trace' or 'diagonal', or fewer samples, or raise memory"
    )
    with pytest.raises(at.TangentError, match=message):
        at.tangent_kernel(model, x, memory_limit=2_000)
    with pytest.raises(at.TangentError, match=r"tangent_kernel: needs 2.59 kB"):
        at.tangent_kernel(model, x, outputs="diagonal", by_block=True, memory_limit=2_000)


@pytest.mark.parametrize("tile", [0, -3])
def test_a_tile_is_a_positive_number_of_samples(tile: int) -> None:
    with pytest.raises(at.TangentError, match=f"tangent_kernel: tile is a positive number of samples, got {tile}"):
        at.tangent_kernel(*by_name["Tanh"].build(), tile=tile)


def test_both_batches_are_checked() -> None:
    model = Forward(lambda m, x: m.fc(x) - (x[:1] > 50).any() * m.fc(x)[:1], fc=nn.Linear(4, 2))
    x, bad = normal(4, 4), normal(4, 4)
    bad[0, 0] = 99
    with pytest.raises(
        at.TangentError, match="tangent_kernel: the output of the last sample is different in the batch"
    ):
        at.tangent_kernel(model, x, bad)
    bad[2, 1] = torch.nan
    with pytest.raises(at.TangentError, match="tangent_kernel: the input of sample 2 is not finite"):
        at.tangent_kernel(model, x, bad)
    with pytest.raises(at.TangentError, match=r"tangent_kernel: x is torch\.float32 and the model torch\.float64"):
        at.tangent_kernel(model, x, x.float())


def test_unknown_outputs_are_refused_by_name() -> None:
    model, x = by_name["Tanh"].build()
    unchecked = inspect.unwrap(at.tangent_kernel)
    with pytest.raises(at.TangentError, match="tangent_kernel: outputs is 'full', 'trace' or 'diagonal', got 'sum'"):
        unchecked(model, x, outputs="sum")
