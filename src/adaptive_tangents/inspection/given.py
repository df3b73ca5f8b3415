"""What ``inspect`` is given in Python: a network, its states and samples, in any of their forms."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from adaptive_tangents.errors import TangentError
from adaptive_tangents.inspection.run import NAME
from adaptive_tangents.loading import Series, as_state, open_series

IN_MEMORY = "data in memory"


def opened(
    model: nn.Module | str | None, start: Any, end: Any, between: Any, base: str | os.PathLike[str] | None, merged: bool
) -> Series:
    """The network and the states of start, checkpoints and end."""
    where = None if base is None else Path(base)
    found = open_series(NAME, model=model, start=start, end=end, base=where, merged=merged)
    states = dict(found.states)
    if end is None and len(states) == 1:  # a folder of checkpoints gives more
        states["end"] = as_state(found.model, found.model, NAME)
    if between:
        titles = (
            between if isinstance(between, Mapping) else {_title(k, each): each for k, each in enumerate(between, 1)}
        )
        middle = {title: as_state(each, found.model, NAME, title) for title, each in titles.items()}
        if set(middle) & set(states) or len(middle) != len(between):
            raise TangentError(
                f"{NAME}: checkpoints are named {', '.join(map(repr, titles))}, and start and end "
                f"{', '.join(map(repr, states))}; give other titles, as a mapping"
            )
        first, *_, last = states
        states = {first: states[first], **middle, last: states[last]}
    return replace(found, states=states)


def _title(k: int, state: Any) -> str:
    return Path(state).stem if isinstance(state, str | os.PathLike) else f"checkpoint {k}"


def name_of(data: Any) -> str:
    """What the samples are called."""
    return Path(data).name if isinstance(data, str | os.PathLike) else IN_MEMORY
