"""The problem of kernel-alignment, shared with other studies: data, targets, student, training."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptive_tangents.datasets.images import Dataset, load_digits, normalize_digits
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.kernel_alignment.measures import sign
from adaptive_tangents.experiments.study import Asked
from adaptive_tangents.experiments.training import SGD, relu_network, train
from adaptive_tangents.runs.record import settings
from adaptive_tangents.runs.units import Units

BLOCKS = ("hidden1", "hidden2", "readout")


@dataclass(frozen=True)
class TeacherTask:
    """Settings of students trained on a teacher's targets. The defaults are the published protocol and the data's sizes."""

    experiment: ClassVar[str] = "kernel-alignment"

    data: str = "mnist5k"
    data_dir: str | None = None
    seed: int = 0
    seeds: int = 1
    digits: tuple[int, int] = (2, 3)
    width: int = 256
    training: SGD = field(default_factory=SGD)
    kernel_samples: int = 500
    path_nodes: int = 50

    def __post_init__(self) -> None:
        name = self.experiment
        if self.kernel_samples < 16:
            raise TangentError(f"{name}: kernel_samples must be at least 16, got {self.kernel_samples}")
        if self.seeds < 1:
            raise TangentError(f"{name}: seeds must be at least 1, got {self.seeds}")
        if self.training.epochs < 1 or self.training.batch_size < 1 or self.width < 1 or self.path_nodes < 1:
            raise TangentError(f"{name}: epochs, batch size, width and path nodes must be positive, got {self}")


def asked_fields(asked: Asked, *, standard: int, full: int) -> dict[str, Any]:
    """The fields of a `TeacherTask` for what was asked: one seed for a quick run, else ``standard`` or ``full``."""
    quick = asked.size == "quick"
    epochs = (asked.epochs or 20) if quick else asked.epochs
    return {
        **asked.source,
        "seeds": asked.seeds or asked.sized(standard, quick=1, full=full),
        "training": SGD() if epochs is None else SGD(epochs=epochs),
        "kernel_samples": 100 if quick else asked.samples or TeacherTask.kernel_samples,
    }


def config_dict(config: TeacherTask) -> dict[str, Any]:
    """The settings as plain values, with those of training at the same level."""
    plain = settings(config)
    return plain | {f"training.{key}": value for key, value in plain.pop("training").items()}


@dataclass(frozen=True)
class Problem:
    """Inputs, both targets, and the training digits used for kernels, sorted by the teacher's output."""

    x: Float[Tensor, "n d"]
    x_test: Float[Tensor, "m d"]
    targets: dict[str, Float[Tensor, "n 1"]]
    test_targets: dict[str, Float[Tensor, "m 1"]]
    chosen: Tensor
    images: Tensor
    data: dict[str, Any]


def problem(config: TeacherTask, device: str) -> Problem:
    """The digits, the teacher for the config's seed, and its targets.

    Raises TangentError if the data are not available or hold fewer digits than ``kernel_samples``.
    """
    digits = load_digits(config.data, data_dir=config.data_dir, classes=config.digits)
    x, x_test = (normalize_digits(images).to(device) for images in (digits.train_images, digits.test_images))
    n = len(x)
    if n < config.kernel_samples:
        raise TangentError(
            f"{config.experiment}: {digits.name} holds {n} training digits {config.digits}, fewer than kernel_samples = "
            f"{config.kernel_samples}; lower kernel_samples or use more data"
        )
    generator = torch.Generator().manual_seed(config.seed)
    teacher = relu_network(
        (x.shape[1], config.width, config.width), ("hidden1", "hidden2"), bias=False, generator=generator
    )
    teacher.append(nn.ReLU()).to(device)
    signs = torch.where(digits.train_labels == config.digits[0], -1.0, 1.0).to(device)[:, None]
    with torch.no_grad():
        features, test_features = teacher(x), teacher(x_test)
    readout = torch.linalg.lstsq(features.double().cpu(), signs.double().cpu(), driver="gelsd").solution.to(device)
    smooth, smooth_test = ((f.double() @ readout).to(x.dtype) for f in (features, test_features))
    chosen = torch.randperm(n, generator=generator)[: config.kernel_samples].to(device)
    chosen = chosen[smooth[chosen, 0].argsort()]
    return Problem(
        x,
        x_test,
        {"smooth": smooth, "sign": sign(smooth)},
        {"smooth": smooth_test, "sign": sign(smooth_test)},
        chosen,
        digits.train_images[chosen.cpu()],
        _describe(digits, config),
    )


def _describe(digits: Dataset, config: TeacherTask) -> dict[str, Any]:
    return {
        "name": digits.name,
        "source": digits.source,
        "train": len(digits.train_images),
        "test": len(digits.test_images),
        "kernel_samples": config.kernel_samples,
    }


def student(config: TeacherTask, problem: Problem, device: str) -> nn.Sequential:
    """The student for the config's seed, at its initial weights."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    widths = (problem.x.shape[1], config.width, config.width, 1)
    return relu_network(widths, BLOCKS, bias=True, generator=generator).to(device)


def trained(
    config: TeacherTask,
    name: str,
    target: Float[Tensor, "n 1"],
    problem: Problem,
    units: Units,
    progress: Callable[[float], None],
    device: str,
    *,
    prefix: str = "",
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """The student's weights before and after training on the target ``name``, and the loss of every epoch.

    Checkpoints are parts of the run called ``prefix`` + ``name``; existing ones are reused.
    Raises TangentError if training diverges.
    """
    model = student(config, problem, device)
    start = snapshot(model)
    earlier, course = units.get(f"{prefix}{name}.end"), units.get(f"{prefix}{name}.training")
    if earlier is not None and course is not None:
        return start, {key: value.to(device) for key, value in earlier.items()}, course["loss"].tolist()
    generator = torch.Generator().manual_seed(config.seed + 2)
    losses = train(model, problem.x, target, settings=config.training, generator=generator, progress=progress)
    if not np.isfinite(losses[-1]):
        raise TangentError(f"{config.experiment}: training on the {name} target diverged; lower the learning rate")
    end = snapshot(model)
    for kind, checkpoint in (
        ("start", start),
        ("end", end),
        ("training", {"loss": torch.tensor(losses, dtype=torch.float64)}),
    ):
        units.put(f"{prefix}{name}.{kind}", checkpoint)
    return start, end, losses


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}
