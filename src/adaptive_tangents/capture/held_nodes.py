"""Deep autograd graphs, freed node by node.

Once Python has seen a node, torch frees it by recursion: the node's Python object frees the node, which frees the Python
object of the next node, and so on until the stack overflows. So the nodes of a deep graph are held here from the moment
that they are seen. A node is let go when nothing else holds it, and the nodes that it uses are held until then.
"""

import atexit
import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

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
        self._lock = threading.Lock()

    def close(self) -> bool:
        """Count the users of every node; whether the graph is deep and must be freed node by node."""
        counts = dict.fromkeys(self.calls, 0) | {node: len(uses) for node, uses in self.parents.items()}
        self.calls, self.parents = [], {}
        if len(counts) > _SHALLOW:
            self._ready = [node for node, count in counts.items() if not count]
            self._counts = {node: count for node, count in counts.items() if count}
        return bool(self._ready)

    def free(self) -> bool:
        """Let go of every node that nothing else holds; whether no node is left."""
        if not self._lock.acquire(blocking=False):
            return False  # another thread is at it, or this one is and runs a destructor
        counts, waiting = self._counts, list[Node]()
        try:
            while self._ready:
                node = self._ready.pop()
                if sys.getrefcount(node) > _ALONE:
                    waiting.append(node)
                    continue
                following = [successor for successor, _ in node.next_functions if successor in counts]
                del node
                while following:
                    successor = following.pop()
                    left = counts.get(successor, 1) - 1
                    if left:
                        counts[successor] = left
                    elif counts.pop(successor, None) is not None:
                        self._ready.append(successor)
                    del successor
            self._ready = waiting
        except BaseException:
            # Counts may be wrong now. Without them, outputs first: what nothing else holds goes, the rest waits.
            self._ready, self._counts = [*reversed(counts), *self._ready, *waiting], {}
            raise
        finally:
            self._lock.release()
        return not waiting


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


@atexit.register
def _at_exit() -> None:
    """Leave the nodes of graphs still in use to the end of the process: nothing may free them by recursion."""
    free_graphs()
    if _graphs:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(_graphs))
