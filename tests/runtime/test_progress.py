"""Long work reports progress in fractions that never fall and end at one."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptive_tangents as at
from adaptive_tangents.features.transforms import Sides
from adaptive_tangents.runtime.progress import Bar, Progress
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
    "an explanation": (lambda p: at.explain(FEATS, MOVED, progress=p), "blocks", 14),
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


# ------------------------------------------------------------------------------------------------------ progress=True

KERNEL = FEATS.kernel(by_block=True)
Y = normal(24, 2)
SHOWN: dict[str, Callable[[Any, Path], object]] = {
    "tangent_kernel": lambda p, folder: at.tangent_kernel(MODEL, X, tile=8, progress=p),
    "kernel_to_store": lambda p, folder: at.kernel_to_store(MODEL, X, folder / f"{p}.zarr", tile=8, progress=p),
    "KernelStore.verify": lambda p, folder: at.kernel_to_store(MODEL, X, folder / f"{p}.zarr", tile=8).verify(p),
    "sketch_features": lambda p, folder: at.sketch_features(MODEL, X, SKETCH, progress=p),
    "average_features": lambda p, folder: at.average_features(MODEL, START, END, X, nodes=2, progress=p),
    "explain": lambda p, folder: at.explain(FEATS, MOVED, at.LayerScale(), progress=p),
    "fit": lambda p, folder: at.fit(FEATS, Y, structure=at.Fixed(), ridge=1.0, progress=p),
    "fit, watch": lambda p, folder: at.fit(KERNEL, Y, structure=at.LayerScale(), ridge=1.0, watch=p),
    "fit_path": lambda p, folder: at.fit_path(FEATS, Y, structures=at.Fixed(), ridges=(0.1, 1.0), progress=p),
    "proximal_gradient": lambda p, folder: at.solvers.proximal_gradient(
        FEATS, Y, structure=at.Fixed(), ridge=10.0, tol=1e-3, progress=p
    ),
    "kernel_regression": lambda p, folder: at.kernel_regression(
        FEATS.kernel(), Y, ridge=1.0, form="matrix-free", progress=p
    ),
    "inspect": lambda p, folder: at.inspect(MODEL, START, END, X, nodes=1, progress=p),
    "forecast": lambda p, folder: at.forecast(MODEL, X, Y, structure=at.Fixed(), steps=1, progress=p),
}


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    """The bars that were opened."""
    made: list[Bar] = []

    class Watched(Bar):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr("adaptive_tangents.runtime.progress.Bar", Watched)
    return made


@pytest.mark.parametrize("name", SHOWN)
def test_true_shows_one_bar_that_is_full_and_closed_at_the_end_and_false_shows_none(
    name: str, bars: list[Bar], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SHOWN[name](False, tmp_path)
    SHOWN[name](None, tmp_path)
    assert not bars
    assert capsys.readouterr().out == ""
    SHOWN[name](True, tmp_path)
    assert len(bars) == 1
    assert not bars[0].open
    assert "100 %" in capsys.readouterr().out


@pytest.mark.parametrize("name", SHOWN)
def test_a_bar_is_closed_where_the_work_fails(
    name: str, bars: list[Bar], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def call(bar: Bar, stage: str, fraction: float) -> None:
        plain(bar, stage, fraction)
        seen.append(bar.open)
        raise KeyboardInterrupt

    plain = Bar.__call__
    monkeypatch.setattr(Bar, "__call__", call)
    with pytest.raises(KeyboardInterrupt):
        SHOWN[name](True, tmp_path)
    assert seen == [True]
    assert [bar.open for bar in bars] == [False]


def test_every_public_function_that_takes_progress_is_shown_with_a_bar() -> None:
    wings = (
        at.capture,
        at.features,
        at.forecasting,
        at.kernels,
        at.measures,
        at.nn,
        at.sketching,
        at.solvers,
        at.storage,
    )
    functions: dict[str, Any] = {}
    for name, value in ((name, getattr(wing, name)) for wing in (at, *wings) for name in wing.__all__):
        functions[name] = value
        if inspect.isclass(value):
            functions |= {f"{name}.{method}": held for method, held in vars(value).items() if method[0] != "_"}
    found = {
        name
        for name, value in functions.items()
        if inspect.isfunction(value) and "progress" in inspect.signature(value).parameters
    }
    assert sorted(found | {"fit_path", "fit, watch"}) == sorted(SHOWN)
