"""Cleaning up after a call, whatever interrupts it.

Python raises an interrupt where it enters a function, after a call, and where a loop goes on; never between entering
``finally`` and the first call there. A context manager has such places before it is entered and before it is left, so what
must be put back is put back here.
"""

import importlib
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

_Made = TypeVar("_Made")
_MOST = 100  # interrupts of one step


def ensured(body: Callable[[], _Made], clean: Callable[[], object]) -> _Made:
    """``body()`` and then ``clean()``, to its end; ``clean`` may be called again, before or after it was complete."""
    # Each interrupt that comes outside of the `try` in `_surely` costs one of these levels.
    try:
        return body()
    finally:
        try:
            _surely(clean)
        finally:
            try:
                _surely(clean)
            finally:
                _surely(clean)


def import_whole(name: str) -> None:
    """Import a large module in a thread of its own, which no interrupt reaches; half imported, some cannot be used again."""
    if name not in sys.modules:
        thread = threading.Thread(target=importlib.import_module, args=(name,))

        def wait() -> None:
            if thread.ident is not None:
                thread.join()

        ensured(thread.start, wait)


def _surely(step: Callable[[], object]) -> None:
    """Take a step that may be repeated, to its end; an interrupt that comes meanwhile is raised afterwards."""
    came: BaseException | None = None
    for _ in range(_MOST):
        try:
            step()
            break
        except BaseException as interrupt:  # a signal's handler may raise anything
            came = interrupt
    if came is not None:
        raise came
