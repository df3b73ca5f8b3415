"""The autograd graph of a network's outputs: how often each leaf is used, by which nodes, and when two graphs are alike."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

Parents = Mapping[Any, list[tuple[Any, int, int]]]
"""For each node of a graph: the nodes that use it, on which of their inputs, and which of its outputs."""


@dataclass(frozen=True)
class Graph:
    """The autograd graph of some outputs: how often each leaf is used, the leaves' nodes, and the users of every node.

    ``opaque`` means that some node is not one of torch's own (TorchScript makes such) and may use leaves that the graph
    does not show. ``dtype`` is the least precise dtype of any node's output.
    """

    counts: Mapping[str, int]
    leaves: Mapping[str, Any]
    parents: Parents
    opaque: bool
    dtype: torch.dtype


def read_graph(out: Tensor, leaves: Mapping[int, str]) -> Graph:
    """The graph of ``out``; ``leaves`` maps the id of each leaf to its name."""
    counts = dict.fromkeys(leaves.values(), 0)
    found: dict[str, Any] = {}
    parents: dict[Any, list[tuple[Any, int, int]]] = {}
    stack = [out.grad_fn] if out.grad_fn is not None else []
    parents.update({node: [] for node in stack})
    while stack:
        node = stack.pop()
        for index, (successor, output) in enumerate(node.next_functions):
            if successor is None:
                continue
            if successor not in parents:
                parents[successor] = []
                stack.append(successor)
            parents[successor].append((node, index, output))
            name = leaves.get(id(getattr(successor, "variable", None)))
            if name is not None:
                counts[name] += 1
                found[name] = successor
    made = {made.dtype for node in parents for made in getattr(node, "_input_metadata", ())}
    real = {d.to_real() if d.is_complex else d for d in made}
    least = max((d for d in real | {out.dtype} if d.is_floating_point), key=lambda dtype: torch.finfo(dtype).eps)
    return Graph(counts, found, parents, any(not isinstance(node, Node) for node in parents), least)


# Operations that treat every sample of a batch alike, whatever its values.
_ALIKE = {
    "Abs", "AdaptiveAvgPool2D", "Add", "Addmm", "Alias", "AvgPool2D", "AvgPool3D", "Baddbmm", "Bmm", "Cat", "Clone",
    "ConstantPadNd", "Convolution", "CudnnBatchNorm", "Div", "Elu", "Embedding", "Exp", "Expand", "Gelu",
    "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyRelu", "Log", "LogSoftmax", "MaxPool2DWithIndices", "Mean", "Mm",
    "Mul", "NativeBatchNorm", "NativeGroupNorm", "NativeLayerNorm", "Neg", "Permute", "Pow", "PreluKernel", "Relu",
    "ReshapeAlias", "Rsqrt", "SafeSoftmax", "Select", "Sigmoid", "Silu", "Slice", "Softmax", "Softplus", "Split",
    "SplitWithSizes", "Sqrt", "Squeeze", "Stack", "Sub", "Sum", "T", "Tanh", "Threshold", "torch::autograd::AccumulateGrad",
    "Transpose", "Unbind", "UnsafeSplit", "UnsafeView", "Unsqueeze", "UpsampleBilinear2D", "UpsampleNearest2D",
    "View",
}  # fmt: skip


GraphForm = tuple[tuple[str, tuple[tuple[int, ...], ...], tuple[tuple[int, int, int], ...]], ...]


def form_of(graph: Graph) -> GraphForm | None:
    """Every operation of a graph: name, output shapes, users; None if some operation may treat samples differently."""
    # Only torch's own operations end in a number: a user's function of the same name does not match.
    names = [re.sub(r"Backward\d+$", "", str(node.name())) for node in graph.parents]
    if not set(names) <= _ALIKE:
        return None
    shapes = [tuple(tuple(made.shape) for made in node._input_metadata) for node in graph.parents]
    place = {node: k for k, node in enumerate(graph.parents)}
    users = [tuple((place[user], index, output) for user, index, output in uses) for uses in graph.parents.values()]
    return tuple(zip(names, shapes, users, strict=True))


def same_form(one: GraphForm | None, n: int, two: GraphForm | None, m: int) -> bool:
    """Whether the graphs of n and of m samples differ in the number of samples only."""
    if one is None or two is None or len(one) != len(two):
        return False
    for (name, shapes, users), (other, others, their_users) in zip(one, two, strict=True):
        if (name, users, [len(shape) for shape in shapes]) != (other, their_users, [len(shape) for shape in others]):
            return False
        sizes = zip((d for shape in shapes for d in shape), (d for shape in others for d in shape), strict=True)
        if any(a != b and a * m != b * n for a, b in sizes):
            return False
    return True
