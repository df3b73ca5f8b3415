"""How long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Called with the name of a stage and the fraction of the work that is done."""


def silent(stage: str, fraction: float) -> None:
    """Progress that nobody watches."""
