"""The study sample-complexity: both protocols, both stopping rules from one run, exact fits, and the page."""

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits
from torch import nn
from typer.testing import CliRunner

from adaptive_tangents import cli
from adaptive_tangents.commands.report import PAGES
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.sample_complexity import run as sample_complexity
from adaptive_tangents.experiments.sample_complexity import training as subset_training
from adaptive_tangents.experiments.sample_complexity.claims import (
    FRESH,
    SAME,
    TEST,
    VALIDATION,
    claims,
    factors,
    published,
)
from adaptive_tangents.experiments.sample_complexity.run import SampleComplexityConfig, configured, run, split
from adaptive_tangents.experiments.sample_complexity.training import (
    Recipe,
    model,
    network,
    random,
    recipe,
    stopped,
    train,
)
from adaptive_tangents.experiments.study import Asked
from adaptive_tangents.reporting import report
from adaptive_tangents.runs.record import RunResult
from adaptive_tangents.runs.results import write_results
from adaptive_tangents.runs.units import Tensors
from study_cases import SMALL, Remembered, ended, plain_figures, small_run, toy

pytestmark = pytest.mark.xdist_group("sample-complexity")

TINY = SMALL["sample-complexity"]


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sample_complexity.load_images
    monkeypatch.setattr(
        sample_complexity,
        "load_images",
        lambda name, *, data_dir=None: (
            toy(name) if name.startswith(("toy", "openml:")) else real(name, data_dir=data_dir)
        ),
    )


@pytest.fixture(scope="module")
def tiny() -> tuple[RunResult, dict[str, Tensors]]:
    found = small_run("sample-complexity")
    return found.result, found.parts


# ------------------------------------------------------------------------------------------------------- networks


def test_the_gray_network_has_the_published_layers_and_weights() -> None:
    made = network((28, 28), 10, width=128, depth=5, generator=random(0, "network"))
    dense = [layer for layer in made if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in dense] == [(128, 784), *[(128, 128)] * 3, (10, 128)]
    assert sum(isinstance(layer, nn.ReLU) for layer in made) == 4
    for layer in dense[:4]:
        fan_in = layer.weight.shape[1]
        assert float(layer.weight.detach().var()) == pytest.approx(1 / fan_in, rel=0.05)
        # truncated at two standard deviations of the original normal distribution
        assert float(layer.weight.detach().abs().max()) <= 2 / 0.8796 * fan_in**-0.5 + 1e-6
    assert not any(bool(layer.bias.any()) for layer in dense)


