"""Room for deeply nested models under Python's recursion limit: our own frames take none of the model's."""

import copy
import os
import sys
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from adaptive_tangents.errors import TangentError
from adaptive_tangents.runtime.cleanup import ensured

_ROOM = 250  # frames that a call of the library may take besides the model's
_COPY_ROOM = 8  # frames of a copy for each of the model's; they take no space of the C stack

_Made = TypeVar("_Made")
_Given = ParamSpec("_Given")
_lock = threading.RLock()
_rooms: dict[tuple[int, object], int] = {}  # of the calls in progress, by thread
_last = (sys.getrecursionlimit(), 0, 0)  # the user's limit, the library's part, and both together before that


def users_limit() -> int:
    """The recursion limit without the library's part."""
    now = sys.getrecursionlimit()
    users, raised, before = _last
    # An interrupt may have come between noting a limit and setting it.
    return users if now in (users + raised, before) else now - raised


def set_users_limit(limit: int) -> None:
    """Put back what ``users_limit`` was, if a model changed it."""
    global _last
    with _lock:
        raised = sum(_rooms.values())
        _last = (limit, raised, sys.getrecursionlimit())
        if limit + raised != sys.getrecursionlimit():
            sys.setrecursionlimit(limit + raised)


def _settle() -> None:
    with _lock:
        set_users_limit(users_limit())


def room_for(call: str, body: Callable[[], _Made], room: int = _ROOM) -> _Made:
    """``body()``, in which a model may nest its calls as deeply as outside the library; deeper ones raise TangentError.

    The grad mode is as before afterwards, even after an interrupt.
    """
    key, gradients = (threading.get_ident(), object()), torch.is_grad_enabled()

    def entered() -> _Made:
        _rooms[key] = room
        _settle()
        try:
            return body()
        except RecursionError as error:
            raise TangentError(
                f"{call}: the model nests modules or calls deeper than Python's recursion limit allows; nest fewer, or "
                "raise the limit with sys.setrecursionlimit"
            ) from error

    def left() -> None:
        torch._C._set_grad_enabled(gradients)
        if _rooms.pop(key, None) is not None or users_limit() + sum(_rooms.values()) != sys.getrecursionlimit():
            _settle()

    return ensured(entered, left)


def _in_child() -> None:
    """A forked child has one thread: forget the calls of the others, which may have held the lock."""
    global _lock
    _lock = threading.RLock()
    for key in [key for key in _rooms if key[0] != threading.get_ident()]:
        del _rooms[key]
    _settle()


os.register_at_fork(after_in_child=_in_child)


def roomy(call: str) -> Callable[[Callable[_Given, _Made]], Callable[_Given, _Made]]:
    """A decorator: the function within ``room_for(call)``."""

    def decorate(function: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
        @wraps(function)
        def called(*arguments: _Given.args, **options: _Given.kwargs) -> _Made:
            return room_for(call, lambda: function(*arguments, **options))

        return called

    return decorate


def deep_copy(call: str, what: _Made, memo: dict[int, Any] | None = None) -> _Made:
    """A deep copy, which takes several times as many frames as a model's forward pass."""
    return room_for(call, lambda: copy.deepcopy(what, memo), _COPY_ROOM * sys.getrecursionlimit())
