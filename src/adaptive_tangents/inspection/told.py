"""What an inspection tells: the numbers and arrays of the report, from what was measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_tangents.capture.batches import tensors
from adaptive_tangents.features.layer_names import plain_names
from adaptive_tangents.inspection import measures
from adaptive_tangents.inspection.judged import ACCURACY
from adaptive_tangents.inspection.kept import Record
from adaptive_tangents.inspection.layer_rows import layer_rows
from adaptive_tangents.inspection.measures import defined, spectrum
from adaptive_tangents.inspection.names import told_apart
from adaptive_tangents.inspection.outputs import Reduction
from adaptive_tangents.inspection.problem import Problem
from adaptive_tangents.inspection.sampling import order_of
from adaptive_tangents.inspection.starts import start_of
from adaptive_tangents.loading import Data, inner
from adaptive_tangents.measures.alignment import alignment, cka
from adaptive_tangents.runs.record import flatten

_SHOWN = 24
_LONGEST_TEXT = 600


@dataclass(frozen=True)
class Measured:
    """What was measured at the start, along the path and at the end: kernels by stage and block, their sums, and fits.

    After an interruption, what was not finished is missing: kernels of a stage, the path's identity, fits. ``values`` are the
    singular values of the weight changes; ``squares`` are the squared error and change of every structure and block.
    """

    kernels: dict[str, dict[str, Tensor]]
    wholes: dict[str, Tensor]
    identity: dict[str, float | None]
    explained: dict[str, dict[str, float | None]]
    models: Record
    changes: dict[str, Tensor]
    weights: dict[str, Tensor]
    values: dict[str, Tensor]
    squares: dict[str, dict[str, list[float]]]


def told(model: nn.Module, data: Data, problem: Problem, measured: Measured) -> dict[str, Any]:
    """The numbers of the page."""
    reduction, wholes = problem.reduction, measured.wholes
    blocks = _block_numbers(problem, measured)
    plain = plain_names([*blocks])
    growth = wholes.get("average", wholes["final"]).diagonal() / wholes["initial"].diagonal().clamp_min(1e-300)
    scale = measured.explained["layer_scale"]["total"]
    found = {
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
        "performance": dict(zip(("start", "end"), problem.performances[:: len(problem.outputs) - 1], strict=True)),
        **measures.kernel_numbers(wholes, problem.change, problem.target),
        "path": measured.identity,
        "blocks": {plain[name]: numbers for name, numbers in blocks.items()},
        "layers": layer_rows(
            blocks, measured.kernels, problem.change, problem.target, measured.values, measured.squares, plain,
            problem.outputs[0].shape[1],
        ),
        "explain": {
            key: {
                "total": r2["total"],
                "layer_scale_there": None if key == "layer_scale" or r2["total"] is None else scale,
                "left_out": [plain[name] for name in blocks if name not in r2],
            }
            for key, r2 in measured.explained.items()
        },
        "models": {
            key: {k: v for k, v in numbers.items() if k != "effective_rank"}
            for key, numbers in measured.models.numbers["models"].items()
        },
        "sample_growth": {"median": float(growth.median()), "largest": float(growth.max()), "smallest": float(growth.min())},
        "calibrated": problem.calibrated,
        "limits": problem.limits + _left_out(measured.models, problem),
    }  # fmt: skip
    metrics = flatten({k: found[k] for k in ("growth", "alignment", "alignment_centered", "cka", "path")})
    return found | {"metrics": metrics}


def _block_numbers(problem: Problem, measured: Measured) -> dict[str, dict[str, Any]]:
    """Every block's numbers, its shape, and the results of transforms and models."""
    blocks = measures.block_numbers(
        measured.kernels, problem.change, problem.target, measured.changes, measured.weights, measured.values
    )
    for name, numbers in blocks.items():
        numbers["shape"] = list(measured.changes[name].shape)
        numbers["start"] = start_of(problem.layout.blocks[name], measured.weights[name], numbers, len(blocks))
        numbers["explain"] = {key: r2.get(name) for key, r2 in measured.explained.items()}
        numbers["model_rank"] = {k: m["effective_rank"][name] for k, m in measured.models.numbers["models"].items()}
    return blocks


def _network(model: nn.Module, blocks: Mapping[str, Any]) -> dict[str, Any]:
    count = sum(p.numel() for p in model.parameters())
    measured = sum(int(np.prod(numbers["shape"])) for numbers in blocks.values())
    return {"class": type(inner(model)).__name__, "parameters": count, "measured": measured, "blocks": len(blocks)}