def test_the_colored_network_has_the_published_layers() -> None:
    made = network((3, 32, 32), 10, width=128, depth=5, generator=random(0, "network"))
    convolutions = [layer for layer in made if isinstance(layer, nn.Conv2d)]
    assert [tuple(layer.weight.shape) for layer in convolutions] == [
        (16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (128, 64, 3, 3),
    ]  # fmt: skip
    assert [tuple(p.weight.shape) for p in made if isinstance(p, nn.Linear)] == [(128, 512), (128, 128), (10, 128)]
    assert sum(isinstance(layer, nn.AvgPool2d) for layer in made) == 4
    assert made(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert float(convolutions[3].weight.detach().var()) == pytest.approx(1 / (64 * 9), rel=0.05)


@pytest.mark.parametrize(("shape", "width"), [((3, 15, 15), 128), ((3, 32, 32), 20)])
def test_colored_images_too_small_and_widths_not_divided_by_eight_are_refused(
    shape: tuple[int, ...], width: int
) -> None:
    with pytest.raises(TangentError) as caught:
        network(shape, 10, width=width, depth=5, generator=random(0))
    assert str(caught.value) == (
        "sample-complexity: four poolings need images of 16 × 16 or more and a width that 8 divides, got "
        f"{shape[1]} × {shape[2]} and {width}"
    )


def test_the_adaptive_model_has_two_factors_a_dense_layer_and_three_a_convolution_as_published() -> None:
    made = model("adaptive", network((3, 16, 16), 4, width=16, depth=5, generator=random(0)))
    squares = {
        "/".join(factor.names): sorted(p.shape[0] for p in factor.parameters()) for factor in made.factors
    }  # each factor's parameters are square
    assert squares["conv2"] == [2, 4, 9]  # input channels, output channels, window
    assert squares["dense1"] == [16, 17]  # outputs, and inputs with the bias
    fixed = model("fixed", network((3, 16, 16), 4, width=16, depth=5, generator=random(0)))
    assert not any(list(factor.parameters()) for factor in fixed.factors)
    x = torch.rand(3, 3, 16, 16)
    start = network((3, 16, 16), 4, width=16, depth=5, generator=random(0))
    torch.testing.assert_close(made(x), start(x))


def test_recipes_are_the_published_ones() -> None:
    assert recipe((28, 28)) == Recipe(adam=False, learning_rate=0.01, momentum=0.9, batch_size=50)
    assert recipe((3, 32, 32)) == Recipe(adam=True, learning_rate=0.001, momentum=0.9, batch_size=50)
    assert [Recipe(False, 0.1).batch(n) for n in (125, 249, 250, 1000)] == [25, 25, 50, 50]
    adam = recipe((3, 32, 32)).optimizer(nn.Linear(1, 1))
    assert isinstance(adam, torch.optim.Adam)
    assert adam.defaults["betas"] == (0.9, 0.999)


# ------------------------------------------------------------------------------------------------------- training


def data(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def trained(made: nn.Module, pool=None, **options):
    settings = {
        "n": 40, "fresh": True, "recipe": Recipe(False, 0.05, batch_size=10, few=1), "patience": 20, "max_epochs": 6,
        "generator": random(3),
    }  # fmt: skip
    return train(made, pool or data(90), data(50, 1), data(30, 2), **(settings | options))


def small_network() -> nn.Sequential:
    return network((5,), 3, width=6, depth=2, generator=random(1))


@pytest.mark.parametrize("fresh", [True, False])
def test_the_fixed_model_trains_as_softmax_regression_on_tangent_features_written_out(fresh: bool) -> None:
    """The reference uses features from torch.func and momentum by hand."""
    made, start = model("fixed", small_network()), small_network()
    course = trained(made, fresh=fresh)
    values = {k: v.detach() for k, v in start.named_parameters()}

    def features(x: torch.Tensor) -> torch.Tensor:
        jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(start, p, (x,)))(values)
        return torch.cat([j.flatten(2) for j in jacobian.values()], 2)

    (x, y), (x_test, y_test) = data(90), data(50, 1)
    phi, phi_test = features(x), features(x_test)
    beta = torch.zeros(phi.shape[2])
    velocity = torch.zeros_like(beta)
    generator = random(3)
    for epoch in range(6):
        drawn = torch.randperm(90 if fresh else 40, generator=generator)[:40]
        for index in drawn.split(10):
            p = torch.softmax(start(x[index]).detach() + phi[index] @ beta, 1)
            slope = p - nn.functional.one_hot(y[index], 3)
            velocity = 0.9 * velocity + torch.einsum("nc,ncp->p", slope, phi[index]) / 10
            beta = beta - 0.05 * velocity
        wrong = (start(x_test).detach() + phi_test @ beta).argmax(1) != y_test
        assert float(course.test[epoch]) == pytest.approx(float(wrong.float().mean()), abs=1e-6)
    blocks = made.effective_coefficients()
    first, first_bias, second, second_bias = beta.split([30, 6, 18, 3])
    first, second = (
        torch.cat([weight.reshape(len(bias), -1), bias[:, None]], 1)
        for weight, bias in ((first, first_bias), (second, second_bias))
    )
    torch.testing.assert_close(blocks["dense1"], first, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(blocks["readout"], second, rtol=1e-3, atol=1e-5)


def test_one_fixed_subset_is_the_pools_first_n_and_nothing_else() -> None:
    x, y = data(90)
    x[40:] = torch.nan
    assert trained(small_network(), (x, y), fresh=False).distinct == 40
    with pytest.raises(TangentError, match=r"^sample-complexity: training diverged; lower the learning rate$"):
        trained(small_network(), (x, y), fresh=True)


def test_fresh_subsets_are_n_different_samples_each_epoch_out_of_the_whole_pool() -> None:
    seen: list[torch.Tensor] = []

    class Spy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                seen.append(x[:, 0].detach())
            return super().forward(x)

    x, y = data(90)
    course = trained(Spy(5, 3), (x, y), max_epochs=4)
    epochs = [set(torch.cat(seen[4 * k : 4 * k + 4]).tolist()) for k in range(4)]
    assert all(len(epoch) == 40 for epoch in epochs)
    assert len(set.union(*epochs)) == course.distinct > 60
    assert epochs[0] != epochs[1]


def test_an_epoch_has_whole_batches_only_unless_there_is_none() -> None:
    sizes: list[int] = []

    class Spy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                sizes.append(len(x))
            return super().forward(x)

    for n, expected in ((40, [10] * 4), (25, [10, 10]), (7, [7])):
        sizes.clear()
        trained(Spy(5, 3), n=n, max_epochs=1)
        assert sizes == expected


def test_a_run_goes_on_until_both_rules_would_have_stopped() -> None:
    course = trained(small_network(), patience=2, max_epochs=200)
    ends = []
    for curve in (course.test, course.validation):
        best = 0
        for epoch in range(len(curve)):  # the rule of the published code
            if curve[epoch] < curve[:epoch].min() if epoch else True:
                best = epoch
            if epoch > best + 2:
                break
        ends.append(epoch)
        assert stopped(curve, 2) == best
    assert len(course.test) == len(course.validation) == len(course.loss) < 200
    assert all(len(course.test) - 1 > int(curve.argmin()) + 2 for curve in (course.test, course.validation))
    assert max(ends) <= len(course.test) - 1


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.integers(0, 5), st.integers(0, 10))
def test_the_epoch_reported_does_not_hang_on_how_long_the_run_went_on(
    values: list[int], patience: int, more: int
) -> None:
    best, best_epoch, end = 1.0e9, 0, len(values)
    for epoch, value in enumerate(values, start=1):
        if value < best:
            best, best_epoch = value, epoch
        if epoch > best_epoch + patience:
            end = epoch
            break
    curve = torch.tensor([float(v) for v in values])
    assert stopped(curve, patience) == best_epoch - 1
    assert stopped(torch.cat([curve[:end], torch.zeros(more if end < len(values) else 0)]), patience) == best_epoch - 1


def test_generators_differ_by_seed_and_by_every_word_and_are_the_same_again() -> None:
    keys = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", 11), (2**33, "a"), (2**34, "a")]
    drawn = [float(torch.rand((), generator=random(*key))) for key in keys]
    assert len(set(drawn)) == len(keys)
    assert drawn == [float(torch.rand((), generator=random(*key))) for key in keys]


# ------------------------------------------------------------------------------------------------------ whole runs


def test_errors_are_those_of_the_kept_courses_at_the_epoch_either_rule_chooses(tiny) -> None:
    found, units = tiny
    for protocol in (FRESH, SAME):
        for kind in ("fixed", "adaptive", "network"):
            for n in TINY.sizes:
                for seed in range(2):
                    kept = units[f"toy.{protocol.replace(' ', '-')}.{kind}.n{n}.seed{seed}"]
                    errors = found.results["errors"]["toy"][protocol]
                    assert errors[TEST][kind][str(n)][seed] == float(kept["test"][stopped(kept["test"], 1)])
                    by_validation = float(kept["test"][stopped(kept["validation"], 1)])
                    assert errors[VALIDATION][kind][str(n)][seed] == by_validation
                    run_of = found.results["runs"]["toy"][protocol][kind][str(n)]
                    assert run_of["epochs"][seed] == len(kept["loss"]) <= 4
                    assert (run_of["distinct"][seed] == n) == (protocol == SAME)


def test_seeds_differ_in_everything_and_models_share_their_samples(tiny) -> None:
    first, second = (split(TINY, "toy", seed) for seed in (0, 1))
    for part in ("pool", "validation", "test"):
        assert not torch.equal(getattr(first, part)[0], getattr(second, part)[0])
    weights = [part.network(TINY, seed)[1].weight for seed, part in ((0, first), (1, second), (0, first))]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])
    losses = [tiny[1][f"toy.fixed-subset.network.n30.seed{seed}"]["loss"] for seed in (0, 1)]
    assert not torch.equal(losses[0], losses[1])


