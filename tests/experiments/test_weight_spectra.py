"""The study weight-spectra: the compared matrices are the ones named, and verdicts follow from them."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.registry import STUDIES
from adaptive_tangents.experiments.spectra import weights as weight_spectra
from adaptive_tangents.experiments.spectra.claims import weight_claims
from adaptive_tangents.experiments.spectra.weights import PROTOCOLS, Job, WeightSpectraConfig, run, sgd
from adaptive_tangents.experiments.study import Asked
from adaptive_tangents.nn.tangent_module import TangentModule
from adaptive_tangents.runs.record import RunResult
from adaptive_tangents.structures.spectral import TwoSided
from study_cases import SMALL as CONFIGS
from study_cases import made_up_data, made_up_digits, small_run

pytestmark = pytest.mark.xdist_group("weight-spectra")

SMALL = CONFIGS["weight-spectra"]
WIDTH, PIXELS = SMALL.width, 81


@pytest.fixture(scope="module", autouse=True)
def data() -> Iterator[None]:
    with made_up_data():
        yield


@pytest.fixture(scope="module")
def small() -> tuple[RunResult, dict[str, dict[str, torch.Tensor]]]:
    found = small_run("weight-spectra")
    return found.result, found.parts


# -------------------------------------------------------------------------------------------------------- measures


def _problem(seed: int) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    data = made_up_digits("")
    network = weight_spectra._network(SMALL, PIXELS, seed, "cpu")
    return network, data.train_images.flatten(1).float() / 255, data.train_labels


def _descend(parameters: torch.Tensor, gradient: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Direct SGD with momentum on the fixed subset, in the order of seed 1's batches."""
    generator, velocity = torch.Generator().manual_seed(2), torch.zeros_like(parameters)
    for _ in range(SMALL.epochs):
        for index in torch.randperm(SMALL.samples, generator=generator).split(SMALL.batch_size):
            velocity = SMALL.momentum * velocity + gradient(parameters, index)
            parameters = parameters - SMALL.learning_rate * velocity
    return parameters


def _svd(small: RunResult, kind: str, layer: str, matrix: torch.Tensor) -> None:
    found = small.arrays[f"{kind}.{layer}"][1]
    np.testing.assert_allclose(found, torch.linalg.svdvals(matrix.double()).numpy(), rtol=2e-3, atol=1e-5 * found.max())


