"""What an inspection will do and take, told before it starts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adaptive_tangents.features.plans import WORKING_BYTES, matmul_speed, plan_block
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.inspection.kept import Kept
from adaptive_tangents.inspection.measures import explain_groups, model_operations
from adaptive_tangents.inspection.problem import InspectConfig, Problem
from adaptive_tangents.inspection.tangents import averaged
from adaptive_tangents.runtime.memory import format_bytes
from adaptive_tangents.runtime.pace import Stage
from adaptive_tangents.runtime.progress import duration

# Of the speed of a large matrix product, what models and kernels in double precision reach; from benchmarks/bench_inspect.py.
_MODELS_SHARE, _WIDE_SHARE = 0.6, 0.5
_KINDS = {"features": "passes and kernels", "explain": "transforms", "models": "models"}
_PROBED = 12  # samples that each new part of a batch costs besides its own


@dataclass(frozen=True)
class Plan:
    """The stages to do, passes of all samples through the network forward and backward, and the most bytes held."""

    samples: int
    outputs: int
    parameters: int
    blocks: int
    nodes: int
    passes: int
    feature_bytes: int
    average_bytes: int
    bytes: int
    stages: tuple[Stage, ...]
    finished: int = 0

    @property
    def seconds(self) -> float:
        """Seconds of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def __str__(self) -> str:
        outputs = "1 output" if self.outputs == 1 else f"{self.outputs} outputs"
        seconds = {kind: sum(s.seconds for s in self.stages if s.kind == kind) for kind in _KINDS}
        most = ", ".join(f"{words} {duration(seconds[kind])}" for kind, words in _KINDS.items() if seconds[kind] > 0)
        lines = [
            f"Plan: {self.samples} samples, {outputs}, {self.parameters:,} parameters in {self.blocks} blocks",
            f"  passes   {self.passes} of all samples forward and backward; the path average has {self.nodes} nodes",
            f"  memory   at most {format_bytes(self.bytes)} besides the network; features of one state take "
            f"{format_bytes(self.feature_bytes)}, averaged ones {format_bytes(self.average_bytes)}",
            f"  time     about {duration(self.seconds)}" + (f": {most}" if most else ""),
        ]
        if self.finished:
            lines.append(f"  resumed  {self.finished} stages were finished before")
        return "\n".join(lines)


def planned(problem: Problem, names: Sequence[str], config: InspectConfig, kept: Kept) -> Plan:
    """What is still to be measured at the states of these names, from one sample's features and a pass's seconds."""
    one, tangents, n, nodes = problem.layout, problem.tangents, problem.data.n, problem.nodes
    several = averaged(one, nodes)
    probes = _PROBED * -(-n // tangents.chunk)
    state, average = (problem.seconds * (count * n + probes) for count in (1, nodes))
    own, double = one.dtype, matmul_speed(torch.float64, one.device)
    kernel, wide = _kernel_seconds(one, n, own), _kernel_seconds(one, n, torch.float64) / _WIDE_SHARE
    stages = [
        _features("start", state, wide),
        _features("end", state, kernel),
        _features("average", average, _kernel_seconds(several, n, own), nodes),
    ]
    for k, (_, work) in enumerate(explain_groups(one, several, n), start=1):
        stages.append(Stage(f"explain {k}", work / double, "explain"))
    work = model_operations(one, n, config.fit_operations)
    stages.append(Stage("models", work / (_MODELS_SHARE * double), "models"))
    stages += [_features(f"checkpoint {name}", state, kernel) for name in list(names)[1:-1]]
    left = [stage for stage in stages if kept.get(stage.name) is None]
    kinds = {stage.kind for stage in left}
    again = {"average": (average, nodes, {"explain"}), "start": (state, 1, {"explain", "models"})}
    for name, (seconds, passes, users) in again.items():
        if kept.get(name) is not None and kinds & users:
            left.insert(0, Stage(f"{name} again", seconds, "features", passes))
    held = n * (problem.cost.kept + 2 * problem.cost.kept_average)
    return Plan(
        n, one.c, one.p, len(one.blocks), nodes, sum(stage.passes for stage in left), n * problem.cost.kept,
        n * problem.cost.kept_average, held + min(n, tangents.chunk) * problem.cost.making, tuple(left),
        len(stages) - len([stage for stage in left if not stage.name.endswith(" again")]),
    )  # fmt: skip


def _features(name: str, made: float, kernels: float, passes: int = 1) -> Stage:
    """A stage of features, which tell how far they are, and of their kernels, which do not."""
    return Stage(name, made + kernels, "features", passes, made / max(made + kernels, 1e-300))


def _kernel_seconds(one: TangentFeatures, n: int, dtype: torch.dtype) -> float:
    """Seconds of the kernels of all blocks of n samples."""
    plans = (
        plan_block(b, b, n, n, one.c, "trace", symmetric=True, budget=WORKING_BYTES, itemsize=dtype.itemsize)
        for b in one.blocks.values()
    )
    return sum(plan.effort for plan in plans) / matmul_speed(dtype, one.device)