def test_held_out_images_are_an_eighth_and_are_not_trained_on() -> None:
    part = split(replace(TINY, validation=500), "toy", 0)
    assert part.described == {
        "name": "toy", "source": "Made up.", "train": 160, "pool": 140, "validation": 20, "test": 40, "of_test": 60,
    }  # fmt: skip
    rows = {tuple(x.flatten().tolist()) for x in part.pool[0]} & {
        tuple(x.flatten().tolist()) for x in part.validation[0]
    }
    assert not rows
    assert part.classes == 3
    assert float(part.pool[0].max()) <= 1


def test_exact_fixed_fits_are_kernel_ridge_regression_written_out(tiny) -> None:
    """(K + ρ)α = onehot − f(x;θ₀), with features from torch.func."""
    part = split(TINY, "toy", 0)
    start = part.network(TINY, 0).double()
    values = {k: v.detach() for k, v in start.named_parameters()}

    def features(x: torch.Tensor) -> torch.Tensor:
        jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(start, p, (x,)))(values)
        return torch.cat([j.flatten(2) for j in jacobian.values()], 2)

    x, y = part.pool[0][:12].double(), part.pool[1][:12]
    phi, x_test = features(x).flatten(0, 1), part.test[0].double()
    target = (nn.functional.one_hot(y, 3) - start(x).detach()).flatten()
    alpha = torch.linalg.solve(phi @ phi.T + 0.1 * torch.eye(36), target)
    outputs = start(x_test).detach() + (features(x_test) @ (phi.T @ alpha))
    error = float((outputs.argmax(1) != part.test[1]).double().mean())
    assert tiny[0].results["exact"]["toy"]["squared"]["12"]["errors"]["fixed"][0] == pytest.approx(error, abs=1e-9)