def test_the_networks_matrices_are_its_change_by_sgd_weights_and_biases_side_by_side(small) -> None:
    network, x, labels = _problem(1)
    names = [name for name, _ in network.named_parameters()]
    start = torch.cat([p.detach().flatten() for p in network.parameters()])

    def gradient(vector: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        leaf = vector.clone().requires_grad_(True)
        shapes = [p.shape for p in network.parameters()]
        parts = [part.reshape(s) for part, s in zip(leaf.split([s.numel() for s in shapes]), shapes, strict=True)]
        outputs = torch.func.functional_call(network, dict(zip(names, parts, strict=True)), (x[index],))
        return torch.autograd.grad(nn.functional.cross_entropy(outputs, labels[index]), leaf)[0]

    moved = _descend(start, gradient) - start
    weight, bias = moved[: WIDTH * PIXELS].reshape(WIDTH, PIXELS), moved[WIDTH * PIXELS : WIDTH * (PIXELS + 1), None]
    _svd(small[0], "fixed subset.network", "layer1", torch.cat([weight, bias], 1))


def test_the_fixed_models_matrices_are_those_of_logistic_regression_in_dense_features(small) -> None:
    network, x, labels = _problem(1)
    features = tangent_features(network, x[: SMALL.samples])
    phi, start = features.dense(), network(x[: SMALL.samples]).detach()

    def gradient(beta: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        outputs = start[index] + phi[index] @ beta
        off = outputs.softmax(1) - nn.functional.one_hot(labels[index], 10)
        return torch.einsum("nc,ncp->p", off, phi[index]) / len(index)

    matrices = features.split(_descend(torch.zeros(features.p), gradient))
    for layer, matrix in matrices.items():
        _svd(small[0], "fixed subset.fixed", layer, matrix)


def test_the_exact_fixed_coefficients_are_the_least_ones_that_interpolate_one_hot_labels(small) -> None:
    network, x, labels = _problem(1)
    features = tangent_features(network.double(), x[: SMALL.samples].double())
    phi = features.dense().flatten(0, 1)
    wanted = nn.functional.one_hot(labels[: SMALL.samples], 10).double() - network(x[: SMALL.samples].double()).detach()
    beta = torch.linalg.lstsq(phi, wanted.reshape(-1, 1), driver="gelsd").solution[:, 0]
    for layer, matrix in features.split(beta).items():
        _svd(small[0], "exact.Fixed", layer, matrix)


def test_the_adaptive_b_is_what_the_output_sees_and_the_inner_coefficients_are_others() -> None:
    network, x, _ = _problem(0)
    module = TangentModule(network, TwoSided())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    found = weight_spectra._matrices(module, "adaptive", {})
    features, change = tangent_features(network, x[:6]), (module(x[:6]) - network(x[:6])).detach()
    torch.testing.assert_close(
        features.inner(found["adaptive"]), change, rtol=1e-3, atol=1e-3 * float(change.abs().max())
    )
    assert (features.inner(found["inner"]) - change).norm() > 0.1 * change.norm()


@pytest.mark.parametrize(("protocol", "beyond"), [(PROTOCOLS[0], False), (PROTOCOLS[1], True)])
def test_a_fixed_subset_is_the_first_n_and_a_fresh_one_is_drawn_from_all(protocol: str, beyond: bool) -> None:
    seen: list[torch.Tensor] = []

    class Model(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x[:, 0])
            return super().forward(x)

    x, labels = torch.arange(50.0)[:, None], torch.zeros(50, dtype=torch.int64)
    config = replace(SMALL, samples=10, batch_size=4, epochs=3)
    sgd(Model(1, 10), config, x, labels, Job(0, protocol, "network"), lambda _: None)
    assert [len(batch) for batch in seen] == [4, 4, 2] * 3
    epochs = [set(torch.cat(seen[k : k + 3]).tolist()) for k in (0, 3, 6)]
    assert all(len(epoch) == 10 for epoch in epochs)
    assert (max(max(epoch) for epoch in epochs) >= 10) == beyond
    assert (epochs[0] != epochs[1]) == beyond


def test_ranks_are_of_each_seeds_own_matrix_and_scores_of_test_digits(small) -> None:
    results, arrays = small[0].results, small[0].arrays
    assert len(small[1]) == SMALL.seeds * (2 * 3 + 2)
    values = arrays["fixed subset.fixed.layer2"]
    found = results["ranks"]["fixed subset"]["fixed"]["layer2"]
    assert found["stable"] == pytest.approx((values**2).sum(1) / values[:, 0] ** 2, rel=1e-6)
    assert found["leading"] == pytest.approx((values[:, :10] ** 2).sum(1) / (values**2).sum(1))
    assert results["layers"] == {"layer1": [WIDTH, PIXELS + 1], "layer2": [WIDTH, WIDTH + 1], "layer3": [10, WIDTH + 1]}
    assert all(0 <= error <= 1 for models in results["errors"].values() for of in models.values() for error in of)
    assert results["metrics"]["error.exact.Fixed"] == np.mean(results["errors"]["exact"]["Fixed"])


# ---------------------------------------------------------------------------------------------------------- claims


def _layers(*ranks: float, leading: float = 0.95) -> dict[str, dict[str, list[float]]]:
    return {
        f"layer{k}": {"stable": [r / 4], "entropy": [r], "participation": [r / 2], "leading": [leading]}
        for k, r in enumerate(ranks, start=1)
    }


def _ranks() -> dict[str, dict[str, dict[str, dict[str, list[float]]]]]:
    trained = {
        "network": _layers(20, 10, 4), "fixed": _layers(50, 40, 8, leading=0.5),
        "adaptive": _layers(25, 8, 5), "inner": _layers(45, 35, 7),
    }  # fmt: skip
    return {"fixed subset": trained, "exact": {"Fixed": _layers(60, 50, 9), "TwoSided_0.1": _layers(20, 9, 5)}}


@pytest.mark.parametrize(
    ("group", "kind", "ranks", "key", "verdict", "why"),
    [
        ("fixed subset", "network", _layers(20, 10, 4), "network", "holds", ""),
        ("fixed subset", "network", _layers(20, 50, 4), "network", "holds in part", "not in 1 of 3 layers by the stable"),
        ("fixed subset", "network", _layers(60, 50, 4), "network", "does not hold", "not in 2 of 3 layers"),
        ("fixed subset", "adaptive", _layers(25, 60, 5), "adaptive", "holds in part", "1 of 3 layers by the entropy rank"),
        ("fixed subset", "adaptive", _layers(45, 39, 5), "like", "does not hold", "2 of 3 layers"),
        ("fixed subset", "adaptive", _layers(10, 5, 3), "like", "holds", ""),
        ("fixed subset", "adaptive", _layers(50, 40, 5), "inner", "does not hold", ""),
        ("exact", "TwoSided_0.1", _layers(60, 9, 5), "TwoSided_0.1", "holds in part", "not in 1 of 3"),
    ],
)  # fmt: skip
def test_verdicts_count_layers_and_measures(group, kind, ranks, key, verdict, why) -> None:
    made = _ranks()
    made[group][kind] = ranks
    found = weight_claims(made)[f"{group}.{key}"]
    assert found["verdict"] == verdict
    assert why in found["why"]


@pytest.mark.parametrize(
    ("shares", "verdict", "why"),
    [
        ((0.95, 0.95, 0.5), "holds", ""),
        ((0.95, 0.8, 0.5), "holds in part", "the adaptive is below it in a layer"),
        ((0.8, 0.8, 0.5), "does not hold", "the network is below it in a layer, the adaptive is below it in a layer"),
        ((0.95, 0.95, 0.95), "does not hold", "the fixed model reaches it in every layer"),
    ],
)
def test_nearly_of_low_rank_means_ten_values_with_nine_tenths_of_the_squares(shares, verdict, why) -> None:
    made = _ranks()
    for kind, share in zip(("network", "adaptive", "fixed"), shares, strict=True):
        made["fixed subset"][kind] = _layers(20, 10, 4, leading=share)
    found = weight_claims(made)["fixed subset.leading"]
    assert (found["verdict"], found["why"]) == (verdict, why)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds, epochs and batch size must be positive, and samples, depth and width at least 2, got"),
        ({"depth": 1}, "seeds, epochs and batch size must be positive"),
        ({"samples": 1}, "seeds, epochs and batch size must be positive"),
        ({"epochs": 0}, "seeds, epochs and batch size must be positive"),
        ({"protocols": ("none",)}, "protocols are fixed subset, fresh subset each epoch, got"),
        ({"protocols": ()}, "protocols are fixed subset"),
    ],
)
def test_settings_that_measure_nothing_are_refused(changes, message) -> None:
    with pytest.raises(TangentError, match=f"weight-spectra: {message}"):
        WeightSpectraConfig(**changes)


