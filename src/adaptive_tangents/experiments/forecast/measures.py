"""A foretold state of a network against the trained one: kernels, layers, directions; and the cost of making it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.capture.path_average import average_features
from adaptive_tangents.experiments.claims import rank_correlation
from adaptive_tangents.experiments.forecast.problems import State, Task
from adaptive_tangents.experiments.kernel_alignment.measures import outputs, vector
from adaptive_tangents.measures.alignment import alignment, cka, effective_rank

Kernels = Mapping[str, Float[Tensor, "n n"]]


@dataclass(frozen=True, eq=False)
class Turn:
    """What a change θ₀ → θ did: the kernel of each layer averaged on the way and at the end, and each layer's change."""

    average: Kernels
    final: Kernels
    change: Mapping[str, Float[Tensor, "o i"]]

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Everything under one prefix, for a part of the run."""
        parts = {"average": self.average, "final": self.final, "change": self.change}
        return {f"{prefix}:{kind}:{name}": value for kind, of in parts.items() for name, value in of.items()}

    @staticmethod
    def of(kept: Mapping[str, Tensor], prefix: str) -> "Turn":
        """The turn that ``tensors`` made."""
        parts: dict[str, dict[str, Tensor]] = {"average": {}, "final": {}, "change": {}}
        for key, value in kept.items():
            first, _, rest = key.partition(":")
            kind, _, name = rest.partition(":")
            if first == prefix:
                parts[kind][name] = value
        return Turn(**parts)


def turn(task: Task, state: State, *, nodes: int) -> Turn:
    """Kernels and changes of the way from θ₀ to ``state``, on the task's chosen samples."""
    x, start, end = task.x[task.chosen], task.whole({}), task.whole(state)
    initial = tangent_features(task.model, x, params=start)
    difference = initial.split(vector(initial, end) - vector(initial, start))
    layers = {
        name: difference[name] for name, block in initial.blocks.items() if any(len(s.shape) > 1 for s in block.slots)
    }
    final = tangent_features(task.model, x, params=end).kernel(outputs="trace", by_block=True)
    still = all(bool((start[name] == end[name]).all()) for name in initial.parameters)
    average = final
    if not still:
        average = average_features(task.model, start, end, x, nodes=nodes).kernel(outputs="trace", by_block=True)
    return Turn(average, final, layers)


def total(kernels: Kernels) -> Float[Tensor, "n n"]:
    """The whole kernel from those of its layers."""
    return torch.stack(list(kernels.values())).sum(0)


def compared(
    task: Task, found: Turn, truth: Turn, state: State, *, directions: int, least_width: int
) -> dict[str, Tensor]:
    """A foretold turn against the true one, as numbers and as one number a layer."""
    y = task.y[task.chosen]
    average, final = total(found.average), total(found.final)
    shares, wanted = shares_of(found.change), shares_of(truth.change)
    left, right, chance = _overlaps(found.change, truth.change, directions, least_width)
    with torch.no_grad():
        test = ((outputs(task.model, task.whole(state), task.x_test) - task.y_test) ** 2).mean()
        loss = ((outputs(task.model, task.whole(state), task.x) - task.y) ** 2).mean()
    numbers = {
        "average": cka(average, total(truth.average)),
        "final": cka(final, total(truth.final)),
        "aligned": alignment(average, y, centered=True),
        "aligned_final": alignment(final, y, centered=True),
        "order": rank_correlation(shares.tolist(), wanted.tolist()),
        "left": float(left.nanmean()),
        "right": float(right.nanmean()),
        "chance_left": float(chance[0].nanmean()),
        "chance_right": float(chance[1].nanmean()),
        "loss": float(loss),
        "test": float(test),
        "length": float(torch.cat([v.flatten() for v in found.change.values()]).norm()),
    }
    names = list(truth.change)
    layers = {
        "share": shares,
        "rank": torch.tensor([effective_rank(found.change[name]).participation for name in names], dtype=torch.float64),
        "layer": torch.tensor([cka(found.average[k], truth.average[k]) for k in names], dtype=torch.float64),
        "left": left,
        "right": right,
        "chance_left": chance[0],
        "chance_right": chance[1],
    }
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()} | {
        f"by_layer:{key}": value for key, value in layers.items()
    }


def shares_of(change: Mapping[str, Tensor]) -> Float[Tensor, " layers"]:
    """Each layer's share of the squared change; all zero if nothing changes."""
    squares = torch.stack([value.double().square().sum() for value in change.values()])
    found: Tensor = squares / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return found


def _overlaps(
    found: Mapping[str, Tensor], truth: Mapping[str, Tensor], k: int, least: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Overlaps of what the leading singular vectors span on both sides, layer by layer, and those of random subspaces.

    NaN where a side is narrow, or nothing changes.
    """
    rows = []
    for name, true in truth.items():
        sides = [overlap(found[name], true, k), overlap(found[name].mT, true.mT, k)]
        chances = [min(k, *true.shape) / width for width in true.shape]
        kept = [
            width >= least and min(true.shape) >= k and bool(found[name].any() and true.any()) for width in true.shape
        ]
        rows.append([v if keep else float("nan") for v, keep in zip([*sides, *chances], [*kept, *kept], strict=True)])
    table = torch.tensor(rows, dtype=torch.float64)
    return table[:, 0], table[:, 1], (table[:, 2], table[:, 3])


def overlap(a: Float[Tensor, "o i"], b: Float[Tensor, "o j"], k: int) -> float:
    """The mean squared cosine of the principal angles between the spans of the first k left singular vectors.

    >>> a = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    >>> round(overlap(a, torch.diag(torch.tensor([3.0, 0.0, 2.0, 1.0])), 2), 6), round(overlap(a, a, 2), 6)
    (0.5, 1.0)
    """
    k = min(k, *a.shape, *b.shape)
    first, second = (torch.linalg.svd(m.double(), full_matrices=False)[0][:, :k] for m in (a, b))
    return float((first.mT @ second).square().sum() / k)


class Passes:
    """A count of gradient passes: a forward and a backward pass of one output of one sample; a forward pass is a third."""

    def __init__(self) -> None:
        self.thirds = 0

    @property
    def count(self) -> float:
        """Gradient passes so far."""
        return self.thirds / 3

    @contextmanager
    def of(self, model: nn.Module, outputs: int) -> Iterator["Passes"]:
        """Count the samples that a model sees; where gradients are recorded, a backward pass of every output follows."""

        def seen(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self.thirds += len(arguments[0]) * (1 + 2 * outputs * torch.is_grad_enabled())

        handle = model.register_forward_pre_hook(seen)
        try:
            yield self
        finally:
            handle.remove()