def test_the_strength_is_chosen_by_the_validation_split(tiny) -> None:
    found, units = tiny
    for loss in ("squared", "cross-entropy"):
        held = found.results["exact"]["toy"][loss]["12"]
        assert set(held["errors"]) == {"fixed", "λ = 1", "λ = 10"}
        for seed in range(2):
            fits = [units[f"toy.exact.{loss}.{k}.n12.seed{seed}"] for k in (1, 2)]
            best = min(fits, key=lambda fitted: float(fitted["validation"]))
            assert held["adaptive"][seed] == float(best["test"])
            assert all(fitted["converged"] for fitted in fits)
    assert "30" not in found.results["exact"]["toy"]["squared"]
    assert found.results["left_out"]["toy"] == [
        "Exact fits beyond n = 12: with 3 outputs, n = 30 needs kernels of 90 × 90, 6.5e-05 GB each, made and "
        "factorized many times."
    ]


def test_what_a_unit_makes_hangs_on_no_other_unit(tiny) -> None:
    alone = Remembered()
    run(replace(TINY, seeds=1, seed=1, sizes=(30,), models=("network", "fixed"), exact=0), units=alone)
    assert len(alone.parts) == 4
    for name, tensors in alone.parts.items():
        for key in tensors.keys() - {"seconds"}:
            assert torch.equal(tensors[key], tiny[1][name][key]), name


def test_all_the_data_hold_is_a_size_of_a_full_run_and_sizes_beyond_are_left_out_by_name() -> None:
    config = replace(TINY, seeds=1, sizes=(30, 1000, 2000), models=("network",), max_epochs=1, everything=True, exact=0)
    found = run(config).results
    assert found["data"]["toy"]["sizes"] == [30, 140]
    assert found["left_out"]["toy"] == [
        "n = 1,000, 2,000: toy has only 140 training samples.",
        "Exact fits were not requested.",
    ]


