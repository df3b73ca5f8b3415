"""A kernel on disk is the kernel, tile by tile, and says of itself what it was made from and whether it is all there."""

from pathlib import Path

import pytest
import torch

import adaptive_tangents as at
import reference
from registry import by_name
from test_features import OUTPUTS, prepare


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("name", ["Tanh", "attention"])
def test_a_stored_kernel_is_that_of_the_dense_features(name: str, outputs: str, tmp_path: Path) -> None:
    p = prepare(by_name[name])
    for x2, phi2 in ((None, p.phi), (p.other_x, p.other_phi)):
        store = at.kernel_to_store(p.model, p.x, tmp_path / f"{x2 is None}.zarr", x2, outputs=outputs, tile=2)
        expected = reference.kernel(p.phi, phi2, outputs)
        assert p.agrees(store.read(), expected)
        assert (store.n, store.m, store.c, store.outputs) == (p.feats.n, len(phi2), p.feats.c, outputs)
        assert (store.symmetric, store.complete, store.missing(), store.verify()) == (x2 is None, True, [], [])
        for rows, columns, piece in store.tiles():
            place = (rows, slice(None), columns) if outputs == "full" else (rows, columns)
            assert torch.equal(piece, store.read()[place])
