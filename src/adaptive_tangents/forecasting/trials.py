"""The trials of a forecast: its candidates take their steps in turn, until held-out samples or a budget end them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from adaptive_tangents.forecasting.cost import Costs, epochs_of, epochs_of_features, stages_of, step_name, upcoming
from adaptive_tangents.forecasting.trust_region import Ground, Iterate, Step, Taken, Walk
from adaptive_tangents.runtime.pace import Pace
from adaptive_tangents.solvers.results import Fit
from adaptive_tangents.structures.base import Structure

MARGIN = 1.2  # of held-out losses, within which the structure that adapts more is taken
_PATIENCE = 2  # steps without a lower held-out loss, after which none are tried


@dataclass
class Trial:
    """The steps of one candidate, of which the first ``chosen`` have the least held-out loss, and where these lead."""

    name: str
    walk: Walk
    end: dict[str, Tensor]
    initial: Tensor | None
    held: Tensor | None
    steps: list[Step] = field(default_factory=list)
    fits: list[Fit] = field(default_factory=list)
    chosen: int = 0
    over: bool = False

    @property
    def structure(self) -> Structure:
        """Of its fits."""
        return self.walk.structure

    @property
    def mean(self) -> float:
        """The least held-out loss, a mean over the samples; 0 if none are held out."""
        return 0.0 if self.held is None else float(self.held.mean())

    @property
    def reason(self) -> str:
        """Why there were no more steps."""
        if self.steps and not self.chosen:
            return "no step lowers the held-out loss: what the training samples teach does not carry over to others"
        return self.walk.reason

    def advance(self, most: int) -> None:
        """Take the next step, if there is one; the trial is over after ``most``."""
        found = self.walk.step()
        if found is None:
            self.stop(self.walk.reason)
            return
        self._keep(found)
        if len(self.steps) - self.chosen >= _PATIENCE:
            self.stop(f"the held-out loss has not fallen for {_PATIENCE} steps")
        elif len(self.steps) == most:
            self.stop(f"all {most} steps were taken")

    def stop(self, reason: str) -> None:
        """Take no more steps."""
        self.walk.reason, self.walk.iterate, self.over = reason, None, True

    def _keep(self, found: Taken) -> None:
        self.steps.append(found.step)
        self.fits.append(found.fit)
        if self.initial is None or found.step.held_out < self.mean:
            self.chosen, self.end, self.held = len(self.steps), dict(found.parameters), found.held_losses


def trials(
    ground: Ground, start: Iterate, structures: Sequence[Structure], names: Sequence[str], relative_ridge: float
) -> list[Trial]:
    """The candidates at θ₀, whose features they share."""
    held = ground.held_losses(start.parameters)
    return [
        Trial(name, Walk(ground, each, relative_ridge, start), dict(start.parameters), held, held)
        for each, name in zip(structures, names, strict=True)
    ]


def run(
    found: Sequence[Trial], ground: Ground, outputs: int, most: int, max_epochs: float, pace: Pace, costs: Costs | None
) -> None:
    """Take steps in turn, at most ``most`` of each, while they stay within ``max_epochs``; ``costs`` tell the time left."""
    each, names = epochs_of_features(outputs), [trial.name for trial in found]
    while any(not trial.over for trial in found):
        taken, over = [len(trial.steps) for trial in found], [trial.over for trial in found]
        steps = upcoming(taken, over, most, epochs_of(ground.passes), each, max_epochs)
        if costs is not None:
            pace.replace(stages_of(steps, names, costs))
        if not steps:
            break
        k, step = steps[0]
        with pace.stage(step_name(names[k], step)):
            found[k].advance(most)
    for trial in found:
        if not trial.over:
            trial.stop(f"the next step would go beyond {max_epochs:g} epochs of passes (a larger max_epochs allows it)")


def chosen(found: Sequence[Trial]) -> Trial:
    """The candidate that adapts most of those whose held-out loss is at most a fifth above the least."""
    least = min(trial.mean for trial in found)
    return [trial for trial in found if trial.mean <= MARGIN * least][-1]
