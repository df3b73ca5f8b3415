"""Run an inspection: from a model, checkpoints and data to the numbers and arrays of the report."""

import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_tangents.capture.batches import tensors
from adaptive_tangents.capture.complex_parameters import as_real
from adaptive_tangents.capture.path_average import AverageFeatures
from adaptive_tangents.checks import listed
from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.inspection import measures
from adaptive_tangents.inspection.checkpoint_order import doubted
from adaptive_tangents.inspection.measures import Explained, Models, defined, singular_values, spectrum, total
from adaptive_tangents.inspection.outputs import PREFIX, Reduction
from adaptive_tangents.inspection.problem import InspectConfig, Problem, pose
from adaptive_tangents.measures.alignment import alignment, cka
from adaptive_tangents.runs.record import Clock, RunResult, flatten, versions
from adaptive_tangents.runs.user_files import Data
from adaptive_tangents.runtime.progress import Progress, silent

NAME = "inspect"
_SHOWN = 24
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class _Measured:
    """What was measured at the start, along the path and at the end: kernels by stage and block, their sums, and fits.

    After an interruption, what was not finished is missing: kernels of a stage, the path's identity, fits.
    """

    kernels: dict[str, dict[str, Tensor]]
    wholes: dict[str, Tensor]
    identity: dict[str, float | None]
    explained: Explained
    models: Models
    changes: dict[str, Tensor]
    weights: dict[str, Tensor]


