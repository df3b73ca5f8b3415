"""An inspection's settings and its problem: the samples, the network's outputs on them, and what is measured."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from adaptive_tangents.capture.batches import tensors
from adaptive_tangents.errors import TangentError
from adaptive_tangents.inspection.outputs import Reduction, network_outputs, reduce_outputs, targets
from adaptive_tangents.inspection.tangents import Tangents, fitting_chunk
from adaptive_tangents.runs.user_files import Data, fit_data

_SAMPLES = 128


@dataclass(frozen=True)
class InspectConfig:
    """Settings: how many samples, which outputs and parameters, and how much work the costly measures may take.

    ``nodes`` are those of the path average; None doubles them, up to ``max_nodes``, until the identity holds to ``tol``. The
    limits are in floating-point operations, so that the same call leaves out the same blocks on every machine.
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
            raise TangentError(f"inspect: --samples must be at least 4, got {self.samples}")
        if (self.nodes is not None and self.nodes < 1) or self.max_nodes < 1 or not self.tol > 0:
            raise TangentError(f"inspect: nodes and tol must be positive, got {self}")

    def quick(self) -> "InspectConfig":
        """The same inspection with few samples and nodes, to see it work."""
        return replace(self, samples=min(self.samples, 32), nodes=4, explain_operations=2e9, fit_operations=2e10)


@dataclass(frozen=True)
class Problem:
    """The samples, the network's outputs on them at every checkpoint, and what is measured of these."""

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


def pose(model: nn.Module, states: Mapping[str, Mapping[str, Tensor]], data: Data, config: InspectConfig) -> Problem:
    """Choose samples, outputs, chunks and nodes within the memory. Raises TangentError if the outputs did not change."""
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
        limits = [
            f"Memory holds the features of {fitting} samples, so only that many of the {wanted} requested were used."
        ]
        count = fitting
    fresh = _fresh_norms(model, states[next(iter(states))])
    target, words = targets(reduction, chosen.y, gained.shape[1])
    return Problem(chosen, reduction, tangents, outputs, reduction.apply(gained), target, words, nodes, limits, fresh)


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
