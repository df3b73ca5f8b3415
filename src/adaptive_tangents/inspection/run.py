"""Run an inspection: from a model, checkpoints and data to the numbers and arrays of the report."""

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_tangents.capture.batches import Batch, mapped
from adaptive_tangents.capture.complex_parameters import as_real
from adaptive_tangents.capture.path_average import AverageFeatures
from adaptive_tangents.checks import listed
from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.inspection import measures
from adaptive_tangents.inspection.held_out import held_out_numbers
from adaptive_tangents.inspection.judged import BINARY, WORDS
from adaptive_tangents.inspection.kept import Kept, Record
from adaptive_tangents.inspection.measures import defined, singular_values, total
from adaptive_tangents.inspection.names import renamed
from adaptive_tangents.inspection.plan import Plan, planned
from adaptive_tangents.inspection.problem import InspectConfig, Problem, pose
from adaptive_tangents.inspection.tangents import Tick
from adaptive_tangents.inspection.tangents import averaged as averaged_form
from adaptive_tangents.inspection.told import Measured, arrays_of, checkpoint, told
from adaptive_tangents.loading import Data
from adaptive_tangents.loading.checkpoint_order import doubted
from adaptive_tangents.measures.alignment import alignment
from adaptive_tangents.runs.record import RunResult, versions
from adaptive_tangents.runtime.pace import Pace
from adaptive_tangents.runtime.progress import Progress, silent
from adaptive_tangents.runtime.tensor_files import fingerprint
from adaptive_tangents.storage.provenance import batch_fingerprint

NAME = "inspect"


class _Stages:
    """Stages one after the other, each kept once it is finished.

    After an interruption the others are not begun, and ``missing`` names them all.
    """

    def __init__(self, problem: Problem, states: Mapping[str, Mapping[str, Tensor]], pace: Pace, kept: Kept) -> None:
        first, *_, last = states
        self.problem, self.pace, self.kept = problem, pace, kept
        self.start, self.end = (states[name] for name in (first, last))
        self.missing: list[str] = []
        self._held: dict[str, TangentFeatures] = {}

    def made(self, name: str, make: Callable[..., Record], needs: Sequence[str] = ()) -> Record | None:
        """What a stage finds, now or before; None if it was interrupted. It takes a tick and the features it needs."""
        if not self.missing:
            with suppress(KeyboardInterrupt):
                return self.surely(name, make, needs)
        found = self.kept.get(name)
        if found is None:
            self.missing.append(name)
            return None
        return found.copied()

    def surely(self, name: str, make: Callable[..., Record], needs: Sequence[str] = ()) -> Record:
        """The same, without which there is nothing to report."""
        found = self.kept.get(name)
        if found is None:
            again = [need for need in needs if need not in self._held]
            for need in again:  # found before an interruption
                with self.pace.stage(f"{need} again") as tick:
                    self.features(need, tick)
            with self.pace.stage(name) as tick:
                found = make(tick, *(self._held[need] for need in needs))
                self.kept.put(name, found)
        return found.copied()

    def features(self, which: str, tick: Tick) -> TangentFeatures:
        """Features at the start, or averaged, made once and held until they are dropped."""
        if which not in self._held:
            tangents, start = self.problem.tangents, self.start
            made = (
                tangents.at(start, tick)
                if which == "start"
                else tangents.average(start, self.end, self.problem.nodes, tick)
            )
            self._held[which] = made
        return self._held[which]

    def drop(self, which: str) -> None:
        """Free features that no further stage needs."""
        self._held.pop(which, None)


_SAID = {"average": "the average over the path", "models": "the exact models"}


