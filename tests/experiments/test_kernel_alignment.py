"""The kernel-alignment experiment: its protocol, its numbers, and the published figures on real digits."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments import training
from adaptive_tangents.experiments.kernel_alignment import setup as alignment_setup
from adaptive_tangents.experiments.kernel_alignment.run import KernelAlignmentConfig, config_dict, run
from adaptive_tangents.experiments.training import SGD, relu_network, train
from adaptive_tangents.measures.alignment import alignment
from adaptive_tangents.runs.record import RunResult, flatten
from study_cases import SMALL as CONFIGS
from study_cases import made_up_data, small_run

pytestmark = pytest.mark.xdist_group("kernel-alignment")

SMALL = CONFIGS["kernel-alignment"]


@pytest.fixture(scope="module", autouse=True)
def data() -> Iterator[None]:
    with made_up_data():
        yield


@pytest.fixture(scope="module")
def small() -> tuple[RunResult, dict[str, dict[str, torch.Tensor]]]:
    found = small_run("kernel-alignment")
    return found.result, found.parts


def test_metrics_name_every_number_of_the_targets(small) -> None:
    metrics = small[0].results["metrics"]
    for target in ("smooth", "sign"):
        for kind in ("initial", "average", "final"):
            assert -1 <= metrics[f"{target}.alignment.{kind}"] <= 1
        for name in ("path_error_db", "diagonal_ratio", "diagonal.near", "diagonal.far", "network.test_error"):
            assert math.isfinite(metrics[f"{target}.{name}"])
        for model in ("fixed", "full_10", "two_sided_10"):
            assert math.isfinite(metrics[f"{target}.model.{model}.test_mse"])
        for structure in ("layer_scale", "left", "right", "two_sided", "full"):
            assert metrics[f"{target}.explain.{structure}.total"] <= 1
    assert metrics == flatten(small[0].results["targets"])


def test_alignments_follow_from_the_kernels_beside_them(small) -> None:
    results, arrays = small[0].results, small[0].arrays
    for target in ("smooth", "sign"):
        for kind in ("initial", "average", "final"):
            again = alignment(arrays[f"{target}.kernel.{kind}"], arrays[f"{target}.change"])
            assert again == pytest.approx(results["metrics"][f"{target}.alignment.{kind}"], rel=1e-5)


def test_diagonal_ratio_compares_samples_near_the_boundary_with_those_far_from_it(small) -> None:
    arrays, metrics = small[0].arrays, small[0].results["metrics"]
    diagonal, teacher = np.diag(arrays["sign.kernel.average"]), np.abs(arrays["sign.teacher"])
    ratio = diagonal[teacher < SMALL.near].mean() / diagonal[teacher > SMALL.far].mean()
    assert ratio == pytest.approx(metrics["sign.diagonal_ratio"], rel=1e-5)


def test_samples_are_sorted_by_the_teacher_and_the_sign_target_is_its_sign(small) -> None:
    arrays = small[0].arrays
    teacher = arrays["sign.teacher"]
    assert (np.diff(teacher) >= 0).all()
    assert (arrays["sign.targets"] == np.where(teacher < 0, -1, 1)).all()
    assert (arrays["smooth.targets"] == teacher).all()


def test_change_is_what_training_added_to_the_network(small) -> None:
    result, saved = small
    problem = alignment_setup.problem(SMALL, "cpu")
    student = alignment_setup.student(SMALL, problem, "cpu")
    x = problem.x[problem.chosen]
    outputs = [torch.func.functional_call(student, saved[f"sign.{kind}"], (x,)) for kind in ("start", "end")]
    change = (outputs[1] - outputs[0]).detach()[:, 0].numpy()
    np.testing.assert_allclose(result.arrays["sign.change"], change, rtol=1e-5, atol=1e-6)


def test_linearization_error_is_that_of_the_networks_directional_derivative(small) -> None:
    result, saved = small
    problem = alignment_setup.problem(SMALL, "cpu")
    student, x = alignment_setup.student(SMALL, problem, "cpu"), problem.x[problem.chosen]
    start, end = saved["sign.start"], saved["sign.end"]
    delta = {key: end[key] - start[key] for key in start}

    def outputs(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(student, parameters, (x,))

    first, derivative = torch.func.jvp(outputs, (start,), (delta,))
    positions = result.arrays["sign.linearization.positions"]
    expected = [0.0]
    for s in positions[1:]:
        moved = outputs({key: start[key] + float(s) * delta[key] for key in start}) - first
        expected.append(float((moved - float(s) * derivative).norm() / moved.norm()))
    np.testing.assert_allclose(result.arrays["sign.linearization.error"], expected, rtol=1e-3, atol=1e-6)


def test_exact_models_interpolate_with_certificates(small) -> None:
    for target in ("smooth", "sign"):
        models = small[0].results["targets"][target]["model"]
        assert all(model["converged"] and model["feasibility"] < 1e-8 for model in models.values())
        assert models["full_10"]["test_mse"] == pytest.approx(models["fixed"]["test_mse"], rel=1e-6)
        assert models["full_10"]["alignment"] > models["fixed"]["alignment"]
        assert models["fixed"]["objective"] >= models["two_sided_10"]["objective"]


def test_where_data_lie_is_no_setting_of_a_run() -> None:
    assert config_dict(replace(SMALL, data_dir="here")) == config_dict(replace(SMALL, data_dir="there"))


def test_network_has_weights_of_variance_two_over_fan_in_and_zero_biases() -> None:
    generator = torch.Generator().manual_seed(0)
    model = relu_network((784, 256, 256, 1), ("a", "b", "c"), bias=True, generator=generator)
    assert [type(module).__name__ for module in model] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert float(model.a.weight.var()) == pytest.approx(2 / 784, rel=0.02)
    assert float(model.c.weight.var()) == pytest.approx(2 / 256, rel=0.3)
    assert not any(bool(module.bias.any()) for module in model if isinstance(module, nn.Linear))


def test_teacher_has_no_biases_and_fits_the_labels_by_least_squares() -> None:
    problem = alignment_setup.problem(SMALL, "cpu")
    generator = torch.Generator().manual_seed(SMALL.seed)
    teacher = relu_network((problem.x.shape[1], 12, 12), ("a", "b"), bias=False, generator=generator)
    with torch.no_grad():
        features = torch.relu(teacher(problem.x)).double().numpy()
    digits = alignment_setup.load_digits("mnist5k", classes=(2, 3))
    labels = np.where(digits.train_labels.numpy() == 2, -1.0, 1.0)
    fitted = features @ np.linalg.lstsq(features, labels, rcond=None)[0]
    np.testing.assert_allclose(problem.targets["smooth"][:, 0].numpy(), fitted, atol=1e-4)


def test_training_follows_the_protocol(monkeypatch) -> None:
    rates: list[float] = []
    sizes: list[int] = []
    step = torch.optim.SGD.step

    def spy(self: torch.optim.SGD, *arguments: object) -> object:
        group = self.param_groups[0]
        assert group["momentum"] == 0.9
        rates.append(group["lr"])
        return step(self)

    class Model(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes.append(len(x))
            return super().forward(x)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    x = torch.randn(250, 3, generator=torch.Generator().manual_seed(0))
    losses = train(
        Model(3, 1),
        x,
        x[:, :1],
        settings=SGD(epochs=4),
        generator=torch.Generator().manual_seed(0),
        progress=lambda _: None,
    )
    assert sizes == [100, 100, 50] * 4
    expected = [0.1 * (1 + math.cos(math.pi * k / 12)) / 2 for k in range(12)]
    assert rates == pytest.approx(expected, rel=1e-6)
    assert losses[-1] < losses[0]


def test_too_few_digits_are_named() -> None:
    with pytest.raises(
        TangentError, match=r"made up holds 120 training digits \(2, 3\), fewer than kernel_samples = 900"
    ):
        run(replace(SMALL, kernel_samples=900))


def test_too_few_kernel_samples_are_refused() -> None:
    with pytest.raises(TangentError, match="kernel_samples must be at least 16, got 4"):
        KernelAlignmentConfig(kernel_samples=4)


def test_settings_that_are_not_positive_are_refused() -> None:
    with pytest.raises(TangentError, match="epochs, batch size, width and path nodes must be positive"):
        KernelAlignmentConfig(training=SGD(epochs=0))


def test_diverging_training_is_an_error() -> None:
    with pytest.raises(TangentError, match="training on the smooth target diverged; lower the learning rate"):
        run(replace(SMALL, training=training.SGD(epochs=20, learning_rate=1e6)))
