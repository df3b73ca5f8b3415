"""The autograd graph of a network's outputs: how often each leaf is used, by which nodes, and when two graphs are alike."""

import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from adaptive_tangents.capture.held_nodes import HeldNodes

Parents = Mapping[Any, Sequence[tuple[Any, int, int]]]
"""For each node of a graph: the nodes that use it, on which of their inputs, and which of its outputs."""

_names: dict[type, str] = {}


def operation(node: Any) -> str:
    """The name of a node's operation, ``AddmmBackward0`` is Addmm; empty if the node is not one of torch's own.

    A user's function may have any name, so the node's type is looked up among torch's.
    """
    kind = type(node)
    name = _names.get(kind)
    if name is None:
        if kind is not getattr(torch._C._functions, kind.__name__, None):
            return ""
        name = _names[kind] = re.sub(r"Backward\d*$", "", kind.__name__)
    return name


@dataclass(frozen=True)
class Graph:
    """The autograd graph of some outputs: how often each leaf is used, the leaves' nodes, and the users of every node.

    ``opaque`` means that some node is neither one of torch's own nor a Python function's (TorchScript makes such) and may
    use leaves that the graph does not show. ``operations`` names every node's operation. ``dtype`` is the least precise
    dtype of any node's output.
    """

    counts: Mapping[str, int]
    leaves: Mapping[str, Any]
    parents: Parents
    operations: tuple[str, ...]
    opaque: bool
    dtype: torch.dtype


def read_graph(out: Tensor, leaves: Mapping[int, str], held: HeldNodes) -> Graph:
    """The graph of ``out``; ``leaves`` maps the id of each leaf to its name."""
    parents = held.parents
    nodes: list[Any] = [] if out.grad_fn is None else [out.grad_fn]
    parents.update({node: [] for node in nodes})
    for node in nodes:
        for index, (successor, output) in enumerate(node.next_functions):
            if successor is None:
                continue
            uses = parents.get(successor)
            if uses is None:
                uses = parents[successor] = []
                nodes.append(successor)
            uses.append((node, index, output))
    operations = tuple(map(operation, nodes))
    found = {}
    for node, name in zip(nodes, operations, strict=True):
        leaf = leaves.get(id(node.variable)) if name == "AccumulateGrad" else None
        if leaf is not None:
            found[leaf] = node
    counts = {name: len(parents[found[name]]) if name in found else 0 for name in leaves.values()}
    made = {made.dtype for node in nodes for made in getattr(node, "_input_metadata", ())}
    real = {d.to_real() if d.is_complex else d for d in made}
    least = max((d for d in real | {out.dtype} if d.is_floating_point), key=lambda dtype: torch.finfo(dtype).eps)
    opaque = any(not name and not isinstance(node, Node) for node, name in zip(nodes, operations, strict=True))
    return Graph(counts, found, parents, operations, opaque, least)


# Operations that treat every sample of a batch alike, whatever its values.
_ALIKE = {
    "Abs", "AccumulateGrad", "AdaptiveAvgPool2D", "Add", "Addmm", "Alias", "AvgPool2D", "AvgPool3D", "Baddbmm", "Bmm",
    "Cat", "Clone", "ConstantPadNd", "Convolution", "CudnnBatchNorm", "Div", "Elu", "Embedding", "Exp", "Expand", "Gelu",
    "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyRelu", "Log", "LogSoftmax", "MaxPool2DWithIndices", "Mean", "Mm",
    "Mul", "NativeBatchNorm", "NativeGroupNorm", "NativeLayerNorm", "Neg", "Permute", "Pow", "PreluKernel", "Relu",
    "ReshapeAlias", "Rsqrt", "SafeSoftmax", "Select", "Sigmoid", "Silu", "Slice", "Softmax", "Softplus", "Split",
    "SplitWithSizes", "Sqrt", "Squeeze", "Stack", "Sub", "Sum", "T", "Tanh", "Threshold", "Transpose", "Unbind",
    "UnsafeSplit", "UnsafeView", "Unsqueeze", "UpsampleBilinear2D", "UpsampleNearest2D", "View",
}  # fmt: skip

_Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class GraphForm:
    """Every operation of a graph: its name, the place of its output shapes among all, and its users."""

    operations: tuple[str, ...]
    places: "array[int]"
    users: "array[int]"
    shapes: tuple[_Shapes, ...]


def form_of(graph: Graph) -> GraphForm | None:
    """The operations of a graph, their shapes and users; None if some operation may treat samples differently."""
    if not set(graph.operations) <= _ALIKE:
        return None
    known: dict[_Shapes, int] = {}
    numbers = {node: k for k, node in enumerate(graph.parents)}
    places, users = array("q"), array("q")
    for node, uses in graph.parents.items():
        places.append(known.setdefault(tuple([tuple(made.shape) for made in node._input_metadata]), len(known)))
        users.append(len(uses))
        for user, index, output in uses:
            users.extend((numbers[user], index, output))
    return GraphForm(graph.operations, places, users, tuple(known))


def same_form(one: GraphForm | None, n: int, two: GraphForm | None, m: int) -> bool:
    """Whether the graphs of n and of m samples differ in the number of samples only."""
    if one is None or two is None or (one.operations, one.users) != (two.operations, two.users):
        return False
    for k, j in set(zip(one.places, two.places, strict=True)):
        shapes, others = one.shapes[k], two.shapes[j]
        if [len(shape) for shape in shapes] != [len(shape) for shape in others]:
            return False
        sizes = zip((d for shape in shapes for d in shape), (d for shape in others for d in shape), strict=True)
        if any(a != b and a * m != b * n for a, b in sizes):
            return False
    return True
