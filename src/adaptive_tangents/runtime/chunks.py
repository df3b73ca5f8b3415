"""Ranges of indices, to work through a large dimension step by step."""

from collections.abc import Iterator


def ranges(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``total``."""
    for start in range(0, total, max(1, size)):
        yield slice(start, min(total, start + max(1, size)))
