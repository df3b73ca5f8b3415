"""An inspection's settings and its problem: the samples, the network's outputs on them, and what is measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import Tensor, nn

from adaptive_tangents.capture.batches import tensors
from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.inspection.judged import Judge, judge_of
from adaptive_tangents.inspection.kept import Kept, Record
from adaptive_tangents.inspection.outputs import Reduction, network_outputs, reduce_outputs, targets
from adaptive_tangents.inspection.same_network import check_marks, marked, outputs_before, place_of
from adaptive_tangents.inspection.sampling import held_out_note
from adaptive_tangents.inspection.tangents import FEWEST_NODES, Cost, Tangents, cost_of, fitting_chunk, making_of
from adaptive_tangents.loading import Data, fit_data

_SAMPLES = 128
_CHOICES = "choices"
_ROUNDED = 4  # units of rounding


@dataclass(frozen=True)
class InspectConfig:
    """Settings: how many samples, which outputs and parameters, and how much work the exact adaptive model may take.

    ``nodes`` are those of the path average; None doubles them, up to ``max_nodes``, until the identity holds to ``tol``. The
    limit is in floating-point operations, so that the same call leaves out the same on every machine.
    """

    samples: int = _SAMPLES
    seed: int = 0
    outputs: str = "auto"
    wrt: tuple[str, ...] | None = None
    nodes: int | None = None
    max_nodes: int = 8
    tol: float = 0.01
    fit_operations: float = 4e12

    def __post_init__(self) -> None:
        if not isinstance(self.samples, Integral) or self.samples < 4:
            raise TangentError(f"inspect: --samples must be at least 4, got {self.samples}")
        nodes = self.max_nodes if self.nodes is None else self.nodes
        if not isinstance(nodes, Integral) or nodes < 1 or self.max_nodes < 1 or not self.tol > 0:
            raise TangentError(f"inspect: nodes and tol must be positive, got {self}")

    def quick(self) -> "InspectConfig":
        """The same inspection with few samples and, unless they are given, few nodes, to see it work."""
        return replace(self, samples=min(self.samples, 32), nodes=self.nodes or 4)


@dataclass(frozen=True)
class Problem:
    """The samples, the network's outputs on them at every checkpoint, and what is measured of these."""

    data: Data
    judge: Judge
    reduction: Reduction
    tangents: Tangents
    layout: TangentFeatures  # of one sample
    cost: Cost
    seconds: float  # of one sample's features
    outputs: list[Tensor]
    change: Tensor
    target: Tensor | None
    target_words: str
    nodes: int
    limits: list[str]
    fresh: list[str]  # norms that start with the statistics of a new network
    calibrated: int  # of these, how many end with others

    @property
    def performances(self) -> list[dict[str, float] | None]:
        """How good the outputs are at every checkpoint, if that is known."""
        return [self.judge.performance(outputs, self.data.y) for outputs in self.outputs]


def pose(
    model: nn.Module, states: Mapping[str, Mapping[str, Tensor]], data: Data, config: InspectConfig, kept: Kept
) -> Problem:
    """Choose samples, outputs, chunks and nodes within the memory, or take those that were chosen before.

    Raises TangentError if the outputs did not change, or if they are others than before.
    """
    data = fit_data(data, model)
    wanted = min(config.samples, data.n)
    before = kept.get(_CHOICES)
    limits, count = list[str](), wanted if before is None else int(before.numbers["samples"])
    if wanted < data.size:
        how = "" if data.leading and wanted == data.n else f", drawn with seed {config.seed}"
        limits.append(f"Kernels are of {wanted} of the {data.size:,} samples{how}.")
    while True:
        chosen = data.take(data.drawn(count, config.seed).to(tensors(data.x)[0].device))
        outputs = _outputs(model, states, chosen)
        if before is not None:
            outputs = outputs_before(outputs, before, kept)
        outputs = [out.clone(memory_format=torch.contiguous_format) for out in outputs]
        gained = outputs[-1] - outputs[0]
        reduction = reduce_outputs(config.outputs, gained, chosen.labels, data.classes)
        arranged, x, output = reduction.arrange(model, chosen.x)
        tangents = Tangents(arranged, x, output, config.wrt)
        start, end = (*states.values(),)[:: len(states) - 1]
        known = config.nodes if before is None else int(before.numbers["nodes"])
        layout = tangents.layout(start)
        if before is None:
            fitting_chunk(tangents, cost_of(layout, known or FEWEST_NODES), count)
        tangents = replace(tangents, making=making_of(layout, known or config.max_nodes))
        nodes, seconds = tangents.nodes(start, end, known, tol=config.tol, most=config.max_nodes)
        cost = cost_of(layout, nodes)
        if before is not None:
            tangents = replace(tangents, chunk=int(before.numbers["chunk"]), making=cost.making)
            break
        tangents, fitting = fitting_chunk(tangents, cost, count)
        if fitting >= count:
            break
        count = fitting
    if count < wanted:
        limits = [
            f"Memory holds the features of {count} samples, so only that many of the {wanted} requested were used."
        ]
    limits += [*data.notes, *held_out_note(chosen.held_out), *_rounded(outputs)]
    if before is not None:
        check_marks(tangents, {"start": start, "end": end}, before, kept)
    elif kept.keeps:
        few, marks = marked(tangents, {"start": start, "end": end})
        choices = {"samples": count, "nodes": nodes, "chunk": tangents.chunk, "marked": few, "blocks": [*layout.blocks]}
        held = {f"{k}": value for k, value in enumerate(outputs)} | marks
        kept.put(_CHOICES, Record(choices | place_of(outputs[0]), held))
    first, *_, last = states.values()
    fresh = _fresh_norms(model, first)
    judge = judge_of(data, model, gained.shape[1])
    target, words = targets(reduction, chosen.y, gained.shape[1], judge.pair)
    return Problem(
        chosen, judge, reduction, tangents, layout, cost, seconds, outputs, reduction.apply(gained), target, words, nodes,
        limits, fresh, len(set(fresh) - set(_fresh_norms(model, last))),
    )  # fmt: skip


def _rounded(outputs: Sequence[Tensor]) -> list[str]:
    """A doubt where the outputs changed by no more than their rounding."""
    change, size = float((outputs[-1] - outputs[0]).double().norm()), float(outputs[0].double().norm())
    if not outputs[0].is_floating_point() or change > _ROUNDED * torch.finfo(outputs[0].dtype).eps * size:
        return []
    dtype = str(outputs[0].dtype).removeprefix("torch.")
    return [
        f"The network’s outputs changed by {change / size:.1e} of their size, which is near the rounding of {dtype}: what is "
        "said of the change may be rounding alone."
    ]


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
    """The network's outputs at every checkpoint; start and end must differ."""
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