class _Stages:
    """Stages one after the other; after an interruption, the others are not begun, and ``missing`` names them all."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.missing: list[str] = []

    def made(self, name: str, work: float, make: Callable[[Callable[[float], None]], _Made]) -> _Made | None:
        """What a stage makes, or None if it was interrupted."""
        if not self.missing:
            with suppress(KeyboardInterrupt), self.clock.stage(name, work) as tick:
                return make(tick)
        self.missing.append(name)
        return None


# Expected work of each stage, relative to the features of one state.
_WORK = {"start": 1.0, "end": 1.0, "average": 7.0, "explain": 2.0, "models": 1.0, "checkpoint": 1.0}
_SAID = {"average": "the average over the path", "explain": "structured transforms", "models": "the exact models"}


def run(
    model: nn.Module,
    states: Mapping[str, Mapping[str, Tensor]],
    data: Data,
    config: InspectConfig | None = None,
    *,
    progress: Progress = silent,
) -> RunResult:
    """Measure the change between the first and the last of a network's states, which are named and in order of training.

    ``progress`` is called with the stage and the fraction of all work done. A KeyboardInterrupt once the kernels of start and
    end are made gives the results so far, and ``results["interrupted"]`` names what is missing. Raises TangentError if
    data, states and model do not fit together, or if nothing changed; warns if the network got worse.

    >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> start = {name: value.clone() for name, value in model.state_dict().items()}
    >>> end = {name: 1.5 * value for name, value in start.items()}
    >>> found = run(model, {"start": start, "end": end}, Data(torch.randn(12, 3)))
    >>> found.results["growth"]["final"] > 1
    True
    """
    config = InspectConfig() if config is None else config
    if len(states) < 2:
        raise TangentError(f"inspect: at least two checkpoints are needed, start and end; got {len(states)}")
    model = model.eval()
    expected = sum(_WORK.values()) + _WORK["checkpoint"] * (len(states) - 3)
    clock, cpu = Clock(progress, 0.5 + expected), time.process_time()
    with clock.stage("outputs", 0.5):
        problem = pose(model, states, data, config)
    performances = [_performance(outputs, problem.data) for outputs in problem.outputs]
    doubt = disagreement(list(states), performances)
    if doubt is not None:
        problem.limits.append(doubted(doubt))
        warnings.warn(f"inspect: {doubt}", TangentWarning, stacklevel=2)
    stages = _Stages(clock)
    measured = _measure(problem, states, config, stages)
    trajectory = _trajectory(problem, states, measured.wholes, performances, stages)
    if stages.missing:
        problem.limits.insert(
            0, f"The run was interrupted, so these are missing: {listed(map(_said, stages.missing))}."
        )
    results = {
        "experiment": NAME,
        "config": asdict(config),
        "seed": config.seed,
        "versions": versions(),
        "device": str(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
        **_told(model, data, config, problem, measured, trajectory),
        "interrupted": [_said(name) for name in stages.missing],
        "wall_seconds": clock.seconds | {"total": time.perf_counter() - clock.started},
        "cpu_seconds": time.process_time() - cpu,
    }
    return RunResult(results, _arrays(problem, measured))


def _said(stage: str) -> str:
    return _SAID.get(stage, stage)


def disagreement(names: list[str], performances: list[dict[str, float] | None]) -> str | None:
    """A sentence if the network got worse in the order given, by accuracy or error on the measured samples."""
    told = [next(iter(performance.items())) for performance in performances if performance is not None]
    if len(told) < 2 or len(told) != len(names):
        return None
    kind, sign = told[0][0], 1 if told[0][0] == "accuracy" else -1
    first, *_, last = (value for _, value in told)
    best = max(range(len(told)), key=lambda k: sign * told[k][1])
    gained, most = sign * (last - first), sign * (told[best][1] - first)
    if gained >= 0 and (most == 0 or gained >= most / 2):
        return None
    if gained < 0:
        moved = f"{kind} {'falls' if sign > 0 else 'rises'} from {first:.3g} at {names[0]} to {last:.3g} at {names[-1]}"
    else:
        moved = f"{kind} is {last:.3g} at {names[-1]}, but {told[best][1]:.3g} at {names[best]} before it"
    return (
        f"{moved}; check the order of the checkpoints: if it is wrong, the findings say the opposite of what happened"
    )


def _measure(
    problem: Problem, states: Mapping[str, Mapping[str, Tensor]], config: InspectConfig, stages: _Stages
) -> _Measured:
    """Measure at the start, at the end and along the path; features are freed as soon as they are used."""
    first, *_, last = states
    start, end = (problem.reduction.state(states[name]) for name in (first, last))
    tangents = problem.tangents
    with stages.clock.stage("start", _WORK["start"]) as tick:
        initial = tangents.at(start, tick)
        kernels = {"initial": _by_block(initial)}
    with stages.clock.stage("end", _WORK["end"]) as tick:
        final = _by_block(tangents.at(end, tick))
    average = stages.made("average", _WORK["average"], lambda tick: tangents.average(start, end, problem.nodes, tick))
    if average is not None:
        kernels["average"] = _by_block(average)
    kernels["final"] = final
    explained = stages.made(
        "explain", _WORK["explain"],
        lambda tick: measures.explain_blocks(initial, average, config.explain_operations, tick),  # type: ignore[arg-type]
    )  # fmt: skip
    identity = _identity(problem, average)
    del average
    wholes = {stage: total(parts) for stage, parts in kernels.items()}
    goal = defined(alignment, wholes.get("average"), problem.change)
    models = stages.made(
        "models", _WORK["models"],
        lambda tick: measures.fit_models(initial, problem.change, goal, config.fit_operations, tick),
    )  # fmt: skip
    before, after = (_vector(initial, state) for state in (start, end))
    return _Measured(
        kernels, wholes, identity, explained or measures.nothing_explained(), models or Models({}, {}, None),
        initial.split(after - before), initial.split(before),
    )  # fmt: skip


def _by_block(feats: TangentFeatures) -> dict[str, Tensor]:
    return feats.kernel(outputs="trace", by_block=True)


def _trajectory(
    problem: Problem, states: Mapping[str, Mapping[str, Tensor]], wholes: Mapping[str, Tensor],
    performances: list[dict[str, float] | None], stages: _Stages,
) -> list[dict[str, Any]]:  # fmt: skip
    """Compare every checkpoint's kernel with those of start and end."""
    first, *_, last = states
    ends: dict[str, Tensor | None] = {first: wholes["initial"], last: wholes["final"]}
    found = []

    def kernel_at(name: str, tick: Callable[[float], None]) -> Tensor:
        feats = problem.tangents.at(problem.reduction.state(states[name]), tick)
        return feats.kernel(outputs="trace").double()

    for name, performance in zip(states, performances, strict=True):
        kernel = ends.get(name)
        if kernel is None:
            kernel = stages.made(f"checkpoint {name}", _WORK["checkpoint"], partial(kernel_at, name))
        if kernel is not None:
            found.append(_checkpoint(name, kernel, wholes, problem, performance))
    return found