def test_colored_images_are_trained_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sample_complexity, "load_images", lambda name, *, data_dir=None: toy(name, train=24, shape=(3, 16, 16))
    )
    config = replace(TINY, seeds=1, sizes=(8,), max_epochs=1, exact=0)
    errors = run(config).results["errors"]["toy"][SAME][TEST]
    assert set(errors) == {"fixed", "adaptive", "network"}
    fewer = replace(config, models=("network",), convolutional_sizes=(4, 12), everything=True)
    found = run(fewer).results
    assert found["data"]["toy"]["sizes"] == [4, 12]
    assert found["left_out"]["toy"][0] == (
        "n = 8: convolutional networks were trained only for n = 4, 12, because their steps take ten times as long."
    )


# ---------------------------------------------------------------------------------------------------------- claims


def curves(fixed: float, adaptive: float, network: float) -> dict[str, dict[str, list[float]]]:
    found = {"fixed": fixed, "adaptive": adaptive, "network": network}
    return {kind: {"250": [1.2 * e], "1000": [e]} for kind, e in found.items()}


def claimed(fresh, same, *, name: str = "mnist", seen: int = 9000, exact=None, shift: float = 0.0):
    errors = {
        protocol: {
            TEST: of, VALIDATION: {k: {n: [e + shift for e in v] for n, v in c.items()} for k, c in of.items()},
        }
        for protocol, of in ((FRESH, fresh), (SAME, same))
    }  # fmt: skip
    runs = {FRESH: {kind: {n: {"distinct": [seen]} for n in curve} for kind, curve in fresh.items()}}
    runs[SAME] = {
        kind: {n: {"loss": [0.1 if kind == "adaptive" else 0.2]} for n in curve} for kind, curve in same.items()
    }
    return claims({name: errors}, {name: runs}, {name: exact or {}}, {name: {"pool": 13_262}})


def test_claims_hold_on_the_published_curves_and_not_on_their_opposites() -> None:
    figures = published("mnist")
    fresh = {kind: {n: [e] for n, e in curve.items()} for kind, curve in figures.items()}
    made = claimed(fresh, curves(0.22, 0.27, 0.13))
    assert made["mnist.order"]["verdict"] == "holds"
    assert made["mnist.order"]["published"] == "0.032 < 0.099 < 0.122"
    assert made["mnist.order"]["evidence"] == "network 0.032, adaptive 0.099, fixed 0.122"
    assert all(made[f"mnist.level.{kind}"]["verdict"] == "holds" for kind in ("fixed", "adaptive", "network"))
    assert "0.169 measured earlier" in made["mnist.level.fixed"]["published"]
    assert made["mnist.factor.fresh"]["verdict"] != "holds"  # the plot itself shows no order of magnitude
    assert made["mnist.subset"]["verdict"] == made["mnist.counts"]["verdict"] == "does not hold"
    assert made["mnist.subset"]["why"] == "they overfit: a lower training loss"
    assert made["mnist.level.fixed"]["published"].startswith("n = 125: 0.187; n = 250: 0.175; n = 500")
    assert "up to 9,000 of 13,262 were seen" in made["mnist.counts"]["evidence"]
    assert made["mnist.selection"]["verdict"] == "holds"
    other = claimed(curves(0.1, 0.2, 0.3), curves(0.22, 0.2, 0.13), seen=1000, shift=0.02)
    assert other["mnist.order"]["verdict"] == "does not hold"
    assert other["mnist.subset"]["verdict"] == other["mnist.counts"]["verdict"] == "holds"
    assert other["mnist.selection"]["verdict"] == "does not hold"
    assert other["mnist.level.network"]["verdict"] == "does not hold"
    assert other["mnist.level.adaptive"]["verdict"] == "does not hold"
    assert other["mnist.level.fixed"]["verdict"] == "holds in part"
    part = claimed(
        {**curves(0.18, 0.14, 0.05), "adaptive": {"250": [0.131], "1000": [0.2]}},
        {**curves(0.2, 0.1, 0.1), "adaptive": {"250": [0.1], "1000": [0.3]}},
    )
    assert part["mnist.level.adaptive"]["verdict"] == part["mnist.subset"]["verdict"] == "holds in part"
    assert part["mnist.level.adaptive"]["why"] == "drawn from 13,262 images instead of 60,000"


