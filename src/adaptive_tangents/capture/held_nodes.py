"""Deep autograd graphs, freed node by node.

Once Python has seen a node, torch frees it by recursion: the node's Python object frees the node, which frees the Python
object of the next node, and so on until the stack overflows. So the nodes of a deep graph are held here from the moment
that they are seen. A node is let go when nothing else holds it, and the nodes that it uses are held until then.
"""

import atexit
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from adaptive_tangents.runtime.cleanup import ensured

Node = Any  # torch.autograd.graph.Node, but TorchScript's nodes are not of that type

_SHALLOW = 1000  # nodes that recursion may free; each takes some 250 bytes of stack


def _references_to_a_variable() -> int:
    node = object()
    return sys.getrefcount(node)


_ALONE = _references_to_a_variable()


class HeldNodes:
    """The nodes of one graph that Python has seen: ``calls`` where layers end, and ``parents``, the users of each node."""

    def __init__(self) -> None:
        self.calls: list[Node] = []
        self.parents: dict[Node, list[tuple[Node, int, int]]] = {}
        self._counts: dict[Node, int] = {}
        self._ready: list[Node] = []
        self._interrupted = False
        self._lock = threading.RLock()

    def close(self) -> bool:
        """Count the users of every node; whether the graph is deep and must be freed node by node."""
        counts = dict.fromkeys(self.calls, 0) | {node: len(uses) for node, uses in self.parents.items()}
        self.calls, self.parents = [], {}
        if len(counts) > _SHALLOW:
            self._start(counts)
        return bool(self._ready)

    def _start(self, counts: Mapping[Node, int]) -> None:
        self._ready = [node for node, count in counts.items() if not count]
        self._counts = {node: count for node, count in counts.items() if count}

    def free(self) -> bool:
        """Let go of every node that nothing else holds; whether no node is left."""
        if self._lock._is_owned():  # type: ignore[attr-defined]
            return False  # this thread is at it, and runs a destructor
        return ensured(lambda: self._lock.acquire(blocking=False) and self._freed(), self._release)

    def _release(self) -> None:
        while self._lock._is_owned():  # type: ignore[attr-defined]
            self._lock.release()

    def _freed(self) -> bool:
        waiting: list[Node] = []
        try:
            if self._interrupted:
                self._start(_counted(self._ready))
                self._interrupted = False
            counts = self._counts
            again = True
            while again:  # as long as nodes go: one that waits may be held by one that goes
                again = False
                while self._ready:
                    node = self._ready.pop()
                    if sys.getrefcount(node) > _ALONE:
                        waiting.append(node)
                        continue
                    following = [successor for successor, _ in node.next_functions if successor in counts]
                    del node
                    again = bool(waiting)
                    while following:
                        successor = following.pop()
                        left = counts.get(successor, 1) - 1
                        if left:
                            counts[successor] = left
                        elif counts.pop(successor, None) is not None:
                            self._ready.append(successor)
                        del successor
                self._ready, waiting = waiting, []
        except BaseException:
            self._ready, self._counts, self._interrupted = [*self._counts, *self._ready, *waiting], {}, True
            raise
        return not self._ready


def _counted(nodes: list[Node]) -> dict[Node, int]:
    counts = dict.fromkeys(nodes, 0)
    for node in nodes:
        for successor, _ in node.next_functions:
            if successor in counts:
                counts[successor] += 1
    return counts


_graphs: dict[HeldNodes, None] = {}


@contextmanager
def held_nodes() -> Iterator[HeldNodes]:
    """Hold the nodes that are seen of one graph until nothing else holds them."""
    graph = HeldNodes()
    try:
        yield graph
    finally:
        if graph.close():
            _graphs[graph] = None


def free_graphs() -> None:
    """Free the deep graphs that nobody uses any more; those still in use are tried again at garbage collections."""
    for graph in list(_graphs):
        if graph.free():
            _graphs.pop(graph, None)
    if bool(_graphs) != (_at_collection in gc.callbacks):
        with suppress(ValueError):
            (gc.callbacks.append if _graphs else gc.callbacks.remove)(_at_collection)


def _at_collection(phase: str, info: Any) -> None:
    if phase == "stop":
        free_graphs()


def _in_child() -> None:
    """No other thread goes on freeing in a forked child."""
    for graph in _graphs:
        graph._lock = threading.RLock()


os.register_at_fork(after_in_child=_in_child)


@atexit.register
def _at_exit() -> None:
    """Leave the nodes of graphs still in use to the end of the process: nothing may free them by recursion."""
    free_graphs()
    if _graphs:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(_graphs))
