"""The kernel-alignment experiment: its protocol, its numbers, and the published figures on real digits."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from adaptive_tangents.alignment import alignment
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments import training
from adaptive_tangents.experiments.kernel_alignment import run as kernel_alignment
from adaptive_tangents.experiments.kernel_alignment import setup as alignment_setup
from adaptive_tangents.experiments.kernel_alignment.run import KernelAlignmentConfig, config_dict, run
from adaptive_tangents.experiments.training import SGD, relu_network, train
from adaptive_tangents.runs.record import RunResult, flatten
from adaptive_tangents.runs.units import StoredUnits, Tensors, Units, read_checkpoints, write_checkpoint
from study_cases import explained_in_rounds

SMALL = KernelAlignmentConfig(
    width=24, training=SGD(epochs=4), kernel_samples=60, path_nodes=4, strengths=(10.0,), linearization_points=4
)


class Recorded(Units):
    def __init__(self, saved: dict[str, dict[str, torch.Tensor]]) -> None:
        self.saved = saved

    def put(self, name: str, tensors: Tensors) -> None:
        self.saved[name] = dict(tensors)


@pytest.fixture(scope="module")
def small() -> tuple[RunResult, dict[str, dict[str, torch.Tensor]], list[tuple[str, float]]]:
    saved: dict[str, dict[str, torch.Tensor]] = {}
    heard: list[tuple[str, float]] = []
    with explained_in_rounds(1):
        result = run(
            SMALL,
            units=Recorded(saved),
            progress=lambda stage, fraction: heard.append((stage, fraction)),
        )
    return result, saved, heard


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
    ratio = diagonal[teacher < 0.2].mean() / diagonal[teacher > 0.8].mean()
    assert ratio == pytest.approx(metrics["sign.diagonal_ratio"], rel=1e-5)


def test_samples_are_sorted_by_the_teacher_and_the_sign_target_is_its_sign(small) -> None:
    arrays = small[0].arrays
    teacher = arrays["sign.teacher"]
    assert (np.diff(teacher) >= 0).all()
    assert (arrays["sign.targets"] == np.where(teacher < 0, -1, 1)).all()
    assert (arrays["smooth.targets"] == teacher).all()


def test_change_is_what_training_added_to_the_network(small) -> None:
    result, saved, _ = small
    problem = kernel_alignment._problem(SMALL, "cpu")
    student = kernel_alignment._student(SMALL, problem, "cpu")
    x = problem.x[problem.chosen]
    outputs = [torch.func.functional_call(student, saved[f"sign.{kind}"], (x,)) for kind in ("start", "end")]
    change = (outputs[1] - outputs[0]).detach()[:, 0].numpy()
    np.testing.assert_allclose(result.arrays["sign.change"], change, rtol=1e-5, atol=1e-6)


def test_linearisation_error_is_that_of_the_networks_directional_derivative(small) -> None:
    result, saved, _ = small
    problem = kernel_alignment._problem(SMALL, "cpu")
    student, x = kernel_alignment._student(SMALL, problem, "cpu"), problem.x[problem.chosen]
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


def test_progress_never_goes_back_and_ends_at_the_end(small) -> None:
    fractions = [fraction for _, fraction in small[2]]
    assert fractions == sorted(fractions)
    assert 0.9 < fractions[-1] <= 1.0


def test_same_seed_gives_the_same_numbers_and_another_seed_does_not() -> None:
    tiny = replace(SMALL, training=SGD(epochs=1), path_nodes=2, linearization_points=2)

    def numbers(config: KernelAlignmentConfig) -> dict[str, float]:
        metrics = run(config).results["metrics"]
        return {name: value for name, value in metrics.items() if not name.endswith("seconds")}

    with explained_in_rounds(1):
        first = numbers(tiny)
        assert numbers(tiny) == first
        assert numbers(replace(tiny, seed=1)) != first


def test_resuming_repeats_no_training_and_gives_the_same_numbers(small, monkeypatch, tmp_path) -> None:
    settings = config_dict(SMALL)
    units = StoredUnits(tmp_path, settings)
    for name, tensors in small[1].items():
        units.put(name, tensors)

    def refuse(*arguments: object, **keywords: object) -> list[float]:
        raise AssertionError("training was repeated")

    monkeypatch.setattr(alignment_setup, "train", refuse)
    with explained_in_rounds(1):
        again = run(SMALL, units=StoredUnits(tmp_path, settings, resume=True)).results["metrics"]
    before = small[0].results["metrics"]
    assert {k: v for k, v in again.items() if not k.endswith("seconds")} == {
        k: v for k, v in before.items() if not k.endswith("seconds")
    }


def test_resuming_refuses_checkpoints_of_other_settings(small, tmp_path) -> None:
    write_checkpoint(tmp_path, "sign.end", small[1]["sign.end"], config_dict(replace(SMALL, seed=5)))
    with pytest.raises(
        TangentError, match=r"resume: .*sign.end.safetensors was made with other settings; run with the same"
    ):
        read_checkpoints(tmp_path, config_dict(SMALL))


def test_resuming_refuses_a_damaged_checkpoint(small, tmp_path) -> None:
    path = write_checkpoint(tmp_path, "sign.end", small[1]["sign.end"], config_dict(SMALL))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TangentError, match=r"resume: .* cannot be read .*; delete it, and its training is repeated"):
        read_checkpoints(tmp_path, config_dict(SMALL))


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(TangentError, match=r"checkpoint: .* cannot be written \(full\); choose another folder"):
        write_checkpoint(tmp_path, "sign.end", {"w": torch.zeros(2)}, {})
    assert list((tmp_path / "checkpoints").iterdir()) == []


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
    problem = kernel_alignment._problem(SMALL, "cpu")
    generator = torch.Generator().manual_seed(SMALL.seed)
    teacher = relu_network((784, 24, 24), ("a", "b"), bias=False, generator=generator)
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
        TangentError, match=r"mnist5k holds 800 training digits \(2, 3\), fewer than kernel_samples = 900"
    ):
        run(replace(SMALL, kernel_samples=900))


def test_too_few_kernel_samples_are_refused() -> None:
    with pytest.raises(TangentError, match="kernel_samples is at least 16, got 4"):
        KernelAlignmentConfig(kernel_samples=4)


def test_settings_that_are_not_positive_are_refused() -> None:
    with pytest.raises(TangentError, match="epochs, batch size, width and path nodes are positive"):
        KernelAlignmentConfig(training=SGD(epochs=0))


def test_diverging_training_is_an_error() -> None:
    with pytest.raises(TangentError, match="training on the smooth target diverged; lower the learning rate"):
        run(replace(SMALL, training=training.SGD(epochs=20, learning_rate=1e6)))


@pytest.fixture(scope="module")
def published() -> dict[str, float]:
    with explained_in_rounds(4):
        return run(KernelAlignmentConfig(kernel_samples=250, path_nodes=24, strengths=(100.0,))).results["metrics"]


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
