"""A user's network in evaluation mode for a while, and then in the modes in which it was found."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from adaptive_tangents.runtime.cleanup import ensured

_Made = TypeVar("_Made")
_LOCK = threading.RLock()


@dataclass
class _Use:
    """The modes in which a network was found, and the calls that it is in evaluation mode for."""

    modes: list[tuple[nn.Module, bool]]
    calls: set[object] = field(default_factory=set)


_uses: dict[int, _Use] = {}  # by the network's id; the modes hold the network


def in_evaluation(model: nn.Module, body: Callable[[], _Made]) -> _Made:
    """``body()`` with every module in evaluation mode; the last of several calls puts the modes back.

    Flags are set, and ``eval()`` is not called: some networks change their weights when it is.
    """
    call = object()

    def enter() -> None:
        with _LOCK:
            use = _uses.setdefault(id(model), _Use([(module, module.training) for module in model.modules()]))
            use.calls.add(call)
            for module, _ in use.modes:
                module.training = False

    def leave() -> None:
        with _LOCK:
            use = _uses.get(id(model))
            if use is None or call not in use.calls:
                return
            if use.calls == {call}:
                for module, training in use.modes:
                    module.training = training
                del _uses[id(model)]
            use.calls.discard(call)

    def within() -> _Made:
        enter()
        return body()

    return ensured(within, leave)
