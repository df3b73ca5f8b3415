"""What the command `forecast` will do and take, and the time that is left while its parts run."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from adaptive_tangents.capture.network import select
from adaptive_tangents.errors import TangentError
from adaptive_tangents.forecasting.cost import ForecastPlan
from adaptive_tangents.inspection.kept import Kept
from adaptive_tangents.inspection.plan import Plan, planned
from adaptive_tangents.inspection.problem import InspectConfig, pose
from adaptive_tangents.loading import Data
from adaptive_tangents.runtime.memory import format_bytes
from adaptive_tangents.runtime.progress import Progress, duration

NAME = "forecast"
_NEAR = (
    1e-2  # how much each parameter is changed, relative, where the measuring of an end that is not known yet is planned
)


@dataclass(frozen=True)
class ForetoldPlan:
    """What the command will do: the forecast, and the measuring of what it foretells, and of what happened if that is known.

    A plan of measuring is None where it can only be made once the end is known.
    """

    forecast: ForecastPlan
    measuring: tuple[Plan | None, ...]

    def __str__(self) -> str:
        lines, known = [str(self.forecast)], [plan for plan in self.measuring if plan is not None]
        if len(known) == len(self.measuring):
            after = sum(plan.seconds for plan in known)
            most = max(plan.bytes for plan in known)
            what = "it, and what happened," if len(known) > 1 else "it"
            lines.append(
                f"  then     {what} is measured on {known[0].samples} samples, as inspect does: about {duration(after)}, "
                f"at most {format_bytes(most)}"
            )
            least, largest = (duration(seconds + after) for seconds in self.forecast.seconds)
            lines.append(
                f"  in all   between {least} and {largest}" if least != largest else f"  in all   about {least}"
            )
        return "\n".join(lines)


def measuring(model: nn.Module, start: Mapping[str, Tensor], data: Data, config: InspectConfig) -> Plan | None:
    """The plan of measuring a change, made at an end near the start."""
    try:
        names = set(select(NAME, model, config.wrt))
        near = {name: value * (1 + _NEAR) if name in names else value for name, value in start.items()}
        problem = pose(model, {"start": start, "end": near}, data, config, Kept())
    except TangentError:  # the network does not change, or nothing fits: the run itself says so
        return None
    return planned(problem, ["start", "end"], config, Kept())


class Clock:
    """Progress of several parts, each of which tells the share of its own expected time, as the share of all."""

    def __init__(
        self, progress: Progress, later: Sequence[float], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.progress, self.clock, self.expected, self.later = progress, clock, 0.0, [*later]
        self._began: float | None = None

    def part(self, place: int) -> Progress:
        """Progress of a part: the forecast is the first."""
        began, first = list[float](), 0.0 if place == 0 else self.later[place - 1]
        rest = sum(self.later[place:])

        def tell(stage: str, fraction: float) -> None:
            now = self.clock()
            if not began:
                began.append(now)
            self._began = now if self._began is None else self._began
            spent, whole = now - began[0], now - self._began
            guess = first or self.expected
            left = spent * (1 - fraction) / fraction if fraction > 0 and spent > 0 else guess
            known = whole + left + rest
            self.progress(stage, whole / known if known > 0 else 0.0)

        return tell
