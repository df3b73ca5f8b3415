"""The networks whose training is foretold: each with its data, its training, and its course."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptive_tangents.datasets.images import load_images
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.feature_change.networks import Training, network
from adaptive_tangents.experiments.forecast import NAME
from adaptive_tangents.experiments.forecast.texts import encoder
from adaptive_tangents.experiments.hard_targets.run import hard_target
from adaptive_tangents.experiments.kernel_alignment.setup import TeacherTask, problem, snapshot, student
from adaptive_tangents.experiments.training import train
from adaptive_tangents.runs.units import Units

Kind = Literal["mlp", "cnn", "transformer", "encoder"]
State = Mapping[str, Tensor]
# The network's own course is kept after these epochs.
EPOCHS = (1, 3, 10, 30)


@dataclass(frozen=True)
class Case:
    """A network, what it learns and how; ``words`` names it, ``varied`` says what differs from the main case.

    ``foretold`` is the key of the case with the same forecasts, if only the training differs.
    """

    key: str
    words: str
    kind: Kind
    target: str
    width: int
    training: Training
    varied: str = ""
    foretold: str = ""


@dataclass(frozen=True)
class Source:
    """Where digits and images come from, and how many are used."""

    digits: str
    images: str
    data_dir: str | None
    most_digits: int
    samples: int
    classes: int
    kernel_samples: int


@dataclass(frozen=True, eq=False)
class Task:
    """A network at θ₀ with its samples; ``chosen`` are those of the kernels, in the order of ``told``."""

    model: nn.Module
    x: Tensor
    y: Float[Tensor, "n c"]
    x_test: Tensor
    y_test: Float[Tensor, "m c"]
    chosen: Tensor
    told: Float[Tensor, " k"]
    data: dict[str, Any]

    def whole(self, state: State) -> dict[str, Tensor]:
        """A full state dict of what may be only the trained parameters."""
        return {name: value.detach() for name, value in self.model.state_dict().items()} | dict(state)


def posed(case: Case, source: Source, seed: int, device: str) -> Task:
    """The case's task for one seed.

    Raises TangentError if the data are not available or too few.
    """
    make = {"mlp": _of_teacher, "encoder": _of_texts}.get(case.kind, _of_images)
    return make(case, source, seed, device)


def _of_teacher(case: Case, source: Source, seed: int, device: str) -> Task:
    """Digits 2 and 3 with a teacher's targets, as in kernel-alignment."""
    folder = source.data_dir if source.digits == "mnist" else None
    asked = TeacherTask(data=source.digits, data_dir=folder, seed=seed, kernel_samples=source.kernel_samples)
    found = problem(asked, device)
    model = student(replace(asked, width=case.width), found, device)
    targets, tests = found.targets, found.test_targets
    if case.target.startswith("tau"):
        temperature = float(case.target.removeprefix("tau"))
        targets, tests = ({case.target: hard_target(each["smooth"], temperature)} for each in (targets, tests))
    others = torch.ones(len(found.x), dtype=torch.bool, device=found.x.device)
    others[found.chosen] = False
    kept = torch.cat([found.chosen, others.nonzero()[:, 0]])[: source.most_digits]
    chosen = torch.arange(min(len(found.chosen), len(kept)), device=found.x.device)
    return Task(
        model, found.x[kept], targets[case.target][kept], found.x_test, tests[case.target], chosen,
        found.targets["smooth"][kept[chosen], 0], found.data | {"train": len(kept)},
    )  # fmt: skip


def _of_images(case: Case, source: Source, seed: int, device: str) -> Task:
    """Some classes of images, one output a class."""
    images = load_images(source.images, data_dir=source.data_dir if source.images != "mnist5k" else None)
    generator = torch.Generator().manual_seed(seed)

    def some(x: Tensor, y: Tensor, most: int) -> tuple[Tensor, Tensor]:
        index = (y < source.classes).nonzero()[:, 0]
        index = index[torch.randperm(len(index), generator=generator)[:most]]
        return x[index].float().reshape(len(index), -1, *x.shape[-2:]) / 255, y[index]

    x, labels = some(images.train_images, images.train_labels, source.samples)
    x_test, test_labels = some(images.test_images, images.test_labels, 2 * source.samples)
    if len(x) < source.samples:
        raise TangentError(
            f"{NAME}: {images.name} holds {len(x)} training images of {source.classes} classes, fewer than samples = "
            f"{source.samples}; lower it or use more data"
        )
    mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    x, x_test = (((v - mean) / deviation).to(device) for v in (x, x_test))
    y, y_test = (nn.functional.one_hot(v, source.classes).float().to(device) for v in (labels, test_labels))
    shape = (x.shape[1], x.shape[2], x.shape[3])
    model = network(case.kind, shape, width=case.width, seed=seed + 1, outputs=source.classes).to(device)
    chosen = torch.arange(min(len(x), source.kernel_samples))
    chosen = chosen[labels[chosen].argsort(stable=True)]
    data = {"name": images.name, "source": images.source, "train": len(x), "test": len(x_test)}
    return Task(model, x, y, x_test, y_test, chosen.to(device), labels[chosen].float(), data)


def _of_texts(case: Case, source: Source, seed: int, device: str) -> Task:
    """Sentences on two subjects; the seed draws those to train on."""
    model, ids, subjects = encoder(seed + 1)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    cut = len(order) * 2 // 3
    first, rest = order[:cut], order[cut:]
    chosen = subjects[first, 0].argsort(stable=True)
    data = {"name": "sentences", "source": "Sentences on two subjects.", "train": len(first), "test": len(rest)}
    x, y, x_test, y_test = (v.to(device) for v in (ids[first], subjects[first], ids[rest], subjects[rest]))
    return Task(model.to(device), x, y, x_test, y_test, chosen.to(device), subjects[first][chosen, 0], data)


def course(
    case: Case, task: Task, seed: int, units: Units, progress: Callable[[float], None]
) -> tuple[dict[str, dict[str, Tensor]], list[float], float]:
    """The trained parameters after 1, 3, 10, 30 epochs and at the end, every epoch's loss, and the processor's seconds.

    It is a part of the run.

    Raises TangentError if training diverges.
    """
    moving = [name for name, parameter in task.model.named_parameters() if parameter.requires_grad]

    def make() -> dict[str, Tensor]:
        start, made, began = snapshot(task.model), dict[str, Tensor](), time.process_time()

        def passed(fraction: float) -> None:
            done = round(fraction * case.training.epochs)
            stages = [f"epoch{done}"] * (done in EPOCHS) + ["end"] * (done == case.training.epochs)
            state = task.model.state_dict()
            made.update({f"{stage}:{name}": state[name].detach().clone() for stage in stages for name in moving})
            progress(fraction)

        generator = torch.Generator().manual_seed(seed + 2)
        losses = train(task.model, task.x, task.y, settings=case.training, generator=generator, progress=passed)
        task.model.load_state_dict(start)
        if not losses[-1] < float("inf"):
            raise TangentError(f"{NAME}: training the {case.words} diverged; lower its learning rate")
        seconds = torch.tensor(time.process_time() - began, dtype=torch.float64)
        return made | {"losses": torch.tensor(losses, dtype=torch.float64), "seconds": seconds}

    kept = units(f"{case.key}.seed{seed}.course", make)
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in kept.items():
        stage, _, name = key.partition(":")
        if name:
            states.setdefault(stage, {})[name] = value.to(task.y.device)
    return states, kept["losses"].tolist(), float(kept["seconds"])
