"""The time that is left while planned work runs: the plan, corrected by what its stages took so far."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from adaptive_tangents.runtime.progress import Progress

Tick = Callable[[float], None]
_TRUST = 0.05  # of a kind of work: when this much is done, what was measured counts as much as the plan


@dataclass(frozen=True)
class Stage:
    """A stage by name, its seconds as planned, the kind of work, whose stages all run at one speed, and passes.

    ``told`` is the part of its seconds that its ticks tell of; what comes after the last of them has none.
    """

    name: str
    seconds: float
    kind: str
    passes: int = 0
    told: float = 1.0


class Pace:
    """The seconds of each stage, and progress as the share of the time that a run is expected to take.

    What is measured corrects the plan: each kind of work has its own speed, relative to the plan, and as long as little of it
    is done, the speed of all work so far counts, too.
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

    def replace(self, stages: Sequence[Stage]) -> None:
        """Set anew what is left to be done."""
        self._planned = dict(self._done)
        self.expect(stages)

    @contextmanager
    def stage(self, name: str) -> Iterator[Tick]:
        """Time one stage; yields a function to call with the fraction done."""
        began = self.clock()
        part = self._todo[name].told if name in self._todo else 1.0
        self._tell(name, 0.0, 0.0)
        yield lambda fraction: self._tell(name, part * fraction, self.clock() - began)
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
        # What slows one kind slows the others only in part: the load of the machine does, a wrong plan does not.
        prior = math.sqrt(whole)
        return sum(
            _slowness(took[kind], done[kind], total, prior) * max(0.0, total - done[kind])
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
