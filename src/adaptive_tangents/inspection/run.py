"""One inspection: from a model, its checkpoints and data to every number and array of the report."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_tangents.capture.batches import tensors
from adaptive_tangents.capture.path_average import AverageFeatures
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.common import Clock, Progress, flatten, versions
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.inspection import measures
from adaptive_tangents.inspection.measures import STAGES, Explained, Models, defined, singular_values, spectrum, total
from adaptive_tangents.inspection.outputs import PREFIX, Reduction, network_outputs, reduce_outputs, targets
from adaptive_tangents.inspection.tangents import Tangents, fitting_chunk
from adaptive_tangents.loading import Data, fit_data
from adaptive_tangents.measures.alignment import alignment, cka

NAME = "inspect"
_SAMPLES = 128
_SHOWN = 24


@dataclass(frozen=True)
class InspectConfig:
    """What is measured: how many samples, which outputs and parameters, and how much work the costly measures may take.

    ``nodes`` of the path average (None: doubled up to ``max_nodes`` until the identity holds to ``tol``); the limits are in
    floating-point operations, so that the same call leaves out the same blocks on every machine.
    """

    samples: int = _SAMPLES
    seed: int = 0
    outputs: str = "auto"
    wrt: tuple[str, ...] | None = None
    nodes: int | None = None
    max_nodes: int = 8
    tol: float = 0.01
    explain_operations: float = 2e11
    fit_operations: float = 4e12

    def __post_init__(self) -> None:
        if self.samples < 4:
            raise TangentError(f"inspect: --samples is at least 4, got {self.samples}")
        if (self.nodes is not None and self.nodes < 1) or self.max_nodes < 1 or not self.tol > 0:
            raise TangentError(f"inspect: nodes and tol are positive, got {self}")

    def quick(self) -> "InspectConfig":
        """The same inspection, small: to see it work."""
        return replace(self, samples=min(self.samples, 32), nodes=4, explain_operations=2e9, fit_operations=2e10)


@dataclass(frozen=True)
class InspectResult:
    """Everything measured: ``results`` is what results.json holds, ``arrays`` what the figures need."""

    results: dict[str, Any]
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True)
class _Problem:
    """The samples measured, the outputs of the network on them at every checkpoint, and what is measured of these."""

    data: Data
    reduction: Reduction
    tangents: Tangents
    outputs: list[Tensor]
    change: Tensor
    target: Tensor | None
    target_words: str
    nodes: int
    limits: list[str]
    fresh: list[str]


# Work expected of each stage, relative to the features of one state.
_WORK = {"start": 1.0, "average": 7.0, "end": 1.0, "explain": 2.0, "models": 1.0, "checkpoint": 1.0}


def run(
    model: nn.Module,
    states: Mapping[str, Mapping[str, Tensor]],
    data: Data,
    config: InspectConfig | None = None,
    *,
    progress: Progress = lambda stage, fraction: None,
) -> InspectResult:
    """Inspect what happened between the first and the last of a network's states, by name, in order of training.

    ``progress`` hears the stage and the share of all work done. Raises TangentError where data, states and model do not go
    together, or nothing changed.

    >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> start = {name: value.clone() for name, value in model.state_dict().items()}
    >>> end = {name: 1.5 * value for name, value in start.items()}
    >>> found = run(model, {"start": start, "end": end}, Data(torch.randn(12, 3)))
    >>> found.results["growth"]["final"] > 1
    True
    """
    config = InspectConfig() if config is None else config
    if len(states) < 2:
        raise TangentError(f"inspect: two checkpoints are needed, start and end, got {len(states)}")
    model = model.eval()
    between = list(states)[1:-1]
    expected = sum(_WORK.values()) + _WORK["checkpoint"] * (len(between) - 1)
    clock, cpu = Clock(progress, 0.5 + expected), time.process_time()
    with clock.stage("outputs", 0.5):
        problem = _problem(model, states, data, config)
    (start, end), tangents = _ends(problem, states), problem.tangents
    kernels: dict[str, dict[str, Tensor]] = {}
    with clock.stage("start", _WORK["start"]) as tick:
        first = tangents.at(start, tick)
        kernels["initial"] = first.kernel(outputs="trace", by_block=True)
    with clock.stage("average", _WORK["average"]) as tick:
        average = tangents.average(start, end, problem.nodes, tick)
        kernels["average"] = average.kernel(outputs="trace", by_block=True)
    with clock.stage("explain", _WORK["explain"]) as tick:
        explained = measures.explain_blocks(first, average, config.explain_operations, tick)
    identity = _identity(problem, average)
    average_kernel = total(kernels["average"])
    del average
    with clock.stage("end", _WORK["end"]) as tick:
        kernels["final"] = tangents.at(end, tick).kernel(outputs="trace", by_block=True)
    goal = defined(alignment, average_kernel, problem.change)
    with clock.stage("models", _WORK["models"]) as tick:
        models = measures.fit_models(first, problem.change, goal, config.fit_operations, tick)
    matrices = first.split(_vector(first, end) - _vector(first, start))
    weights = first.split(_vector(first, start))
    del first
    wholes = {stage: total(kernels[stage]) for stage in STAGES}
    blocks = measures.block_numbers(kernels, problem.change, problem.target, matrices, weights)
    for name, numbers in blocks.items():
        numbers["shape"] = list(matrices[name].shape)
        numbers["explain"] = {key: r2.get(name) for key, r2 in explained.r2.items()}
        numbers["model_rank"] = {k: m["effective_rank"][name] for k, m in models.numbers.items()}
    trajectory = []
    first_name, *_, last_name = states
    for name in states:
        own = {first_name: wholes["initial"], last_name: wholes["final"]}.get(name)
        if own is None:
            with clock.stage(f"checkpoint {name}", _WORK["checkpoint"]) as tick:
                own = tangents.at(problem.reduction.state(states[name]), tick).kernel(outputs="trace").double()
        trajectory.append(_checkpoint(name, own, wholes, problem, list(states).index(name)))
    growth = wholes["average"].diagonal() / wholes["initial"].diagonal().clamp_min(1e-300)
    results = {
        "experiment": NAME,
        "config": asdict(config),
        "seed": config.seed,
        "versions": versions(),
        "device": str(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
        "network": _network(model, blocks),
        "data": _described(data, problem),
        "outputs": {
            "kind": problem.reduction.kind,
            "names": list(problem.reduction.names),
            "sentence": problem.reduction.sentence,
            "share": problem.reduction.share,
            "labels": problem.target_words,
            "weights": _weights(problem.reduction, data.classes),
        },
        "performance": {k: _performance(problem.outputs[i], problem.data) for k, i in (("start", 0), ("end", -1))},
        **measures.kernel_numbers(wholes, problem.change, problem.target),
        "path": identity,
        "blocks": {_plain(name, problem.reduction): numbers for name, numbers in blocks.items()},
        "explain": {
            key: {
                "total": r2["total"],
                "layer_scale_there": r2.get("layer_scale"),
                "left_out": [_plain(name, problem.reduction) for name in explained.left_out[key]],
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
    arrays = _arrays(problem, kernels, wholes, matrices, models.coefficients)
    results["metrics"] = flatten({k: results[k] for k in ("growth", "alignment", "alignment_centered", "cka", "path")})
    results["wall_seconds"] = clock.seconds | {"total": time.perf_counter() - clock.started}
    results["cpu_seconds"] = time.process_time() - cpu
    return InspectResult(results, arrays)


def _problem(
    model: nn.Module, states: Mapping[str, Mapping[str, Tensor]], data: Data, config: InspectConfig
) -> _Problem:
    data = fit_data(data, model)
    wanted = min(config.samples, data.n)
    order = torch.randperm(data.n, generator=torch.Generator().manual_seed(config.seed)).to(tensors(data.x)[0].device)
    limits = []
    if wanted < data.n:
        limits.append(f"Kernels are of {wanted} of the {data.n:,} samples, drawn with seed {config.seed}.")
    count = wanted
    while True:
        chosen = data.take(order[:count].sort().values)
        outputs = _outputs(model, states, chosen)
        gained = outputs[-1] - outputs[0]
        reduction = reduce_outputs(config.outputs, gained, chosen.labels, data.classes)
        arranged, x, output = reduction.arrange(model, chosen.x)
        tangents = Tangents(arranged, x, output, reduction.patterns(config.wrt))
        start, end = (reduction.state(state) for state in (*states.values(),)[:: len(states) - 1])
        nodes = config.nodes or tangents.nodes(start, end, tol=config.tol, most=config.max_nodes)
        tangents, fitting = fitting_chunk(tangents, tangents.cost(start, nodes), count)
        if fitting >= count:
            break
        limits = [f"Memory holds the features of {fitting} samples, so that many were taken of the {wanted} asked for."]
        count = fitting
    fresh = _fresh_norms(model, states[next(iter(states))])
    target, words = targets(reduction, chosen.y, gained.shape[1])
    return _Problem(chosen, reduction, tangents, outputs, reduction.apply(gained), target, words, nodes, limits, fresh)


def _fresh_norms(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Norms whose running statistics are still those of a new network."""
    kinds = nn.modules.batchnorm._NormBase
    means = {
        name: state.get(f"{name}.running_mean") for name, module in model.named_modules() if isinstance(module, kinds)
    }
    fresh = []
    for name, mean in means.items():
        if mean is not None and not mean.any() and bool((state[f"{name}.running_var"] == 1).all()):
            fresh.append(name)
    return fresh


