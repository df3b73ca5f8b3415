"""Long work reports progress in fractions that never fall and end at one."""

from collections.abc import Callable

import pytest
import torch

import adaptive_tangents as at
from adaptive_tangents.features.transforms import Sides
from adaptive_tangents.runtime.progress import Progress
from cases import mlp, normal

MODEL, X = mlp(torch.nn.Tanh, widths=(4, 6, 2)), normal(24, 4)
FEATS = at.tangent_features(MODEL, X)
START = {name: value.clone() for name, value in MODEL.state_dict().items()}
END = {name: value + 0.1 for name, value in START.items()}
SKETCH = at.Sketch(64)
MOVED = FEATS.transformed({name: Sides(scale=2.0) for name in FEATS.blocks})

WORK: dict[str, tuple[Callable[[Progress], object], str, int]] = {
    "a kernel in tiles": (lambda p: at.tangent_kernel(MODEL, X, tile=8, progress=p), "tiles", 6),
    "a kernel in one piece": (lambda p: at.tangent_kernel(MODEL, X, progress=p), "tiles", 1),
    "a sketched kernel": (lambda p: at.tangent_kernel(MODEL, X, sketch=SKETCH, progress=p), "samples", 1),
    "sketched features": (lambda p: at.sketch_features(MODEL, X, SKETCH, progress=p), "samples", 1),
    "a path average": (lambda p: at.average_features(MODEL, START, END, X, nodes=5, progress=p), "5 nodes", 5),
    "an explanation": (lambda p: at.explain(FEATS, MOVED, progress=p), "blocks", 12),
}


@pytest.mark.parametrize("name", WORK)
def test_progress_never_falls_and_ends_at_one(name: str) -> None:
    work, stage, count = WORK[name]
    told: list[tuple[str, float]] = []
    work(lambda what, fraction: told.append((what, fraction)))
    assert {what for what, _ in told} == {stage}
    fractions = [fraction for _, fraction in told]
    assert len(fractions) == count
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
