"""What callbacks share: their options, and base classes that are imported when a callback is made."""

import importlib
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from adaptive_tangents.errors import TangentError
from adaptive_tangents.tracking.tracker import Tracker

_made: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def base_class(call: str, modules: tuple[str, ...], name: str, package: str) -> type[Any]:
    """A class of the first of some modules that is there, one already imported if any; raises TangentError if none is."""
    for module in sorted(modules, key=lambda each: each not in sys.modules):
        try:
            found: type[Any] = getattr(importlib.import_module(module), name)
        except ImportError as error:
            if error.name is not None and not module.startswith(error.name):
                raise
        else:
            return found
    raise TangentError(
        f"{call}: {package} is not installed; pip install 'adaptive-tangents[integrations]', or call record(step) of an "
        "at.Tracker in the loop of training"
    )


def joined(kind: type[Any], base: type[Any]) -> type[Any]:
    """A subclass of both, under the name of the first; always the same."""
    if (kind, base) not in _made:
        _made[kind, base] = type(kind.__name__, (kind, base), {"__doc__": kind.__doc__, "__module__": kind.__module__})
    return _made[kind, base]


def check_options(call: str, options: Mapping[str, Any]) -> None:
    """Raise TangentError for options that ``Tracker`` does not take; ``log`` is the trainer's own."""
    known = [
        name
        for name in inspect.signature(Tracker.__init__).parameters
        if name not in ("self", "model", "x", "y", "log")
    ]
    for name in options:
        if name not in known:
            raise TangentError(f"{call}: there is no option {name!r}; at.Tracker takes {', '.join(known)}")
