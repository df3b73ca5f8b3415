"""The study hard-targets: measures, correlations and verdicts."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.hard_targets import run as hard_targets
from adaptive_tangents.experiments.hard_targets.claims import AGAINST, HARDNESS, claims, correlations
from adaptive_tangents.experiments.hard_targets.run import HardTargetsConfig, hard_target, run, sizes
from adaptive_tangents.experiments.kernel_alignment import setup as alignment_setup
from adaptive_tangents.experiments.registry import STUDIES
from adaptive_tangents.experiments.study import Asked
from adaptive_tangents.experiments.training import SGD
from adaptive_tangents.features.transforms import LowRank, Matrix, Sides
from adaptive_tangents.runs.record import RunResult
from study_cases import SMALL as CONFIGS
from study_cases import made_up_data, small_run

pytestmark = pytest.mark.xdist_group("hard-targets")

SMALL = CONFIGS["hard-targets"]


@pytest.fixture(scope="module", autouse=True)
def data() -> Iterator[None]:
    with made_up_data():
        yield


@pytest.fixture(scope="module")
def small() -> tuple[RunResult, dict[str, dict[str, torch.Tensor]]]:
    found = small_run("hard-targets")
    return found.result, found.parts


# -------------------------------------------------------------------------------------------------------- measures


def test_targets_go_from_the_teachers_output_to_its_sign_at_unit_mean_square() -> None:
    y = torch.randn(200, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    smooth, between, sign = (hard_target(y, t) for t in (1e4, 0.5, 1e-6))
    torch.testing.assert_close(smooth, y / y.square().mean().sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(sign, y.sign())
    assert float(between.square().mean()) == pytest.approx(1)
    assert (between.flatten()[y.flatten().argsort()].diff() > 0).all()


def test_the_size_of_a_transform_is_of_its_distance_from_the_identity_on_both_sides() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    full = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    transforms = {
        "a": Sides(LowRank(q[:, :2], torch.tensor([3.0, 1.5], dtype=torch.float64)), Matrix(full)),
        "b": Sides(None, None),
    }
    found = sizes(transforms)
    moved = [q[:, :2] @ torch.diag(torch.tensor([2.0, 0.5], dtype=torch.float64)) @ q[:, :2].T, full - torch.eye(4)]
    assert found["nuclear"] == pytest.approx(sum(float(torch.linalg.matrix_norm(m, "nuc")) for m in moved))
    assert found["frobenius"] == pytest.approx(sum(float((m**2).sum()) for m in moved) ** 0.5)
    assert sizes({}) == {"nuclear": 0.0, "frobenius": 0.0}


def test_hardness_and_alignment_are_those_of_kernels_of_dense_features(small) -> None:
    arrays, units = small[0].arrays, small[1]
    posed = alignment_setup.problem(SMALL, "cpu")
    model, x = alignment_setup.student(SMALL, posed, "cpu"), posed.x[posed.chosen]
    y = hard_target(posed.targets["smooth"], 0.5)[posed.chosen, 0].double().numpy()
    states = [units[f"seed0.tau0.5.{kind}"] for kind in ("start", "end")]
    change = (
        torch.func.functional_call(model, states[1], (x,)) - torch.func.functional_call(model, states[0], (x,))
    ).detach()
    change = change[:, 0].double().numpy()
    kernels = []
    for state in states:
        phi = tangent_features(model, x, params=state).dense()[:, 0].double().numpy()
        kernels.append(phi @ phi.T)

    def sim(kernel: np.ndarray) -> float:
        return float(change @ kernel @ change / np.linalg.norm(kernel) / (change @ change))

    assert arrays["sim_initial"][0, 1] == pytest.approx(sim(kernels[0]), rel=1e-4)
    assert arrays["sim_final"][0, 1] == pytest.approx(sim(kernels[1]), rel=1e-4)
    _, vectors = np.linalg.eigh(kernels[0])
    along = (vectors.T @ y)[::-1] ** 2
    assert arrays["energy_outside"][0, 1] == pytest.approx(1 - along[:10].sum() / (y @ y), rel=1e-4)
    assert arrays["rkhs_norm"][0, 1] == pytest.approx(y @ np.linalg.solve(kernels[0], y), rel=1e-2)
    np.testing.assert_allclose(arrays["gain"], arrays["sim_average"] - arrays["sim_initial"], atol=1e-12)
    np.testing.assert_allclose(arrays["gain_exact"], arrays["sim_exact"] - arrays["sim_initial"], atol=1e-12)
    assert (arrays["size_nuclear"] >= arrays["size_frobenius"]).all()
    assert (arrays["size_exact_nuclear"] >= arrays["size_exact_frobenius"]).all()


def test_results_hold_every_number_by_seed_and_temperature(small) -> None:
    results, arrays = small[0].results, small[0].arrays
    assert results["temperatures"] == [10.0, 0.5, 0.01]
    for key, values in results["measured"].items():
        assert np.shape(values) == (1, 3)
        assert results["metrics"][f"tau 0.5.{key}"] == pytest.approx(arrays[key][0, 1])


def test_correlations_are_spearmans_over_temperatures_seed_by_seed() -> None:
    generator = np.random.default_rng(0)
    arrays = {key: generator.normal(size=(2, 4)) for key in (*HARDNESS, *AGAINST)}
    found = correlations(arrays, (10.0, 1.0, 0.1, 0.01))
    for hard in HARDNESS:
        for key in AGAINST:
            for seed in range(2):
                assert found[hard][key][seed] == pytest.approx(spearmanr(arrays[hard][seed], arrays[key][seed])[0])
        assert found[hard]["sharpness"][0] == pytest.approx(spearmanr(arrays[hard][0], range(4))[0])


# ---------------------------------------------------------------------------------------------------------- claims


def _arrays(**changes: list[float]) -> dict[str, np.ndarray]:
    """Two seeds in which everything grows together, except for ``changes``."""
    rising = {key: [1.0, 2.0, 3.0, 4.0] for key in (*HARDNESS, *AGAINST)}
    return {key: np.array([row, [2 * v for v in row]]) for key, row in (rising | changes).items()}


def _claims(**changes: list[float]) -> dict[str, Any]:
    arrays = _arrays(**changes)
    return claims(arrays, correlations(arrays, (10.0, 1.0, 0.1, 0.01)))


def test_every_claim_holds_where_all_grows_together() -> None:
    made = _claims()
    assert set(made) == {"premise", "aligns", "transform", "exact.size", "exact.aligns", "ends"}
    assert {found["verdict"] for found in made.values()} == {"holds"}
    assert "RKHS norm: ρ = 1.00 ± 0.00" in made["aligns"]["evidence"]
    assert "from 1.50 ± 0.71 (smooth) to 6.00 ± 2.83 (sign)" in made["aligns"]["evidence"]


@pytest.mark.parametrize(
    ("changes", "key", "verdict", "why"),
    [
        ({"gain": [4.0, 3.0, 2.0, 1.0]}, "aligns", "does not hold", "not by RKHS norm, energy outside, leave-one-out error"),
        ({"leave_one_out": [4.0, 3.0, 2.0, 1.0]}, "aligns", "holds in part", "not by leave-one-out error"),
        ({"leave_one_out": [4.0, 3.0, 2.0, 1.0]}, "premise", "holds in part", "not by leave-one-out error"),
        ({"size_nuclear": [1.0, 4.0, 2.0, 3.0]}, "transform", "does not hold", "RKHS norm"),
        ({"size_exact_nuclear": [4.0, 3.0, 2.0, 1.0]}, "exact.size", "does not hold", "RKHS norm"),
        ({"gain_exact": [4.0, 3.0, 2.0, 1.0]}, "exact.aligns", "does not hold", "RKHS norm"),
        ({"gain": [4.0, 5.0, 6.0, 1.0]}, "ends", "does not hold", ""),
    ],
)  # fmt: skip
def test_a_claim_falls_with_its_numbers(changes, key, verdict, why) -> None:
    found = _claims(**changes)[key]
    assert found["verdict"] == verdict
    assert why in found["why"]


def test_a_correlation_with_what_never_changes_is_said_not_to_be_defined() -> None:
    found = _claims(gain=[1.0, 1.0, 1.0, 1.0])["aligns"]
    assert found["verdict"] == "does not hold"
    assert "RKHS norm: ρ is not defined" in found["evidence"]


@pytest.mark.parametrize("temperatures", [(1.0, 0.5), (0.1, 0.5, 1.0), (1.0, 0.5, 0.0)])
def test_temperatures_are_positive_and_fall(temperatures) -> None:
    with pytest.raises(
        TangentError, match="hard-targets: at least 3 positive and falling temperatures are needed, got"
    ):
        HardTargetsConfig(temperatures=temperatures)


def test_what_is_asked_decides_sizes_and_settings_are_checked() -> None:
    quick, standard, full = (hard_targets.configured(Asked(size=size)) for size in ("quick", "standard", "full"))
    assert quick.seeds == 1 < standard.seeds < full.seeds
    asked = hard_targets.configured(Asked(seeds=7, samples=50, epochs=9, seed=3))
    assert (asked.seeds, asked.kernel_samples, asked.training.epochs, asked.seed) == (7, 50, 9, 3)
    with pytest.raises(TangentError, match="hard-targets: kernel_samples must be at least 16, got 4"):
        HardTargetsConfig(kernel_samples=4)
    with pytest.raises(TangentError, match="hard-targets: training on the tau10 target diverged; lower"):
        run(replace(SMALL, training=SGD(epochs=20, learning_rate=1e6)))


# --------------------------------------------------------------------------------------------------------- the page


def test_the_verdict_follows_the_claims(small) -> None:
    page = STUDIES["hard-targets"].page()
    told = page.context(dict(small[0].results) | {"claims": _claims()})["story"].verdict
    assert told.endswith("does the exact model’s kernel align more: yes.")
    told = page.context(dict(small[0].results) | {"claims": _claims(gain=[4.0, 3.0, 2.0, 1.0])})["story"].verdict
    assert "does the trained kernel align more: no" in told