def test_the_factor_is_of_samples_at_equal_error_and_a_bound_where_no_size_reaches_it() -> None:
    fixed = {"100": [0.4], "400": [0.2], "1600": [0.1]}
    assert factors({"fixed": fixed, "adaptive": {"100": [0.2], "400": [0.1]}}) == {
        "100": (4.0, False),
        "400": (4.0, False),
    }
    assert factors({"fixed": fixed, "adaptive": {"100": [0.05], "400": [0.9]}}) == {
        "100": (16.0, True),
        "400": (0.25, False),
    }
    ten = {"fixed": {"100": [0.4], "1000": [0.2]}, "adaptive": {"100": [0.2], "1000": [0.2]}, "network": fixed}
    assert claimed({k: {n: ten[k][n] for n in ("100", "1000") if n in ten[k]} for k in ("fixed", "adaptive")}, ten)[
        "mnist.factor.same"
    ]["verdict"] == ("does not hold")


def test_exact_claims_compare_the_strength_chosen_with_the_fixed_fit() -> None:
    def exact(adaptive: float) -> dict:
        of_size = {"errors": {"fixed": [0.3]}, "adaptive": [adaptive], "chosen": ["λ = 1"]}
        return {"squared": {"250": of_size, "500": {**of_size, "adaptive": [0.2]}}}

    same = curves(0.3, 0.2, 0.1)
    both = [claimed(same, same, exact=exact(e))["mnist.exact.squared"] for e in (0.25, 0.35)]
    assert [each["verdict"] for each in both] == ["holds", "holds in part"]
    assert "n = 250: 0.250 (λ = 1) against 0.300" in both[0]["evidence"]


def test_data_without_published_figures_are_claimed_nothing_of_them() -> None:
    made = claimed(curves(0.3, 0.2, 0.1), curves(0.3, 0.2, 0.1), name="openml:things")
    assert made["openml:things.order"]["published"] is None
    assert not [key for key in made if "level" in key]
    assert made["openml:things.order"]["claim"].startswith("openml:things: with fresh subsets")


# --------------------------------------------------------------------------------------------------------- settings


def test_settings_follow_what_is_asked(tmp_path: Path) -> None:
    assert configured(Asked()) == SampleComplexityConfig()
    assert configured(Asked(samples=1000, epochs=7, seeds=3, seed=2)) == SampleComplexityConfig(
        sizes=(1000,), max_epochs=7, seeds=3, seed=2
    )
    full = configured(Asked(size="full", data="mnist", data_dir=str(tmp_path)))
    assert (full.datasets, full.seeds, full.convolutional_sizes) == (("mnist",), 1, (1000,))
    assert full.sizes[-1] == 32_000
    assert full.everything
    (tmp_path / "test_batch.bin").write_bytes(b"")
    assert configured(Asked(size="full", data="mnist", data_dir=str(tmp_path))).datasets == ("mnist", "cifar10")
    assert configured(Asked(size="full", data="cifar10", data_dir=str(tmp_path))).datasets == ("cifar10",)
    assert configured(Asked(size="quick")).max_epochs == 15


def test_runs_end_after_the_published_epochs_or_so_many_steps_but_not_before_forty_epochs() -> None:
    config = SampleComplexityConfig()
    assert [config.epochs(n, Recipe(False, 0.1).batch(n)) for n in (10, 125, 250, 500, 1000, 4000, 32_000)] == [
        1000, 1000, 1000, 1000, 500, 125, 40,
    ]  # fmt: skip
    assert replace(config, max_epochs=7).epochs(32_000, 50) == 7


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": (30, 12)},
        {"sizes": ()},
        {"seeds": 0},
        {"max_epochs": 0},
        {"max_steps": 0},
        {"test": 0},
        {"sizes": (0, 3)},
    ],
)
def test_settings_that_are_not_positive_or_do_not_rise_are_refused(change: dict) -> None:
    with pytest.raises(
        TangentError, match=r"^sample-complexity: counts must be positive and sizes increasing, got Sample"
    ):
        replace(TINY, **change)


@pytest.mark.parametrize("change", [{"patience": -1}, {"datasets": ()}, {"models": ()}, {"models": ("alchemy",)}])
def test_no_patience_data_sets_or_models_are_refused(change: dict) -> None:
    made = replace(TINY)
    for key, value in change.items():
        object.__setattr__(made, key, value)
    with pytest.raises(TangentError, match=r"some of the models fixed, adaptive, network; got Sample"):
        made.__post_init__()