def run(
    model: nn.Module,
    states: Mapping[str, Mapping[str, Tensor]],
    data: Data,
    config: InspectConfig | None = None,
    *,
    progress: Progress = silent,
    show: Callable[[Plan], None] = lambda plan: None,
    kept: Kept | None = None,
    names: Mapping[str, str] | None = None,
) -> RunResult:
    """Measure the change between the first and the last of a network's states, which are named and in order of training.

    ``show`` is called with the plan once it is made, and ``progress`` with the stage and the share of the expected time that
    has passed. ``kept`` holds finished stages, and what an earlier run with the same arguments finished is not made again.
    ``names`` are parameters and modules with other names to tell them by, as ``Series.names`` has them.
    A KeyboardInterrupt once the kernels of start and end are made gives the results so far, and ``results["interrupted"]``
    names what is missing. Raises TangentError if data, states and model do not fit together, or if nothing changed; warns if
    the network got worse.

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
    kept = Kept() if kept is None else kept
    if any(module.training for module in model.modules()):
        model.eval()
    pace, cpu = Pace(progress), time.process_time()
    kept.claim(_origin(model, states, data, config))
    with pace.stage("outputs"):
        problem = pose(model, states, data, config, kept)
        plan = planned(problem, list(states), config, kept)
    pace.expect(plan.stages)
    show(plan)
    performances = problem.performances
    doubt = disagreement(list(states), performances)
    if doubt is not None:
        problem.limits.append(doubted(doubt))
        warnings.warn(f"inspect: {doubt}", TangentWarning, stacklevel=2)
    stages = _Stages(problem, states, pace, kept)
    measured = _measure(problem, config, stages)
    trajectory = _trajectory(problem, states, measured.wholes, performances, stages)
    if stages.missing:
        problem.limits.insert(0, f"The run was interrupted, so these are missing: {listed(_said(stages.missing))}.")
    numbers = told(model, data, problem, measured)
    numbers["data"]["fingerprint"] = sample_fingerprint(problem.data.x)
    results = {
        "experiment": NAME,
        "config": asdict(config),
        "seed": config.seed,
        "versions": versions(),
        "device": str(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
        **numbers,
        "held_out": held_out_numbers(problem, measured.wholes),
        "trajectory": trajectory,
        "interrupted": _said(stages.missing),
        "plan": {"passes": plan.passes, "bytes": plan.bytes, "seconds": {s.name: s.seconds for s in plan.stages}},
        "wall_seconds": pace.seconds | {"total": pace.clock() - pace.started},
        "cpu_seconds": time.process_time() - cpu,
    }
    return renamed(RunResult(results, arrays_of(problem, measured)), names or {})


def _origin(
    model: nn.Module, states: Mapping[str, Mapping[str, Tensor]], data: Data, config: InspectConfig
) -> dict[str, str]:
    """What the stages of a run are made from; the network's code shows in its outputs and derivatives."""
    return {
        "versions": json.dumps(versions()),
        "settings": json.dumps(asdict(config)),
        "samples": fingerprint(
            {"x": batch_fingerprint(data.x), "y": data.y, "classes": data.classes, "held_out": data.held_out}
        ),
        **{f"checkpoint {name}": fingerprint(state) for name, state in states.items()},
    }


def sample_fingerprint(x: Batch) -> str:
    """The hash of the samples measured, the same for networks of other precisions and on other devices."""
    return batch_fingerprint(mapped(x, lambda value: value.float() if value.is_floating_point() else value))


def _said(stages: Sequence[str]) -> list[str]:
    """Stages in words, each once."""
    return list(dict.fromkeys("structured transforms" if s.startswith("explain ") else _SAID.get(s, s) for s in stages))


def disagreement(names: list[str], performances: list[dict[str, float] | None]) -> str | None:
    """A sentence if the network got worse in the order given, by accuracy or error on the measured samples."""
    told = [next(iter(performance.items())) for performance in performances if performance is not None]
    if len(told) < 2 or len(told) != len(names):
        return None
    kind, sign = told[0][0], 1 if told[0][0] == "accuracy" else -1
    name = WORDS[kind] if kind == BINARY else kind
    first, *_, last = (value for _, value in told)
    best = max(range(len(told)), key=lambda k: sign * told[k][1])
    gained, most = sign * (last - first), sign * (told[best][1] - first)
    if gained >= 0 and (most == 0 or gained >= most / 2):
        return None
    if gained < 0:
        moved = f"{name} {'falls' if sign > 0 else 'rises'} from {first:.3g} at {names[0]} to {last:.3g} at {names[-1]}"
    else:
        moved = f"{name} is {last:.3g} at {names[-1]}, but {told[best][1]:.3g} at {names[best]} before it"
    return (
        f"{moved}; check the order of the checkpoints: if it is wrong, the findings say the opposite of what happened"
    )


