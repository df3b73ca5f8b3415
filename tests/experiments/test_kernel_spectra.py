"""The study kernel-spectra: eigenvalues, eigenvectors and energies as defined, and verdicts."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.claims import rank_correlation
from adaptive_tangents.experiments.kernel_alignment import setup as alignment_setup
from adaptive_tangents.experiments.kernel_alignment.run import KernelAlignmentConfig
from adaptive_tangents.experiments.registry import STUDIES
from adaptive_tangents.experiments.spectra import kernels as kernel_spectra
from adaptive_tangents.experiments.spectra.claims import kernel_claims
from adaptive_tangents.experiments.spectra.kernels import KERNELS, KernelSpectraConfig, decomposed, run
from adaptive_tangents.experiments.study import Asked
from adaptive_tangents.experiments.training import SGD
from adaptive_tangents.runs.record import RunResult
from study_cases import SMALL as CONFIGS
from study_cases import Remembered, made_up_data, small_run

pytestmark = pytest.mark.xdist_group("kernel-spectra")

SMALL = CONFIGS["kernel-spectra"]


@pytest.fixture(scope="module", autouse=True)
def data() -> Iterator[None]:
    with made_up_data():
        yield


@pytest.fixture(scope="module")
def small() -> tuple[RunResult, dict[str, dict[str, torch.Tensor]]]:
    found = small_run("kernel-spectra")
    return found.result, found.parts


# -------------------------------------------------------------------------------------------------------- measures


def test_a_kernel_is_decomposed_as_numpy_does_and_energies_are_those_of_projections() -> None:
    generator = np.random.default_rng(0)
    features, y = generator.normal(size=(12, 30)) + 1, generator.normal(size=12)
    kernel = features @ features.T
    found = decomposed(torch.from_numpy(kernel), torch.from_numpy(y))
    centring = np.eye(12) - np.full((12, 12), 1 / 12)
    u, values, _ = np.linalg.svd(centring @ kernel @ centring)
    np.testing.assert_allclose(found["centred"], values / values.sum(), atol=1e-12)
    plain = np.linalg.svd(kernel, compute_uv=False)
    np.testing.assert_allclose(found["spectrum"], plain / np.trace(kernel), rtol=1e-10)
    centered = y - y.mean()
    for k in (1, 2, 7):
        projected = u[:, :k] @ (u[:, :k].T @ centered)
        assert float(found["energy"][k - 1]) == pytest.approx(projected @ projected / (centered @ centered))
    for k in range(3):
        vector = found["vectors"][k].numpy()
        assert vector @ vector == pytest.approx(12)
        assert vector @ centered > 0
        assert abs(vector @ u[:, k]) == pytest.approx(12**0.5)
    np.testing.assert_array_equal(found["diagonal"], np.diag(kernel))


def test_the_students_are_those_of_kernel_alignment() -> None:
    shared = {"width": 12, "training": SGD(epochs=3), "kernel_samples": 30, "path_nodes": 3, "seed": 1}
    theirs, ours = Remembered(), Remembered()
    posed = [
        alignment_setup.problem(config(**shared), "cpu") for config in (KernelAlignmentConfig, KernelSpectraConfig)
    ]
    assert torch.equal(posed[0].x[posed[0].chosen], posed[1].x[posed[1].chosen])
    for config, units, each in zip((KernelAlignmentConfig, KernelSpectraConfig), (theirs, ours), posed, strict=True):
        y = each.targets["sign"]
        alignment_setup.trained(config(**shared), "sign", y, each, units, lambda _: None, "cpu")
    for key, value in theirs.parts["sign.end"].items():
        assert torch.equal(value, ours.parts["sign.end"][key])


def test_kernels_are_of_the_weights_before_after_and_between(small) -> None:
    """The path average is computed directly, with Gauss-Legendre nodes and Jacobians."""
    result, units = small
    config = replace(SMALL, seed=1)
    posed = alignment_setup.problem(config, "cpu")
    model, x = alignment_setup.student(config, posed, "cpu"), posed.x[posed.chosen]
    start, end = (units[f"seed1.sign.{kind}"] for kind in ("start", "end"))

    def features(s: float) -> torch.Tensor:
        return tangent_features(model, x, params={key: torch.lerp(start[key], end[key], s) for key in start}).dense()

    nodes, weights = np.polynomial.legendre.leggauss(SMALL.path_nodes)
    average = sum(w / 2 * features((s + 1) / 2) for s, w in zip(nodes.tolist(), weights.tolist(), strict=True))
    for kind, phi in (("initial", features(0.0)), ("average", average), ("final", features(1.0))):
        found = result.arrays[f"sign.{kind}.diagonal"][1]
        np.testing.assert_allclose(found, phi.square().sum((1, 2)), rtol=1e-4)


def test_measures_are_of_the_arrays_beside_them(small) -> None:
    results, arrays = small[0].results, small[0].arrays
    for target in ("smooth", "sign"):
        for kind in KERNELS:
            found = {key: results["over_seeds"][f"{target}.{key}.{kind}"] for key in ("share", "leading", "top")}
            assert found["share"] == pytest.approx(arrays[f"{target}.{kind}.centred"][:, 0])
            assert found["leading"] == pytest.approx(arrays[f"{target}.{kind}.energy"][:, 0])
            assert found["top"] == pytest.approx(arrays[f"{target}.{kind}.energy"][:, 9])
            for k in range(SMALL.seeds):
                wanted = spearmanr(arrays[f"{target}.{kind}.diagonal"][k], np.abs(arrays[f"{target}.teacher"][k]))[0]
                assert results["over_seeds"][f"{target}.distance.{kind}"][k] == pytest.approx(wanted)
    assert results["metrics"]["sign.share.final"] == pytest.approx(np.mean(arrays["sign.final.centred"][:, 0]))


def test_rank_correlation_is_spearmans_with_ties_and_nothing_where_it_is_not_defined() -> None:
    a, b = [1.0, 2.0, 2.0, 5.0, 3.0], [2.0, 1.0, 7.0, 7.0, 3.0]
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b)[0])
    assert np.isnan(rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))
    assert np.isnan(rank_correlation([1.0], [2.0]))


def test_a_target_of_one_value_is_an_error() -> None:
    with pytest.raises(
        TangentError, match="kernel-spectra: the target has one value on all 4 samples; use more samples"
    ):
        decomposed(torch.eye(4), torch.ones(4))


# ---------------------------------------------------------------------------------------------------------- claims


def _seeds() -> dict[str, list[float]]:
    """Numbers of two seeds for which every claim holds."""
    steps = {"initial": 0.1, "average": 0.3, "final": 0.4, "adapted": 0.25}
    made: dict[str, list[float]] = {}
    for target, more in (("smooth", 0.0), ("sign", 0.1)):
        for kind, value in steps.items():
            gained = value + (more if kind != "initial" else 0)
            for key in ("share", "share_plain", "leading", "top"):
                made[f"{target}.{key}.{kind}"] = [gained, gained + 0.01]
            made[f"{target}.rank.{kind}"] = [10 - 10 * gained, 11 - 10 * gained]
            made[f"{target}.distance.{kind}"] = [0.0, 0.1]
    made["sign.distance.average"] = [-0.7, -0.6]
    return made


def test_every_claim_holds_of_numbers_that_are_as_claimed() -> None:
    made = kernel_claims(_seeds())
    assert set(made) == {"share", "share_plain", "rank", "leading", "hard", "adapted", "diagonal"}
    assert {found["verdict"] for found in made.values()} == {"holds"}
    assert {found["why"] for found in made.values()} == {""}
    assert all(found["refuted_by"] and found["evidence"] for found in made.values())


@pytest.mark.parametrize(
    ("changes", "key", "verdict", "why"),
    [
        ({"sign.share.final": [0.2, 0.6]}, "share", "holds in part", "not for sign, K̄ to K_T: 1 of 2 seeds"),
        (
            {f"{t}.share.average": [0.05, 0.05] for t in ("smooth", "sign")}
            | {f"{t}.share.final": [0.01, 0.01] for t in ("smooth", "sign")},
            "share", "does not hold", "K_0 to K̄: 2 of 2 seeds",
        ),
        ({"smooth.rank.final": [12.0, 12.0]}, "rank", "holds in part", "smooth, K̄ to K_T: 2 of 2 seeds"),
        ({"sign.top.average": [0.15, 0.9]}, "hard", "holds in part", "in 1 of 2 seeds the smooth target gains more"),
        ({"sign.top.average": [0.15, 0.15]}, "hard", "does not hold", "in 2 of 2 seeds"),
        ({"sign.share.adapted": [0.12, 0.12]}, "adapted", "holds in part", "at least half of the gain in 3 of 4"),
        ({"sign.distance.average": [-0.4, -0.3]}, "diagonal", "holds in part", "for the sign it falls less steadily"),
        ({"smooth.distance.average": [-0.55, -0.55]}, "diagonal", "holds in part", "for the smooth target too"),
        ({"sign.distance.average": [0.4, 0.3]}, "diagonal", "does not hold", "for the sign it falls less steadily"),
    ],
)  # fmt: skip
def test_a_claim_falls_with_its_numbers(changes, key, verdict, why) -> None:
    found = kernel_claims(_seeds() | changes)[key]
    assert found["verdict"] == verdict
    assert why in found["why"]


def test_what_is_asked_decides_sizes_and_settings_are_checked() -> None:
    quick, standard, full = (kernel_spectra.configured(Asked(size=size)) for size in ("quick", "standard", "full"))
    assert quick.seeds == 1 < standard.seeds < full.seeds
    asked = kernel_spectra.configured(Asked(seeds=7, samples=50, epochs=9, seed=3))
    assert (asked.seeds, asked.kernel_samples, asked.training.epochs, asked.seed) == (7, 50, 9, 3)
    with pytest.raises(TangentError, match="kernel-spectra: kernel_samples must be at least 16, got 4"):
        KernelSpectraConfig(kernel_samples=4)
    with pytest.raises(TangentError, match="kernel-spectra: seeds must be at least 1, got 0"):
        KernelSpectraConfig(seeds=0)
    with pytest.raises(TangentError, match=r"kernel-spectra: made up holds 120 training digits \(2, 3\), fewer than"):
        run(KernelSpectraConfig())


# --------------------------------------------------------------------------------------------------------- the page


def test_the_verdict_follows_the_claims(small) -> None:
    results = dict(small[0].results) | {"claims": kernel_claims(_seeds())}
    story = STUDIES["kernel-spectra"].page().context(results)["story"]
    assert story.verdict.endswith("does the exact model do the same: yes.")
    results["claims"] = kernel_claims(_seeds() | {"sign.top.average": [0.15, 0.15]})
    story = STUDIES["kernel-spectra"].page().context(results)["story"]
    assert "do the leading ten gain more for the sign: no" in story.verdict
