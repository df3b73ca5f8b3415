"""The continuation of every fit: stages with the penalty τΩ on transforms, τ falling to 1, each from the previous solution.

At τ = ∞ nothing adapts, and the fit is kernel regression. A solver defines how its state is refreshed, measured and moved;
this module calls these in order, ends stages and fits, and records the rounds.
"""

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from adaptive_tangents.errors import TangentError
from adaptive_tangents.linalg.conjugate_gradients import Progress
from adaptive_tangents.runtime import progress as runtime
from adaptive_tangents.solvers.problem import Tempered
from adaptive_tangents.solvers.results import Round
from adaptive_tangents.structures.base import Matrices

ZERO_TARGETS = "the targets are zero, and so is the model"
_STAGE = 3.0  # the factor by which τ falls
_NEAR_STAGE = 2.0  # the factor where systems know the curvature: every stage then takes a step or two
_LOOSE = 0.1  # stages before the last end at this stationarity
_MOST_STAGES = 34
_WEAK = 0.7  # the first stage has a penalty of at least this share of ‖β‖²: little adapts
_STILL, _NO_CHANGE = 10, 1e-13  # the objective is at rest after so many steps with a relative change below this


@dataclass
class Course:
    """The limits of a search and its rounds so far."""

    tol: float
    max_rounds: int
    progress: Progress | None = None
    watch: runtime.Progress = runtime.silent
    history: list[Round] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if not self.tol > 0 or self.max_rounds < 1:
            raise TangentError(f"fit: tol and max_rounds are positive, got {self.tol} and {self.max_rounds}")

    @property
    def wanted(self) -> float:
        """The stationarity asked of a solution."""
        return math.sqrt(self.tol)

    def record(self, problem: Tempered, objective: float, stationarity: float, **how: Any) -> None:
        """Add a round; ``how`` gives the last fields of ``Round``."""
        seconds = time.perf_counter() - self.started
        self.history.append(Round(objective, stationarity, seconds, problem.temper, **how))
        if self.progress is not None:
            self.progress(len(self.history), objective)


class Continuation(ABC):
    """A search from stage to stage. Subclasses hold its state and define how it is refreshed, measured and moved."""

    def __init__(self, problem: Tempered, course: Course) -> None:
        self._problem, self.course = problem, course
        self.gained, self.still = math.inf, 0  # the last step's relative decrease; steps in a row without any
        self.share = (0.0, 1.0)  # of all the work, where the stage starts and ends
        self.aim = course.wanted  # the stationarity at which the stage ends

    def follow(self, tempers: list[float]) -> tuple[bool, str]:
        """Run all stages; returns whether the optimum at τ = 1 was reached, and why the search stopped."""
        for done, temper in enumerate(tempers):
            self._problem.temper = temper
            self.enter()
            self.share = (done / len(tempers), (done + 1) / len(tempers))
            converged, reason = self.descend(last=temper == 1.0)
            if reason:
                break
        if self._problem.temper != 1.0:  # out of rounds before τ = 1
            self._problem.temper = 1.0
            self.enter()
        self.course.watch(f"τ = {self._problem.temper:g}", 1.0)
        return converged, reason

    def descend(self, *, last: bool) -> tuple[bool, str]:
        """Run a stage to its optimum, or near it; the reason is empty if the next stage should go on."""
        self.gained, self.still = math.inf, 0
        self.begin()
        (start, end), first, least = self.share, 0.0, math.inf
        aim = self.aim = self.course.wanted if last else _LOOSE
        while True:
            self.refresh()
            change, stationarity = self.measure()
            # Stationarity falls by a similar factor in every step.
            if math.isfinite(stationarity):
                first, least = max(first, stationarity), min(least, stationarity)
            within = math.log(first / max(least, aim)) / math.log(first / aim) if first > max(least, aim) else 0.0
            self.course.watch(f"τ = {self._problem.temper:g}", start + within * (end - start))
            stopped = self._stopped(change, stationarity, last=last)
            if stopped is not None:
                return stopped
            self.gained = self.step()
            self.still = self.still + 1 if self.gained <= _NO_CHANGE else 0

    def enter(self) -> None:  # noqa: B027
        """Move the state to the problem's τ."""

    def begin(self) -> None:  # noqa: B027
        """Prepare a stage."""

    def refresh(self) -> None:  # noqa: B027
        """Update what the last step made stale."""

    @abstractmethod
    def measure(self) -> tuple[float, float]:
        """The objective's relative change (in the last step, or expected of the next), and the stationarity."""

    @abstractmethod
    def step(self) -> float:
        """Move the state; returns the objective's relative decrease."""

    def _stopped(self, change: float, stationarity: float, *, last: bool) -> tuple[bool, str] | None:
        """Whether the search converged and why it stops; None to go on."""
        course, asked = self.course, self.course.wanted
        if last and change <= course.tol and stationarity <= asked:
            return True, f"objective changing by {change:.1e} relative, stationarity {stationarity:.1e}"
        if len(course.history) > course.max_rounds:
            return False, (
                f"stopped after {course.max_rounds} rounds with the objective changing by {change:.1e} relative (asked: "
                f"{course.tol:g}) and stationarity {stationarity:.1e} (asked: {asked:.1e}); raise max_rounds or tol"
            )
        if not last:
            return (False, "") if stationarity <= _LOOSE or self.still >= _STILL else None
        if self.still >= _STILL:
            return False, (
                f"the objective no longer changes in float64 but stationarity is {stationarity:.1e} (asked: "
                f"{asked:.1e}): adaptation this strong moves too slowly, or the kernel is ill-conditioned; raise tol, "
                "use a stronger penalty, or a positive ridge"
            )
        return None


def stages(problem: Tempered, coefficients: Matrices, *, near: bool = False) -> list[float]:
    """τ = …, 9, 3, 1, or …, 4, 2, 1 if ``near``, starting where little adapts at these coefficients."""
    whole = sum(float((matrix**2).sum()) for matrix in coefficients.values())
    found = [1.0]
    while len(found) < _MOST_STAGES:
        problem.temper = found[0]
        if problem.solution(coefficients).penalty >= _WEAK * whole:
            break
        found.insert(0, found[0] * (_NEAR_STAGE if near else _STAGE))
    return found