def test_too_few_digits_and_training_that_diverges_are_errors() -> None:
    with pytest.raises(
        TangentError, match="weight-spectra: made up holds 120 training digits, fewer than samples = 500; lower samples"
    ):
        run(WeightSpectraConfig())
    with pytest.raises(TangentError, match="training the network model diverged; lower the learning rate"):
        run(replace(SMALL, learning_rate=1e30))


def test_what_is_asked_decides_sizes() -> None:
    quick, standard, full = (weight_spectra.configured(Asked(size=size)) for size in ("quick", "standard", "full"))
    assert quick.seeds == 1 < standard.seeds < full.seeds
    assert quick.samples < standard.samples == 500
    asked = weight_spectra.configured(Asked(seeds=7, samples=50, epochs=9, seed=3))
    assert (asked.seeds, asked.samples, asked.epochs, asked.seed) == (7, 50, 9, 3)


# --------------------------------------------------------------------------------------------------------- the page


def test_the_verdict_follows_the_claims(small) -> None:
    results = dict(small[0].results)
    results["claims"] = {key: {**found, "verdict": "holds"} for key, found in results["claims"].items()}
    page = STUDIES["weight-spectra"].page()
    told = page.context(results)["story"].verdict
    assert told.endswith("change: yes; the B of adaptive features trained by SGD: yes; their exact fit: yes.")
    results["claims"]["fixed subset.network"]["verdict"] = "does not hold"
    assert "change: no, yes; the B" in page.context(results)["story"].verdict