def _outputs(model: nn.Module, states: Mapping[str, Mapping[str, Tensor]], data: Data) -> list[Tensor]:
    """The network's outputs at every checkpoint, which differ between the ends."""
    outputs = []
    for name, state in states.items():
        outputs.append(network_outputs(model, state, data.x))
        if not bool(torch.isfinite(outputs[-1]).all()):
            raise TangentError(
                f"inspect: the network's outputs at {name} are not finite; check the data, or leave that checkpoint out"
            )
    if float((outputs[-1] - outputs[0]).norm()) == 0:
        raise TangentError(
            "inspect: start and end give the same outputs on these samples, so there is no change to inspect; give two "
            "different checkpoints"
        )
    return outputs


def _ends(problem: _Problem, states: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    first, *_, last = states
    return problem.reduction.state(states[first]), problem.reduction.state(states[last])


def _vector(feats: TangentFeatures, state: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([state[name].flatten() for name in feats.parameters])


def _plain(name: str, reduction: Reduction) -> str:
    """A block's or parameter's name in the user's own model."""
    return name.removeprefix(PREFIX) if reduction.kind == "margin" else name


def _identity(problem: _Problem, average: AverageFeatures) -> dict[str, float | None]:
    """The path identity's error, and how much of the outputs' change went through the buffers."""
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


def _described(data: Data, problem: _Problem) -> dict[str, Any]:
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
    """Share of labels met, or the mean squared error of real targets, on the samples measured."""
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
    name: str, kernel: Tensor, wholes: Mapping[str, Tensor], problem: _Problem, index: int
) -> dict[str, Any]:
    return {
        "name": name,
        "growth": float(kernel.trace() / wholes["initial"].trace()),
        "alignment": defined(alignment, kernel, problem.change),
        "alignment_labels": None if problem.target is None else defined(alignment, kernel, problem.target),
        "cka_start": defined(cka, kernel, wholes["initial"]),
        "cka_end": defined(cka, kernel, wholes["final"]),
        "performance": _performance(problem.outputs[index], problem.data),
    }


def _left_out(config: InspectConfig, explained: Explained, models: Models, problem: _Problem) -> list[str]:
    """What the costly measures did not cover, in sentences."""
    words = []
    if problem.fresh:
        words.append(
            f"At the start {len(problem.fresh)} norms, {problem.fresh[0]} first, have the running statistics 0 and 1 of a "
            "new network, which fit no input: the kernel of the start is of that uncalibrated network. A start saved after "
            "a few batches in training mode (no optimiser step) would tell the growth that training made."
        )
    for key, names in explained.left_out.items():
        if names:
            shown = ", ".join(_plain(name, problem.reduction) for name in names[:4])
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            words.append(
                f"{type(measures.STRUCTURES[key]).__name__} transforms were not fitted for {shown}{more}: that would pass "
                f"the limit of {config.explain_operations:.0e} operations a structure."
            )
    if models.left_out:
        words.append(f"The exact adaptive model was not fitted: {models.left_out}.")
    if "two_sided" in models.numbers and not models.numbers["two_sided"]["converged"]:
        words.append("The exact adaptive model did not converge within its rounds; its ranks are provisional.")
    return words


def _image_like(data: Data) -> Tensor | None:
    """The input that is a stack of grey or colour images (n, 1 or 3, h, w), or (n, h, w), if there is one."""
    for x in tensors(data.x):
        if x.is_floating_point() and x.ndim == 4 and x.shape[1] in (1, 3) and min(x.shape[2:]) >= 4:
            return x
        if x.is_floating_point() and x.ndim == 3 and min(x.shape[1:]) >= 8 and x.shape[1] == x.shape[2]:
            return x[:, None]
    return None


def _arrays(
    problem: _Problem, kernels: Mapping[str, Mapping[str, Tensor]], wholes: Mapping[str, Tensor],
    matrices: Mapping[str, Tensor], coefficients: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, np.ndarray]:  # fmt: skip
    data, reduction = problem.data, problem.reduction
    arrays: dict[str, Tensor] = {f"kernel.{stage}": kernel.float() for stage, kernel in wholes.items()}
    arrays |= {f"spectrum.{stage}": spectrum(kernel) for stage, kernel in wholes.items()}
    arrays |= {f"diagonal.{s}.{_plain(k, reduction)}": K.diagonal() for s in STAGES for k, K in kernels[s].items()}
    arrays |= {f"singular_values.change.{_plain(k, reduction)}": singular_values(m) for k, m in matrices.items()}
    for key, parts in coefficients.items():
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
        growth = wholes["average"].diagonal() / wholes["initial"].diagonal()
        order = growth.argsort(descending=True)
        shown = torch.unique(torch.cat([order[: _SHOWN // 2], order[-(_SHOWN // 2) :]]))
        arrays["images"], arrays["images.index"] = _pixels(images, shown), shown
    return {name: value.detach().cpu().numpy() for name, value in arrays.items()}


def _pixels(images: Tensor, shown: Tensor) -> Tensor:
    """Some images as bytes (k, h, w, channels), every channel stretched over the range it has on all samples."""
    low, high = (f(images.float(), dim=(0, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    scaled = (images[shown].float() - low) / (high - low).clamp_min(1e-12)
    return (255 * scaled).round().to(torch.uint8).permute(0, 2, 3, 1)
