"""Kernel alignment on real digits: the published figures."""

import importlib
from typing import Any

import pytest

import adaptive_tangents as at
from adaptive_tangents.experiments.kernel_alignment.run import KernelAlignmentConfig, run
from adaptive_tangents.experiments.training import SGD
from study_cases import explained_in_rounds

pytestmark = pytest.mark.xdist_group("published alignment")


@pytest.fixture(scope="module")
def published() -> dict[str, float]:
    """A shorter training than the published one, which is within the same bounds."""
    config = KernelAlignmentConfig(
        training=SGD(epochs=100), kernel_samples=200, path_nodes=12, strengths=(100.0,), linearization_points=2
    )

    def explained(initial: Any, average: Any, structure: at.structures.Structure, **options: Any) -> Any:
        asked = type(structure) is at.TwoSided  # no test here asks for the others
        return at.explain(initial, average, structure if asked else at.LayerScale(), **options)

    with explained_in_rounds(1), pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module(run.__module__), "explain", explained)
        return run(config).results["metrics"]


def _assert_published(metrics: dict[str, float], smooth: tuple[float, float], sign: tuple[float, float]) -> None:
    assert smooth[0] <= metrics["smooth.alignment.average"] <= smooth[1]
    assert sign[0] <= metrics["sign.alignment.average"] <= sign[1]
    assert metrics["sign.alignment.average"] > metrics["smooth.alignment.average"]
    assert max(metrics[f"{target}.alignment.initial"] for target in ("smooth", "sign")) < 0.08
    assert min(metrics[f"{target}.path_error_db"] for target in ("smooth", "sign")) > 40
    assert metrics["sign.diagonal_ratio"] >= 1.5 > metrics["smooth.diagonal_ratio"]


@pytest.mark.slow
def test_training_turns_the_kernel_more_for_the_sign_than_for_the_smooth_target(published) -> None:
    _assert_published(published, (0.10, 0.20), (0.20, 0.32))


@pytest.mark.slow
def test_two_sided_transforms_explain_more_of_the_change_than_a_scale_per_layer(published) -> None:
    for target in ("smooth", "sign"):
        two_sided, scale = (published[f"{target}.explain.{key}.total"] for key in ("two_sided", "layer_scale"))
        assert two_sided > 0.5 > scale + 0.2


@pytest.mark.slow
def test_published_figures_hold_on_all_digits_at_hand(data_dir) -> None:
    config = KernelAlignmentConfig(data="mnist", data_dir=str(data_dir), strengths=(100.0,))
    _assert_published(run(config).results["metrics"], (0.14, 0.21), (0.30, 0.42))
