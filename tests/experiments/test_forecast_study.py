"""The study forecast: its measures, the second-order model, the count of passes, and claims that numbers decide."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.feature_change.networks import Training
from adaptive_tangents.experiments.forecast import problems, texts
from adaptive_tangents.experiments.forecast import run as study
from adaptive_tangents.experiments.forecast.claims import claims, epochs_to_reach
from adaptive_tangents.experiments.forecast.measures import Passes, Turn, overlap, shares_of, turn
from adaptive_tangents.experiments.forecast.page import PAGE, verdict
from adaptive_tangents.experiments.forecast.quadratic import SecondOrder
from adaptive_tangents.experiments.forecast.run import ForecastConfig, words_of
from adaptive_tangents.experiments.study import Asked
from adaptive_tangents.runs.units import Units
from study_cases import SMALL, made_up_data, small_run

pytestmark = pytest.mark.xdist_group("forecast")

TINY = SMALL["forecast"]


@pytest.fixture(scope="module", autouse=True)
def data() -> Iterator[None]:
    with made_up_data():
        yield


@pytest.fixture(scope="module")
def task() -> problems.Task:
    return problems.posed(TINY.cases()[0], TINY.source, 0, "cpu")


def moved(task: problems.Task, by: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {k: v.detach() + by * torch.randn(v.shape, generator=generator) for k, v in task.model.named_parameters()}


# -------------------------------------------------------------------------------------------------------- measures


def test_kernels_of_a_turn_are_sums_of_gradient_products_on_the_way_and_at_its_end(task: problems.Task) -> None:
    end, x = moved(task, 0.1), task.x[task.chosen]
    start = {k: v.detach() for k, v in task.model.named_parameters()}

    def features(state: dict[str, Tensor]) -> Tensor:
        return tangent_features(task.model, x, params=state).dense()[:, 0]

    found = turn(task, end, nodes=2)
    torch.testing.assert_close(sum(found.final.values()), features(end) @ features(end).mT, rtol=1e-4, atol=1e-5)
    nodes = [0.5 - 0.5 / math.sqrt(3), 0.5 + 0.5 / math.sqrt(3)]
    mean = sum(features({k: torch.lerp(start[k], end[k], s) for k in start}) for s in nodes) / 2
    torch.testing.assert_close(sum(found.average.values()), mean @ mean.mT, rtol=1e-4, atol=1e-5)
    for name, change in found.change.items():
        true = torch.cat(
            [(end[f"{name}.{k}"] - start[f"{name}.{k}"]).reshape(len(change), -1) for k in ("weight", "bias")], 1
        )
        torch.testing.assert_close(change, true)
    again = Turn.of(found.tensors("trained"), "trained")
    assert again.average.keys() == found.average.keys()
    assert again.change["readout"] is found.change["readout"]


def test_nothing_changes_where_no_parameter_moves(task: problems.Task) -> None:
    found = turn(task, {}, nodes=2)
    assert found.average is found.final
    assert float(shares_of(found.change).sum()) == 0


def test_the_overlap_of_random_subspaces_is_chance_and_of_a_matrix_with_itself_one() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, 30, generator=generator) for _ in range(2))
    assert overlap(a, a, 3) == pytest.approx(1)
    mean = sum(overlap(torch.randn(40, 3, generator=generator), a, 3) for _ in range(200)) / 200
    assert mean == pytest.approx(3 / 40, rel=0.1)
    turned = torch.linalg.qr(torch.randn(30, 30, generator=generator)).Q
    assert overlap(a, a @ turned, 3) == pytest.approx(1)
    assert 0 <= overlap(a, b, 3) < 0.5


def test_the_second_order_model_has_the_networks_first_and_second_derivatives(task: problems.Task) -> None:
    smooth = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model, x = SecondOrder(smooth), torch.randn(6, 5, dtype=torch.float64)
    assert len(list(model.parameters())) == 4
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in model.start.values()]

    def at(size: float) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            for parameter, value in zip(model.change, direction, strict=True):
                parameter.copy_(size * value)
            return model(x), torch.func.functional_call(smooth, dict(model.moved()), (x,))

    off = [float((first - second).norm()) for first, second in map(at, (0.04, 0.02))]
    assert off[0] / off[1] == pytest.approx(8, rel=0.2)  # of third order
    assert torch.equal(at(0.0)[0], smooth(x).detach())


def test_passes_count_every_sample_and_output_and_leave_the_model_without_hooks() -> None:
    model = nn.Linear(3, 2)
    with Passes().of(model, 2) as passes:
        model(torch.ones(7, 3)).sum().backward()
        with torch.no_grad():
            model(torch.ones(3, 3))
    assert passes.count == pytest.approx((7 * 5 + 3) / 3)
    model(torch.ones(7, 3))
    assert passes.count == pytest.approx((7 * 5 + 3) / 3)


def test_targets_from_smooth_to_sign_are_of_the_same_teacher_and_samples() -> None:
    config = replace(TINY, temperatures=(0.001,))
    cases = {case.key: case for case in config.cases()}
    sign, hard = (problems.posed(cases[key], config.source, 0, "cpu") for key in ("mlp-sign", "mlp-tau0.001"))
    assert bool((sign.x == hard.x).all())
    assert float((sign.y - hard.y).abs().mean()) < 0.05
    assert bool((sign.told.diff() >= 0).all())
    assert sign.chosen.tolist() == list(range(16))


def test_every_comparison_is_made_for_the_first_seeds_and_the_main_networks_only() -> None:
    results = small_run("forecast").result.results
    cases = results["cases"]
    assert list(cases) == ["mlp-sign", "mlp-smooth", "cnn", "mlp-adam0.01", "cnn-sgd0.02"]
    assert "quadratic" in cases["mlp-sign"]["methods"]
    assert "quadratic" not in cases["cnn"]["methods"]
    assert list(cases["mlp-adam0.01"]["methods"]) == [
        "nothing",
        "forecast",
        "fixed",
        "two_sided_1",
        *(f"epoch{k}" for k in (1, 3, 10, 30)),
    ]
    for case in cases.values():
        assert case["methods"]["nothing"]["passes"] == [0.0]
        assert case["methods"]["epoch10"]["average"] == pytest.approx([1.0])  # the training ends before
        assert case["methods"]["forecast"]["passes"][0] > case["methods"]["fixed"]["passes"][0] > 0
        assert sum(case["by_layer"]["trained"]["share"]) == pytest.approx(1)
    assert TINY.methods(TINY.cases()[0], nth=5) == TINY.methods(TINY.cases()[-1], nth=0)


def test_a_network_without_weights_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    assert texts.absent() == f"{texts.PACKAGE}, transformers, tokenizers not installed"
    results = dict(small_run("forecast").result.results) | {"skipped": {"encoder": texts.absent()}}
    made = PAGE.context(results)["sections"][-1][2][0][1]
    assert "The encoder was left out" in made
    assert "not installed" in made


# ---------------------------------------------------------------------------------------------------------- claims


def case(words: str = "MLP, sign", **changes: Any) -> dict[str, Any]:
    """A network whose forecast is right in everything; two seeds, three layers."""
    order = {
        "order": [1.0, 1.0],
        "left": [0.9, 0.9],
        "right": [0.9, 0.9],
        "chance_left": [0.1, 0.1],
        "chance_right": [0.1, 0.1],
    }
    method = order | {
        "final": [0.95, 0.95],
        "aligned_final": [0.9, 0.9],
        "passes": [100.0, 100.0],
        "adapts": [1.0, 1.0],
    }
    bad = method | {"average": [0.7, 0.7], "left": [0.2, 0.2], "right": [0.2, 0.2], "aligned_final": [0.4, 0.4]}
    made: dict[str, Any] = {
        "words": words, "kind": "mlp", "varied": "", "n": 50, "epochs": 100, "layers": ["a", "b", "c"],
        "trained": {"aligned_final": [0.9, 0.9]},
        "methods": {
            "nothing": bad | {"average": [0.6, 0.6]}, "forecast": method | {"average": [0.96, 0.97]},
            "fixed": bad | {"average": [0.9, 0.9]}, "two_sided_1": method | {"average": [0.96, 0.97]},
            "shuffled": bad, "quadratic": bad,
            "epoch1": bad, "epoch3": bad | {"average": [0.8, 0.8]}, "epoch10": bad | {"average": [0.9, 0.9]},
            "epoch30": bad | {"average": [0.98, 0.98]},
        },
        "by_layer": {"forecast": {"rank": [1.5, 2.0, 3.0]}, "trained": {"rank": [1.4, 2.2, 2.5]}},
    }  # fmt: skip
    made = copy.deepcopy(made)
    for path, value in changes.items():
        *way, last = path.split("__")
        at = made
        for key in way:
            at = at[key]
        at[last] = value
    return made


def cases(**changes: Any) -> dict[str, Any]:
    """All networks, with ``changes`` made to the first."""
    return {
        "mlp-sign": case(**changes),
        "mlp-smooth": case("MLP, smooth target", methods__fixed__average=[0.955, 0.955]),
        "cnn": case("CNN", kind="cnn"),
        "transformer": case("transformer", kind="transformer"),
        "mlp-tau0.5": case("MLP, τ = 0.5", varied="target"),
        "mlp-adam": case("MLP, Adam", varied="training"),
        "mlp-width": case("MLP, width 64", varied="width"),
    }


def test_every_claim_holds_where_all_is_foretold() -> None:
    made = claims(cases())
    assert {found["verdict"] for found in made.values()} == {"holds"}
    assert len(made) == 21
    assert made["agrees.mlp-sign"]["evidence"].startswith(
        "0.965 ± 0.007; K_0 0.600 ± 0.000, Fixed 0.900 ± 0.000, TwoSided 0.965 ± 0.007"
    )
    assert "2.0 ± 0.0 epochs against 26.2 ± 1.8 of 100" in made["cheaper.cnn"]["evidence"]


@pytest.mark.parametrize(
    ("changes", "key", "verdict", "why"),
    [
        ({"methods__forecast__average": [0.95, 0.92]}, "agrees.mlp-sign", "holds in part", "at least 0.94 in 1 of 2 seeds"),
        ({"methods__forecast__average": [0.91, 0.92]}, "agrees.mlp-sign", "does not hold", "at least 0.94 in 0 of 2 seeds"),
        ({"methods__nothing__average": [0.94, 0.95]}, "agrees.mlp-sign", "holds in part",
         "it is near, but training turns this kernel so little that K_0 is about as near, or nearer"),
        ({"methods__fixed__average": [0.9, 0.98]}, "above_fixed", "holds in part", "above in 1 of 2 seeds"),
        ({"methods__fixed__average": [0.98, 0.98]}, "above_fixed", "does not hold", "above in 0 of 2 seeds"),
        ({"methods__two_sided_1__average": [0.95, 0.8]}, "adaptive", "holds in part", "above in 1 of 2 seeds"),
        ({"methods__two_sided_1__average": [0.9, 0.9]}, "hard", "does not hold", ""),
        ({"methods__forecast__order": [-1.0, -1.0]}, "order", "holds in part", ""),
        ({"methods__forecast__aligned_final": [0.6, 0.6]}, "task", "holds in part", ""),
        ({"methods__forecast__left": [0.1, 0.9]}, "directions", "holds in part", ""),
        ({"by_layer__forecast": {"rank": [1.5, 2.0, 9.0]}}, "ranks", "holds in part", ""),
        ({"methods__shuffled__average": [0.99, 0.7]}, "labels", "holds in part", ""),
        ({"methods__nothing__average": [0.99, 0.6]}, "nearer", "holds in part", ""),
        ({"methods__fixed__average": [0.98, 0.98]}, "chosen", "holds in part", ""),
        ({"methods__quadratic__average": [0.99, 0.99]}, "quadratic", "holds in part", ""),
        ({"methods__forecast__passes": [100.0, 5000.0]}, "cost.mlp", "holds in part", ""),
    ],
)  # fmt: skip
def test_a_claim_falls_with_its_numbers(changes: dict[str, Any], key: str, verdict: str, why: str) -> None:
    found = claims(cases(**changes))[key]
    assert found["verdict"] == verdict
    assert found["why"] == why


def test_claims_of_large_networks_and_of_other_trainings_fall_with_their_numbers() -> None:
    changed = cases()
    changed["cnn"] = case("CNN", kind="cnn", methods__forecast__passes=[1000.0, 5000.0])
    changed["transformer"] = case("transformer", kind="transformer", methods__forecast__passes=[1e5, 1e5])
    changed["mlp-adam"] = case("MLP, Adam", varied="training", methods__forecast__average=[0.8, 0.8])
    made = claims(changed)
    assert made["cheaper.cnn"]["verdict"] == "holds in part"
    assert made["cheaper.transformer"]["verdict"] == "does not hold"
    assert made["cost.large"]["verdict"] == "does not hold"
    assert (made["varied.training"]["verdict"], made["varied.training"]["why"]) == (
        "does not hold",
        "not for MLP, Adam",
    )
    assert made["varied.width"]["verdict"] == "holds"


def test_a_second_order_model_that_diverged_decides_nothing() -> None:
    nothing = [math.nan, math.nan]
    found = claims(cases(methods__quadratic__average=nothing))["quadratic"]
    assert found["verdict"] == "holds"
    assert "MLP, sign: 0.965 ± 0.007, the other diverged" in found["evidence"]


def test_epochs_to_reach_a_level_are_read_between_those_kept() -> None:
    one = case()
    assert epochs_to_reach(one, 0.5, 0) == 0
    assert epochs_to_reach(one, 0.75, 0) == pytest.approx(2)
    assert epochs_to_reach(one, 0.94, 0) == pytest.approx(20)
    assert epochs_to_reach(one, 0.99, 0) == pytest.approx(65)
    assert epochs_to_reach(case(epochs=20), 0.95, 1) == pytest.approx(15)


# ------------------------------------------------------------------------------------------------ settings, the page


def test_what_is_asked_decides_sizes_and_settings_are_checked(tmp_path) -> None:
    quick, standard, full = (study.configured(Asked(size=size)) for size in ("quick", "standard", "full"))
    assert quick.seeds < standard.seeds < full.seeds == 5 == full.controls
    assert (standard.data, standard.images) == ("mnist5k", "mnist5k")
    assert study.configured(Asked(data="cifar10")).images == "cifar10"
    assert study.configured(Asked(data="cifar10")).data == "mnist5k"
    (tmp_path / "test_batch.bin").write_bytes(b"")
    assert study.configured(Asked(data_dir=str(tmp_path))).images == "cifar10"
    asked = study.configured(Asked(seeds=7, samples=50, epochs=9, seed=3))
    assert (asked.seeds, asked.samples, asked.epochs, asked.seed) == (7, 50, 9, 3)
    with pytest.raises(TangentError, match="forecast: digits, samples and kernel_samples must be at least 16, got"):
        ForecastConfig(samples=4)
    with pytest.raises(
        TangentError, match="forecast: counts, widths and strengths must be positive, classes at least 2"
    ):
        ForecastConfig(controls=9)
    with pytest.raises(TangentError, match="forecast: networks are mlp, cnn, transformer and encoder, got"):
        ForecastConfig(networks=("rnn",))
    with pytest.raises(
        TangentError, match="forecast: mnist5k holds 160 training images of 3 classes, fewer than samples = 900"
    ):
        study.run(replace(TINY, networks=("cnn",), samples=900))
    wild = replace(TINY.cases()[0], training=Training("sgd", 1e9, 3))
    task = problems.posed(wild, TINY.source, 0, "cpu")
    with pytest.raises(TangentError, match="forecast: training the MLP, sign diverged; lower its learning rate"):
        problems.course(wild, task, 0, Units(), lambda _: None)


def test_the_verdict_follows_the_numbers_and_comparisons_have_names() -> None:
    told = verdict({"cases": cases()})
    assert told.startswith(
        "Yes: the CKA of the foretold kernel with the one averaged over training is, for each, MLP, sign 0.96"
    )
    low = {"mlp-sign": case(methods__forecast__average=[0.9, 0.9])}
    assert verdict({"cases": low}).startswith("Not closely: ")
    assert words_of("two_sided_0.3") == "forecast, TwoSided, λ = 0.3"
    assert words_of("epoch3") == "network after 3 epochs"
