"""A tracker on disk: one safetensors file of its kernels, with its records as JSON in the header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.runtime.tensor_files import ReadError, read_metadata, read_tensors, write_tensors
from adaptive_tangents.tracking.budget import Cost
from adaptive_tangents.tracking.history import History
from adaptive_tangents.tracking.records import record_of

KIND, FORMAT = "adaptive-tangents tracker", 1
State = Mapping[str, Any]
"""What ``Tracker.state_dict`` gives: numbers, strings and lists of them under "numbers", tensors under "tensors"."""


def write_state(path: Path, state: State) -> None:
    """Write a state; raises TangentError where that is not possible."""
    try:
        write_tensors(path, state["tensors"], {"tracker": json.dumps(state["numbers"])})
    except OSError as error:
        raise TangentError(f"save: {path} cannot be written ({error}); give another path") from error


def read_state(path: Path, call: str) -> dict[str, Any]:
    """The state in a file; raises TangentError if it is none."""
    try:
        head, tensors = read_metadata(path), read_tensors(path)
    except ReadError as error:
        raise TangentError(f"{call}: {path} cannot be read ({error}); give a file that Tracker.save wrote") from error
    try:
        state = {"numbers": json.loads(head["tracker"]), "tensors": tensors}
    except (KeyError, ValueError):
        state = {}
    check_state(state, call, str(path))
    return state


def check_state(state: object, call: str, what: str = "the state") -> None:
    """Raise TangentError unless this is a state of a tracker, of this version."""
    numbers = state.get("numbers") if isinstance(state, Mapping) else None
    known = isinstance(numbers, Mapping) and (numbers.get("kind"), numbers.get("format")) == (KIND, FORMAT)
    if not known:
        raise TangentError(
            f"{call}: {what} is no tracker of this version; give what Tracker.save wrote, or Tracker.state_dict() gave"
        )


def history_of(state: State, call: str, what: str = "the state") -> History:
    """The records in a state."""
    numbers = state["numbers"]
    try:
        records = tuple(record_of(row) for row in numbers["records"])
        cost = Cost(numbers["seconds"], numbers["training"], len(records))
        return History(records, numbers["note"], cost, numbers["budget"])
    except (KeyError, TypeError, AttributeError) as error:
        raise TangentError(f"{call}: {what} is damaged ({error}); give what Tracker.save wrote") from error


def load_history(path: str | Path) -> History:
    """The records that ``Tracker.save`` wrote, without the network: a table, a picture, a summary.

    Args:
        path: of the file.

    Raises:
        TangentError: when the file cannot be read, or is no tracker.
    """
    call = "load_history"
    return history_of(read_state(Path(path), call), call, str(path))


def tensors_under(state: State, prefix: str) -> dict[str, Tensor]:
    """The tensors of a state whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in state["tensors"].items() if name.startswith(prefix)}