def _measure(problem: Problem, config: InspectConfig, stages: _Stages) -> Measured:
    """Measure at the start, at the end and along the path; features are freed as soon as they are used."""
    tangents, start, end = problem.tangents, stages.start, stages.end
    device, layout = problem.change.device, problem.layout

    def at_start(tick: Tick) -> Record:
        return Record({}, stages.features("start", tick).kernel(outputs="trace", by_block=True, precision="float64"))

    def averaged(tick: Tick) -> Record:
        average = stages.features("average", tick)
        assert isinstance(average, AverageFeatures)
        return Record(_identity(problem, average), _by_block(average))

    def explained(names: list[str], tick: Tick, initial: TangentFeatures, average: TangentFeatures) -> Record:
        return Record(measures.explained(initial, average, names, tick))

    def models(tick: Tick, initial: TangentFeatures) -> Record:
        work = measures.fit_operations(layout, problem.data.n)
        found = measures.fit_models(
            initial, kernels["initial"], problem.change, goal, config.fit_operations, work, tick
        )
        values = {f"{key}.{name}": each for key, parts in found.values.items() for name, each in parts.items()}
        return Record({"models": found.numbers, "left_out": found.left_out}, values)

    found = {"initial": stages.surely("start", at_start)}
    final = stages.surely("end", lambda tick: Record({}, _by_block(tangents.at(end, tick))))
    average = stages.made("average", averaged)
    if average is not None:
        found["average"] = average
    found["final"] = final
    kernels = {
        stage: {name: kernel.to(device) for name, kernel in record.tensors.items()} for stage, record in found.items()
    }
    squares: dict[str, dict[str, list[float]]] = {}
    for k, (names, _) in enumerate(
        measures.explain_groups(layout, averaged_form(layout, problem.nodes), problem.data.n), start=1
    ):
        group = stages.made(f"explain {k}", partial(explained, names), ("start", "average"))
        for key, pairs in (group.numbers if group is not None else {}).items():
            squares.setdefault(key, {}).update(pairs)
    stages.drop("average")
    wholes = {stage: total(parts) for stage, parts in kernels.items()}
    goal = defined(alignment, wholes.get("average"), problem.change)
    fits = stages.made("models", models, ("start",))
    stages.drop("start")
    before, after = (
        torch.cat([as_real(state[name]).flatten() for name in layout.parameters]) for state in (start, end)
    )
    changes = layout.split(after - before)
    return Measured(
        kernels, wholes, _NO_PATH if average is None else dict(average.numbers),
        measures.r2_of(squares),
        Record({"models": {}, "left_out": None}) if fits is None else fits,
        changes, layout.split(before), {name: singular_values(m) for name, m in changes.items()},
        squares,
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

    def kernel_at(name: str, tick: Tick) -> Record:
        feats = problem.tangents.at(states[name], tick)
        return Record({}, {"kernel": feats.kernel(outputs="trace").double()})

    for name, performance in zip(states, performances, strict=True):
        kernel = ends.get(name)
        if kernel is None:
            made = stages.made(f"checkpoint {name}", partial(kernel_at, name))
            kernel = None if made is None else made.tensors["kernel"].to(wholes["initial"].device)
        if kernel is not None:
            found.append(checkpoint(name, kernel, wholes, problem, performance))
    return found


_NO_PATH: dict[str, Any] = dict.fromkeys(("error", "error_db", "nodes", "through_buffers", "buffers_moved"))


def _identity(problem: Problem, average: AverageFeatures) -> dict[str, float | None]:
    """The path identity's error, and how much of the outputs' change went through the buffers."""
    moved, change = average.buffer_change, problem.change.double()
    through = 0.0 if moved is None else float((moved * change).sum()) / float(change.norm()) ** 2
    return {
        "error": average.error,
        "error_db": min(average.error_db, 300.0),
        "nodes": average.nodes,
        "through_buffers": through,
        "buffers_moved": 0 if moved is None else 1,
    }