def test_data_too_few_for_the_smallest_size_or_for_a_split_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TangentError) as caught:
        run(replace(TINY, sizes=(141,)))
    assert str(caught.value) == (
        "sample-complexity: toy leaves 140 samples to train on, fewer than 141; use smaller sizes or more data"
    )
    monkeypatch.setattr(sample_complexity, "load_images", lambda name, *, data_dir=None: toy(name, train=7))
    with pytest.raises(TangentError, match=r"^sample-complexity: toy holds 7 training images; 8 or more are needed$"):
        run(TINY)


# -------------------------------------------------------------------------------------------- the page, the command


@pytest.mark.parametrize("models", [("fixed", "adaptive", "network"), ("network",)])
def test_the_page_says_what_the_published_curve_measures_and_every_claim(models, tmp_path: Path) -> None:
    every = len(models) == 3
    config = replace(
        TINY, models=models, datasets=("toy",) if every else ("toy", "openml:toys"), exact=12 * every, seeds=1
    )
    found = run(replace(config, max_epochs=1, strengths=(10.0,)))
    with plain_figures("sample-complexity"):
        page = report.build_report(write_results(found.results, found.arrays, tmp_path), PAGES).read_text("utf-8")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page))
    assert "every epoch is a fresh random subset of size n" in text
    assert "the published code counts samples per epoch" in text
    assert "the best accuracy on the test set is reported" in text
    for claim in found.results["claims"].values():
        assert claim["evidence"].split(";")[0] in text.replace("&lt;", "<")
    assert ("Exact fits beside trained models" in text) == every
    assert ("Unanswered" in text) != every
    assert re.findall(r"url\((?!#)|@import|https?:|file:|\{\{|\bNone\b|\bnan\b", page.split("<svg")[0]) == []


ASKED = ["reproduce", "sample-complexity", "--data", "openml:toys", "--quick", "--samples", "20", "--epochs", "2"]


def test_a_command_killed_in_the_middle_and_resumed_ends_as_one_that_was_not(tmp_path: Path, monkeypatch) -> None:
    calls: list[int] = []

    def counted(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return subset_training.train(*arguments, **options)

    def command(folder: Path, *options: str) -> None:
        done = CliRunner().invoke(cli.app, [*ASKED, "--out", str(folder), *options])
        assert done.exit_code == 0, done.output

    whole, killed, threads = tmp_path / "whole", tmp_path / "killed", torch.get_num_threads()
    monkeypatch.setattr(sample_complexity, "train", counted)
    torch.set_num_threads(1)  # a forked child has only one thread
    try:
        with threadpool_limits(1), plain_figures("sample-complexity"):
            dies_at = 0
            command(whole)
            calls.clear()
            dies_at = 4
            assert ended(lambda: command(killed)) == -signal.SIGKILL
            assert len(list((killed / "checkpoints").glob("*.safetensors"))) == 3
            assert not (killed / "results.json").exists()
            dies_at = 0
            command(killed, "--resume")
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == 3
    results = [json.loads((folder / "results.json").read_text("utf-8")) for folder in (whole, killed)]
    for key in ("config", "data", "errors", "runs", "exact", "claims", "left_out", "metrics"):
        assert results[0][key] == results[1][key], key


# ----------------------------------------------------------------------------------------------------- real digits


@pytest.mark.slow
def test_the_networks_error_at_1000_samples_is_the_published_one_with_fresh_subsets_only(data_dir: Path) -> None:
    config = SampleComplexityConfig(
        datasets=("mnist",), data_dir=str(data_dir), sizes=(1000,), models=("network",), exact=0
    )
    errors = run(config).results["errors"]["mnist"]
    assert errors[FRESH][TEST]["network"]["1000"][0] == pytest.approx(0.04, abs=0.012)
    assert errors[SAME][TEST]["network"]["1000"][0] == pytest.approx(0.115, abs=0.03)
    assert np.mean(errors[SAME][VALIDATION]["network"]["1000"]) >= errors[SAME][TEST]["network"]["1000"][0]
