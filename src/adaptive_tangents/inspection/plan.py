"""What an inspection will do and take, told before it starts, and the time that is left while it runs."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from adaptive_tangents.features.plans import WORKING_BYTES, matmul_speed, plan_block
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.inspection.kept import Kept
from adaptive_tangents.inspection.measures import explain_groups, model_operations
from adaptive_tangents.inspection.problem import InspectConfig, Problem
from adaptive_tangents.inspection.tangents import Tick, averaged
from adaptive_tangents.runtime.memory import format_bytes
from adaptive_tangents.runtime.progress import Progress, duration

# What a stage reaches of the speed of a large matrix product; measured in benchmarks/bench_inspect.py.
_SHARES = {"explain": 0.3, "models": 0.25}
_KINDS = {"features": "passes and kernels", "explain": "transforms", "models": "models"}
_PROBED = 12  # samples that each new part of a batch costs besides its own
_TRUST = 0.02  # of a kind of work: when this much is done, what was measured counts as much as the plan


@dataclass(frozen=True)
class Stage:
    """A stage by name, its seconds as planned, the kind of work, whose stages all run at one speed, and passes."""

    name: str
    seconds: float
    kind: str
    passes: int = 0


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
    kernel = _kernel_seconds(one, n, own)
    stages = [
        Stage("start", state + _kernel_seconds(one, n, torch.float64), "features", 1),
        Stage("end", state + kernel, "features", 1),
        Stage("average", average + _kernel_seconds(several, n, own), "features", nodes),
    ]
    for k, (_, work) in enumerate(explain_groups(one, several, n), start=1):
        stages.append(Stage(f"explain {k}", work / (_SHARES["explain"] * double), "explain"))
    work = model_operations(one, n, config.fit_operations)
    stages.append(Stage("models", work / (_SHARES["models"] * double), "models"))
    stages += [Stage(f"checkpoint {name}", state + kernel, "features", 1) for name in list(names)[1:-1]]
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


def _kernel_seconds(one: TangentFeatures, n: int, dtype: torch.dtype) -> float:
    """Seconds of the kernels of all blocks of n samples."""
    plans = (
        plan_block(b, b, n, n, one.c, "trace", symmetric=True, budget=WORKING_BYTES, itemsize=dtype.itemsize)
        for b in one.blocks.values()
    )
    return sum(plan.effort for plan in plans) / matmul_speed(dtype, one.device)


class Pace:
    """The seconds of each stage, and progress as the share of the time that a run is expected to take.

    What is measured corrects the plan: each kind of work has its own speed, relative to the plan, and as long as little of it
    is done, the speed of all work so far.
    """

    def __init__(self, progress: Progress, clock: Callable[[], float] = time.perf_counter) -> None:
        self.progress, self.clock = progress, clock
        self.started = clock()
        self.seconds: dict[str, float] = {}
        self._todo: dict[str, Stage] = {}
        self._planned = dict[str, float]()
        self._done, self._spent = dict[str, float](), dict[str, float]()

    def expect(self, stages: Sequence[Stage]) -> None:
        """Set what is to be done."""
        self._todo = {stage.name: stage for stage in stages}
        for stage in stages:
            self._planned[stage.kind] = self._planned.get(stage.kind, 0.0) + stage.seconds
            self._done.setdefault(stage.kind, 0.0)
            self._spent.setdefault(stage.kind, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[Tick]:
        """Time one stage; yields a function to call with the fraction done."""
        began = self.clock()
        self._tell(name, 0.0, 0.0)
        yield lambda fraction: self._tell(name, fraction, self.clock() - began)
        self.seconds[name] = self.clock() - began
        self._tell(name, 1.0, self.seconds[name])
        stage = self._todo.pop(name, None)
        if stage is not None:
            self._done[stage.kind] += stage.seconds
            self._spent[stage.kind] += self.seconds[name]

    def left(self, name: str = "", fraction: float = 0.0, spent: float = 0.0) -> float:
        """Seconds still to go, at a fraction of the named stage that took ``spent`` seconds so far."""
        done, took = dict(self._done), dict(self._spent)
        running = self._todo.get(name)
        if running is not None:
            done[running.kind] += fraction * running.seconds
            took[running.kind] += spent
        whole = _slowness(sum(took.values()), sum(done.values()), sum(self._planned.values()), 1.0)
        return sum(
            _slowness(took[kind], done[kind], total, whole) * max(0.0, total - done[kind])
            for kind, total in self._planned.items()
        )

    def _tell(self, name: str, fraction: float, spent: float) -> None:
        elapsed = self.clock() - self.started
        share = elapsed / (elapsed + self.left(name, fraction, spent)) if self._planned and elapsed > 0 else 0.0
        self.progress(name, share)


def _slowness(took: float, done: float, total: float, prior: float) -> float:
    """How many times as long as planned work takes, when ``done`` of ``total`` planned seconds took ``took``.

    It is a geometric mean with the prior, so that twice as fast and twice as slow weigh the same.
    """
    if done <= 0 or took <= 0:
        return prior
    trust = _TRUST * total
    return math.exp((done * math.log(took / done) + trust * math.log(prior)) / (done + trust))