def _told(
    model: nn.Module, data: Data, config: InspectConfig, problem: Problem, measured: _Measured,
    trajectory: list[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """The numbers of the page."""
    reduction, explained, models = problem.reduction, measured.explained, measured.models
    blocks = _block_numbers(problem, measured)
    grown = measured.wholes.get("average", measured.wholes["final"])
    growth = grown.diagonal() / measured.wholes["initial"].diagonal().clamp_min(1e-300)
    told = {
        "network": _network(model, blocks),
        "data": _described(data, problem),
        "outputs": {
            "kind": reduction.kind,
            "names": list(reduction.names),
            "sentence": reduction.sentence,
            "share": reduction.share,
            "labels": problem.target_words,
            "weights": _weights(reduction, data.classes),
        },
        "performance": {k: _performance(problem.outputs[i], problem.data) for k, i in (("start", 0), ("end", -1))},
        **measures.kernel_numbers(measured.wholes, problem.change, problem.target),
        "path": measured.identity,
        "blocks": {_plain(name, reduction): numbers for name, numbers in blocks.items()},
        "explain": {
            key: {
                "total": r2["total"],
                "layer_scale_there": r2.get("layer_scale"),
                "left_out": [_plain(name, reduction) for name in explained.left_out[key]],
            }
            for key, r2 in explained.r2.items()
        },
        "models": {
            key: {k: v for k, v in numbers.items() if k != "effective_rank"} for key, numbers in models.numbers.items()
        },
        "trajectory": trajectory,
        "sample_growth": {"median": float(growth.median()), "largest": float(growth.max()), "smallest": float(growth.min())},
        "limits": problem.limits + _left_out(config, explained, models, problem),
    }  # fmt: skip
    metrics = flatten({k: told[k] for k in ("growth", "alignment", "alignment_centered", "cka", "path")})
    return told | {"metrics": metrics}


def _block_numbers(problem: Problem, measured: _Measured) -> dict[str, dict[str, Any]]:
    """Every block's numbers, its shape, and the results of transforms and models."""
    changes = measured.changes
    blocks = measures.block_numbers(measured.kernels, problem.change, problem.target, changes, measured.weights)
    for name, numbers in blocks.items():
        numbers["shape"] = list(changes[name].shape)
        numbers["explain"] = {key: r2.get(name) for key, r2 in measured.explained.r2.items()}
        numbers["model_rank"] = {k: m["effective_rank"][name] for k, m in measured.models.numbers.items()}
    return blocks


def _vector(feats: TangentFeatures, state: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([as_real(state[name]).flatten() for name in feats.parameters])


def _plain(name: str, reduction: Reduction) -> str:
    """A block's or parameter's name in the user's own model."""
    return name.removeprefix(PREFIX) if reduction.kind == "margin" else name


def _identity(problem: Problem, average: AverageFeatures | None) -> dict[str, float | None]:
    """The path identity's error, and how much of the outputs' change went through the buffers."""
    if average is None:
        return dict.fromkeys(("error", "error_db", "nodes", "through_buffers", "buffers_moved"))
    moved, change = average.buffer_change, problem.change.double()
    size = float(change.norm())
    through = 0.0 if moved is None else float((moved * change).sum()) / size**2
    return {
        "error": average.error,
        "error_db": min(average.error_db, 300.0),
        "nodes": average.nodes,
        "through_buffers": through,
        "buffers_moved": 0 if moved is None else 1,
    }


def _network(model: nn.Module, blocks: Mapping[str, Any]) -> dict[str, Any]:
    count = sum(p.numel() for p in model.parameters())
    measured = sum(int(np.prod(numbers["shape"])) for numbers in blocks.values())
    return {"class": type(model).__name__, "parameters": count, "measured": measured, "blocks": len(blocks)}


def _described(data: Data, problem: Problem) -> dict[str, Any]:
    x = tensors(problem.data.x)[0]
    return {
        "samples": problem.data.n,
        "of": data.n,
        "shape": list(x.shape[1:]),
        "images": _image_like(problem.data) is not None,
        "classes": None if data.classes is None else list(data.classes),
        "labels": None if data.y is None else "classes" if data.labels is not None else "real targets",
    }


def _weights(reduction: Reduction, classes: tuple[str, ...] | None) -> dict[str, float] | None:
    """The first direction's weight on each output."""
    if reduction.kind != "main":
        return None
    first = reduction.weights[:, 0].tolist()
    named = (
        classes if classes is not None and len(classes) == len(first) else [f"output {j}" for j in range(len(first))]
    )
    return dict(zip(named, first, strict=True))


def _performance(outputs: Tensor, data: Data) -> dict[str, float] | None:
    """Accuracy for labels, or mean squared error for real targets, on the measured samples."""
    if data.y is None:
        return None
    if data.labels is not None and (outputs.shape[1] > 1 or len(torch.unique(data.labels)) == 2):
        return {"accuracy": float((_predicted(outputs, data.labels) == data.labels).double().mean())}
    y = (data.y[:, None] if data.y.ndim == 1 else data.y).to(outputs)
    return {"mse": float(((outputs - y) ** 2).mean())} if y.shape == outputs.shape else None


def _predicted(outputs: Tensor, labels: Tensor) -> Tensor:
    kinds = torch.unique(labels)
    return outputs.argmax(1) if outputs.shape[1] > 1 else kinds[(outputs[:, 0] > 0).long().clamp_max(len(kinds) - 1)]


def _checkpoint(
    name: str, kernel: Tensor, wholes: Mapping[str, Tensor], problem: Problem, performance: dict[str, float] | None
) -> dict[str, Any]:
    target = problem.target
    return {
        "name": name,
        "growth": float(kernel.trace() / wholes["initial"].trace()),
        "alignment": defined(alignment, kernel, problem.change),
        "alignment_centered": defined(alignment, kernel, problem.change, centered=True),
        "alignment_labels": None if target is None else defined(alignment, kernel, target),
        "alignment_labels_centered": None if target is None else defined(alignment, kernel, target, centered=True),
        "cka_start": defined(cka, kernel, wholes["initial"]),
        "cka_end": defined(cka, kernel, wholes["final"]),
        "performance": performance,
    }


def _left_out(config: InspectConfig, explained: Explained, models: Models, problem: Problem) -> list[str]:
    """Sentences on what the costly measures did not cover."""
    words = []
    if problem.fresh:
        words.append(
            f"At the start {len(problem.fresh)} norms (first: {problem.fresh[0]}) have the running statistics 0 and 1 of a "
            "new network, so the initial kernel is that of an uncalibrated network. To see the growth due to training, save "
            "the start after a few batches in training mode, without optimizer steps."
        )
    for key, names in explained.left_out.items():
        if names:
            shown = ", ".join(_plain(name, problem.reduction) for name in names[:4])
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            words.append(
                f"{type(measures.STRUCTURES[key]).__name__} transforms were not fitted for {shown}{more}: that would exceed "
                f"the limit of {config.explain_operations:.0e} operations per structure."
            )
    if models.left_out:
        words.append(f"The exact adaptive model was not fitted: {models.left_out}.")
    if "two_sided" in models.numbers and not models.numbers["two_sided"]["converged"]:
        words.append("The exact adaptive model did not converge within the round limit; its ranks are provisional.")
    return words


def _image_like(data: Data) -> Tensor | None:
    """The first input that looks like gray or color images, (n, 1 or 3, h, w) or (n, h, w), if any."""
    for x in tensors(data.x):
        if x.is_floating_point() and x.ndim == 4 and x.shape[1] in (1, 3) and min(x.shape[2:]) >= 4:
            return x
        if x.is_floating_point() and x.ndim == 3 and min(x.shape[1:]) >= 8 and x.shape[1] == x.shape[2]:
            return x[:, None]
    return None


def _arrays(problem: Problem, measured: _Measured) -> dict[str, np.ndarray]:
    data, reduction, kernels, wholes = problem.data, problem.reduction, measured.kernels, measured.wholes
    arrays: dict[str, Tensor] = {f"kernel.{stage}": kernel.float() for stage, kernel in wholes.items()}
    arrays |= {f"spectrum.{stage}": spectrum(kernel) for stage, kernel in wholes.items()}
    arrays |= {f"diagonal.{s}.{_plain(k, reduction)}": K.diagonal() for s in kernels for k, K in kernels[s].items()}
    arrays |= {
        f"singular_values.change.{_plain(k, reduction)}": singular_values(m) for k, m in measured.changes.items()
    }
    for key, parts in measured.models.coefficients.items():
        arrays |= {f"singular_values.{key}.{_plain(k, reduction)}": singular_values(m) for k, m in parts.items()}
    arrays |= {"change": problem.change, "outputs.start": problem.outputs[0], "outputs.end": problem.outputs[-1]}
    if problem.target is not None:
        arrays["target"] = problem.target
    if data.y is not None:
        arrays["y"] = data.y
    if data.labels is not None and (problem.outputs[0].shape[1] > 1 or len(torch.unique(data.labels)) == 2):
        arrays["predicted"] = _predicted(problem.outputs[-1], data.labels)
    images = _image_like(data)
    if images is not None:
        growth = wholes.get("average", wholes["final"]).diagonal() / wholes["initial"].diagonal()
        order = growth.argsort(descending=True)
        shown = torch.unique(torch.cat([order[: _SHOWN // 2], order[-(_SHOWN // 2) :]]))
        arrays["images"], arrays["images.index"] = _pixels(images, shown), shown
    return {name: value.detach().cpu().numpy() for name, value in arrays.items()}


def _pixels(images: Tensor, shown: Tensor) -> Tensor:
    """The chosen images as bytes (k, h, w, channels); each channel is scaled by its range over all samples."""
    low, high = (f(images.float(), dim=(0, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    scaled = (images[shown].float() - low) / (high - low).clamp_min(1e-12)
    return (255 * scaled).round().to(torch.uint8).permute(0, 2, 3, 1)
