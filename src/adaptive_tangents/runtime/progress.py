"""How long work tells how far it is, and how times are told."""

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Called with the name of a stage and the fraction of the work that is done."""


def silent(stage: str, fraction: float) -> None:
    """Progress that nobody watches."""


def duration(seconds: float) -> str:
    """A time to read.

    >>> duration(0.2), duration(75), duration(5400)
    ('1 s', '75 s', '90 min')
    """
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