def _described(data: Data, problem: Problem) -> dict[str, Any]:
    x = tensors(problem.data.x)[0]
    return {
        "samples": problem.data.n,
        "of": data.size,
        "shape": list(x.shape[1:]),
        "images": _image_like(problem.data) is not None,
        **_texts(problem),
        "classes": None if data.classes is None else list(data.classes),
        "labels": None if data.y is None else "classes" if data.labels is not None else "real targets",
    }


def _texts(problem: Problem) -> dict[str, Any]:
    """The texts of the samples that the page shows, clipped, and which samples these are."""
    texts = problem.data.texts
    if texts is None:
        return {"texts": None, "texts_of": []}
    shown = _moved(problem.change)
    return {"texts": [_clipped(texts[k]) for k in shown], "texts_of": shown}


def _clipped(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1].rstrip() + "…"


def _moved(change: Tensor) -> list[int]:
    most, least = order_of(change.double().cpu().numpy())
    return [*most, *least]


def _weights(reduction: Reduction, classes: tuple[str, ...] | None) -> dict[str, float] | None:
    """The first direction's weight on each output."""
    if reduction.kind != "main":
        return None
    first = reduction.weights[:, 0].tolist()
    known = classes is not None and len(classes) == len(first)
    names = told_apart(classes) if known and classes else [f"output {j}" for j in range(len(first))]
    return dict(zip(names, first, strict=True))


def checkpoint(
    name: str, kernel: Tensor, wholes: Mapping[str, Tensor], problem: Problem, performance: dict[str, float] | None
) -> dict[str, Any]:
    """A point of the trajectory: a checkpoint's kernel beside those of start and end."""
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


def _left_out(models: Record, problem: Problem) -> list[str]:
    """Sentences on the start, and on what the exact models did not cover."""
    words = []
    if problem.fresh:
        words.append(
            f"At the start {len(problem.fresh)} norms (first: {problem.fresh[0]}) have the running statistics 0 and 1 of a "
            "new network, so the initial kernel is that of an uncalibrated network. To see the growth due to training, save "
            "the start after a few batches in training mode, without optimizer steps."
        )
    if models.numbers["left_out"]:
        words.append(f"The exact adaptive model was not fitted: {models.numbers['left_out']}.")
    if not models.numbers["models"].get("two_sided", {"converged": True})["converged"]:
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


def arrays_of(problem: Problem, measured: Measured) -> dict[str, np.ndarray]:
    """What the figures draw."""
    data, kernels, wholes = problem.data, measured.kernels, measured.wholes
    plain = plain_names([*measured.changes])
    arrays: dict[str, Tensor] = {f"kernel.{stage}": kernel.float() for stage, kernel in wholes.items()}
    arrays |= {f"spectrum.{stage}": spectrum(kernel) for stage, kernel in wholes.items()}
    arrays |= {f"diagonal.{s}.{plain[k]}": K.diagonal() for s in kernels for k, K in kernels[s].items()}
    arrays |= {f"singular_values.change.{plain[k]}": values for k, values in measured.values.items()}
    for name, values in measured.models.tensors.items():
        key, _, block = name.partition(".")
        arrays[f"singular_values.{key}.{plain[block]}"] = values
    arrays |= {"change": problem.change, "outputs.start": problem.outputs[0], "outputs.end": problem.outputs[-1]}
    if problem.target is not None:
        arrays["target"] = problem.target
    if data.y is not None:
        arrays["y"] = data.y
    if problem.judge.kind == ACCURACY:
        arrays["predicted"] = problem.judge.predicted(problem.outputs[-1])
        arrays["predicted.start"] = problem.judge.predicted(problem.outputs[0])
    arrays["sample"] = data.numbers
    if data.held_out is not None:
        arrays["held_out"] = data.held_out
    images = _image_like(data)
    if images is not None:
        growth = wholes.get("average", wholes["final"]).diagonal() / wholes["initial"].diagonal()
        order = growth.argsort(descending=True)
        ends = torch.cat([order[: _SHOWN // 2], order[-(_SHOWN // 2) :]])
        shown = torch.unique(torch.cat([ends, torch.tensor(_moved(problem.change), device=ends.device)]))
        arrays["images"], arrays["images.index"] = _pixels(images, shown), shown
    return {name: _as_array(value) for name, value in arrays.items()}


def _as_array(value: Tensor) -> np.ndarray:
    """The same in NumPy, which has no bfloat16."""
    short = value.is_floating_point() and value.element_size() < 4
    return (value.float() if short else value).detach().cpu().numpy()


def _pixels(images: Tensor, shown: Tensor) -> Tensor:
    """The chosen images as bytes (k, h, w, channels); each channel is scaled by its range over all samples."""
    low, high = (f(images.float(), dim=(0, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    scaled = (images[shown].float() - low) / (high - low).clamp_min(1e-12)
    return (255 * scaled).round().to(torch.uint8).permute(0, 2, 3, 1)
