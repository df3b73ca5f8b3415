"""When a record is due: its cost is measured and kept below a share of the time of training."""

from collections.abc import Callable
from dataclasses import dataclass, field

ALLOWED = 3.0  # seconds of records that any training has, however short
_LATEST = 3  # records whose slowest foretells what the next one takes


@dataclass(frozen=True)
class Cost:
    """What a tracker took.

    Attributes:
        seconds: of all records.
        training: seconds of training from the first record on, without those of records.
        records: how many there are.
    """

    seconds: float
    training: float
    records: int

    @property
    def share(self) -> float:
        """Seconds of records over seconds of training; infinite before there was training."""
        return self.seconds / self.training if self.training > 0 else (float("inf") if self.seconds else 0.0)


@dataclass
class Budget:
    """The clock of a training that is watched, and how many calls lie between two records.

    A record is due at calls that are multiples of the interval, ``every`` times a power of two, and only if all records
    together then stay below the share of the training so far. The interval follows what records and calls take. Until all
    records together have taken ``ALLOWED`` seconds, one is due at the calls 1, 2, 3, 4, 6, 8, 12, 16, … of ``every``, too, so
    that a training too short for its share has a curve.
    """

    share: float | None
    every: int
    clock: Callable[[], float]
    seconds: float = 0.0
    training: float = 0.0
    calls: int = 0
    recent: list[float] = field(default_factory=list)
    _mark: float | None = None

    def tick(self) -> None:
        """Count the time since the last call as training."""
        now = self.clock()
        if self._mark is not None:
            self.training += now - self._mark
        self._mark = now

    def spent(self, *, last: float | None = None) -> float:
        """Count the time since ``tick`` as the tracker's, and give it; ``last`` is what a record of this size takes."""
        now = self.clock()
        seconds = now - (self._mark if self._mark is not None else now)
        self.seconds, self._mark = self.seconds + seconds, now
        self.recent = [*self.recent, seconds if last is None else last][-_LATEST:]
        return seconds

    @property
    def interval(self) -> int:
        """Calls between two records, by what both took until now."""
        interval = self.every
        if self.share is None or not self.recent or not self.calls:
            return interval
        allowed = self.share * self.training / self.calls  # seconds of records for each call
        if allowed <= 0:
            return interval
        while interval * allowed < max(self.recent):
            interval *= 2
        return interval

    @property
    def due(self) -> bool:
        """Whether this call takes a record."""
        if not self.recent:
            return True
        if self.calls % self.every:
            return False
        if self.share is None:
            return True
        after = self.seconds + max(self.recent)
        if after <= ALLOWED and _sparse(self.calls // self.every):
            return True
        return self.calls % self.interval == 0 and after <= self.share * self.training


def _sparse(call: int) -> bool:
    """Whether a call is a power of two, or three times one."""
    while call and call % 2 == 0:
        call //= 2
    return call in (1, 3)
