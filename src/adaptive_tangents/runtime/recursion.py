"""Room for deeply nested models under Python's recursion limit: our own frames take none of the model's."""

import copy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from adaptive_tangents.errors import TangentError

_ROOM = 250  # frames that a call of the library may take besides the model's
_COPY_ROOM = 8  # frames of a copy for each of the model's; they take no space of the C stack

_Copied = TypeVar("_Copied")
_lock = threading.Lock()


_raised = 0  # by all calls in progress


def _raise_limit(by: int) -> None:
    global _raised
    with _lock:  # relative, so that calls in several threads, or within each other, undo their own part only
        sys.setrecursionlimit(sys.getrecursionlimit() + by)
        _raised += by


def users_limit() -> int:
    """The recursion limit without the library's part."""
    return sys.getrecursionlimit() - _raised


def set_users_limit(limit: int) -> None:
    """Put back what ``users_limit`` was, if a model changed it."""
    with _lock:
        if limit + _raised != sys.getrecursionlimit():
            sys.setrecursionlimit(limit + _raised)


@contextmanager
def room_for(call: str, room: int = _ROOM) -> Iterator[None]:
    """Let a model nest its calls as deeply as it may outside the library; deeper ones raise TangentError."""
    _raise_limit(room)
    try:
        yield
    except RecursionError as error:
        raise TangentError(
            f"{call}: the model nests modules or calls deeper than Python's recursion limit allows; nest fewer, or raise the "
            "limit with sys.setrecursionlimit"
        ) from error
    finally:
        _raise_limit(-room)


def deep_copy(call: str, what: _Copied, memo: dict[int, Any] | None = None) -> _Copied:
    """A deep copy, which takes several times as many frames as a model's forward pass."""
    with room_for(call, _COPY_ROOM * sys.getrecursionlimit()):
        return copy.deepcopy(what, memo)
