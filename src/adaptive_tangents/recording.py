"""Which layer calls make up the features of which parameters: hooks, uses counted in the autograd graph, blocks."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from adaptive_tangents.blocks import Block, Slot
from adaptive_tangents.inputs import Network
from adaptive_tangents.layers import LayerRule, bias_alone, packed_pairs, rule_for
from adaptive_tangents.summands import Dense, Flipped, Lookup, Outer, Summand

Layout = Literal["first", "second", "last"]
"""Where samples are: in the first dimension, alone or before other things; in the second; or in the first after them."""

Parents = Mapping[Any, list[tuple[Any, int, int]]]
"""For each node of a graph: the nodes that use it, on which of their inputs, and which of its outputs."""


def layouts(shape: tuple[int, ...], n: int) -> tuple[Layout, ...]:
    """Where the n samples may be in a tensor, likeliest first."""
    first = bool(shape) and shape[0] > 0 and shape[0] % n == 0
    second = n > 1 and len(shape) > 1 and shape[1] == n
    ways: list[Layout] = ["first"] if first and (shape[0] == n or not second) else []
    ways += ["second"] if second else []
    ways += ["first"] if first and "first" not in ways else []
    return (*ways, "last") if first and n > 1 and shape[0] != n else tuple(ways)


def arranged(tensor: Tensor, way: Layout, n: int, *, lead: int = 0) -> Tensor:
    """The same with samples first after ``lead`` dimensions, what goes with each sample following it."""
    if way == "second":
        return tensor.transpose(lead, lead + 1)
    if way == "last":
        before, rest = tensor.shape[:lead], tensor.shape[lead + 1 :]
        return tensor.reshape(*before, -1, n, *rest).transpose(lead, lead + 1).reshape(*before, -1, *rest)
    return tensor


def gathered(part: Outer | Lookup | Dense, n: int) -> Outer | Lookup | Dense:
    """Features of n·k rows as those of n samples: rows of a sample are more positions of it."""
    if isinstance(part, Dense):
        return part if len(part.values) == n else Dense(part.values.reshape(n, -1, *part.values.shape[1:]).sum(1))
    if len(part.backward) == n:
        return part
    return type(part)(**{
        name: tensor if name == "directions" else tensor.reshape(n, len(tensor) // n * tensor.shape[1], *tensor.shape[2:])
        for name, tensor in vars(part).items()
    })  # fmt: skip


@dataclass(frozen=True)
class Use:
    """One call of a layer with a rule: what went in, and where its output enters the graph."""

    module: nn.Module
    rule: LayerRule
    inputs: Tensor
    version: int
    edge: GradientEdge

    def layouts(self, n: int) -> tuple[Layout, ...]:
        """Where the samples may be in what went in."""
        ways = layouts(tuple(self.inputs.shape), n)
        before_last = self.inputs.ndim > 2 or not self.inputs.is_floating_point()
        return ways if self.rule.tokens and before_last else tuple(way for way in ways if way != "second")


@dataclass(frozen=True)
class Group:
    """Parameters that share one block: a weight or bias of ``modules``, both joined, or a lone parameter (no role)."""

    name: str
    matrix: tuple[int, int]
    slots: tuple[Slot, ...]
    role: str | None
    joined: bool
    modules: tuple[nn.Module, ...]
    modes: tuple[tuple[str, int], ...] = ()

    def calls(self, uses: list[Use], counts: Mapping[str, int], n: int) -> list[Use]:
        """The layer calls that make up the features; empty where the parameters are used in any other way."""
        members = {id(module) for module in self.modules}
        found = [use for use in uses if id(use.module) in members]
        rows = all(use.layouts(n) for use in found)
        return found if rows and all(counts[slot.parameter] == len(found) for slot in self.slots) else []

    def of(self, parts: list[Summand]) -> Block:
        """The block whose features are the sum of ``parts``."""
        return Block(self.name, self.matrix, self.slots, modes=self.modes).of(parts)

    def called(self, uses: list[Use], gradients: Mapping[int, Tensor], n: int, ways: Sequence[Layout]) -> Block:
        """The block made of all calls: positions one after the other, features without factors summed."""
        parts: list[Summand] = []
        for use, way in zip(uses, ways, strict=True):
            rule, module = use.rule, use.module
            inputs, gradient = arranged(use.inputs, way, n), arranged(gradients[id(use)], way, n, lead=1)
            made: Outer | Lookup | Flipped | Dense
            if self.role == "bias":
                made = bias_alone(rule, module, gradient, self.matrix)
            else:
                made = rule.weight(module, inputs, gradient, self.joined)
            made = gathered(made, n)
            if self.role != "bias" and rule.transposed != self.slots[0].transposed:
                # A weight that another layer of another kind shares, which has it the other way round.
                assert not isinstance(made, Lookup | Flipped)
                made = Flipped(made.backward, made.inputs) if isinstance(made, Outer) else Dense(made.values.mT)
            parts.append(made)
        return self.of(parts)

    def materialised(self, values: Mapping[str, Tensor]) -> Block:
        """The block from ∂f/∂θ (n, c, *shape) of its parameters."""
        parts = [slot.place(values[slot.parameter], self.matrix[0]) for slot in self.slots]
        return self.of([Dense(parts[0] if len(parts) == 1 else torch.cat(parts, -1))])


@contextmanager
def recorded_calls(model: nn.Module, uses: list[Use], *, copy: bool) -> Iterator[None]:
    """Record every call of a layer that has a rule; all hooks are gone afterwards."""

    def record(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> None:
        rule = rule_for(module)
        x = arguments[0] if arguments else keywords.get("input")
        if rule is not None and rule.alone and len(arguments) + len(keywords) > 1:
            return
        if rule is None or not isinstance(x, Tensor) or not isinstance(out, Tensor) or not out.requires_grad:
            return
        if not rule.accepts(module, x):
            return
        kept = rule.keep(module, x.detach())
        kept = kept.clone() if copy else kept
        uses.append(Use(module, rule, kept, kept._version, get_gradient_edge(out)))

    handles = []
    try:
        for module in model.modules():
            if rule_for(module) is not None:
                # First, so that what the model's own hooks make of the output is seen as downstream of the layer.
                handles.append(module.register_forward_hook(record, prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Graph:
    """The autograd graph of some outputs: how often each leaf is used, the leaves' nodes, and who uses what.

    ``opaque``: some node (TorchScript's) is none of torch's own, and may use leaves that the graph does not show.
    ``dtype`` is the least precise that some node made.
    """

    counts: Mapping[str, int]
    leaves: Mapping[str, Any]
    parents: Parents
    opaque: bool
    dtype: torch.dtype


def read_graph(out: Tensor, leaves: Mapping[int, str]) -> Graph:
    """The graph of ``out``, leaves known by id."""
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
    least = max((d for d in made | {out.dtype} if d.is_floating_point), key=lambda dtype: torch.finfo(dtype).eps)
    return Graph(counts, found, parents, any(not isinstance(node, Node) for node in parents), least)


# Operations that treat every sample of a batch alike, whatever its values are.
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
Form = tuple[tuple[str, tuple[tuple[int, ...], ...], tuple[tuple[int, int, int], ...]], ...]


def form_of(graph: Graph) -> Form | None:
    """Every operation of a graph: name, shapes it made, its users; None where some may treat samples in different ways."""
    # Torch's own are numbered; a function of the same name that somebody wrote is not.
    names = [re.sub(r"Backward\d+$", "", str(node.name())) for node in graph.parents]
    if not set(names) <= _ALIKE:
        return None
    shapes = [tuple(tuple(made.shape) for made in node._input_metadata) for node in graph.parents]
    place = {node: k for k, node in enumerate(graph.parents)}
    users = [tuple((place[user], index, output) for user, index, output in uses) for uses in graph.parents.values()]
    return tuple(zip(names, shapes, users, strict=True))


def same_form(one: Form | None, n: int, two: Form | None, m: int) -> bool:
    """Whether the graphs of n and of m samples are the same but for the number of samples."""
    if one is None or two is None or len(one) != len(two):
        return False
    for (name, shapes, users), (other, others, their_users) in zip(one, two, strict=True):
        if (name, users, [len(shape) for shape in shapes]) != (other, their_users, [len(shape) for shape in others]):
            return False
        sizes = zip((d for shape in shapes for d in shape), (d for shape in others for d in shape), strict=True)
        if any(a != b and a * m != b * n for a, b in sizes):
            return False
    return True


def parameter_groups(net: Network) -> list[Group]:
    """The blocks of the selected parameters: a layer's weight with its bias, wherever the same layers own both."""
    names = {id(p): name for name, p in net.model.named_parameters()}
    owners: dict[str, list[nn.Module]] = {}
    roles: dict[str, str] = {}
    paths: dict[int, str] = {}
    pairs: list[tuple[str, ...]] = []
    for path, module in net.model.named_modules():
        rule, paths[id(module)] = rule_for(module), path
        for pair in packed_pairs(module):
            pairs.append(tuple(names.get(id(module._parameters.get(part)), "") for part in pair))
        for role in ("weight", "bias") if rule is not None else ():
            name = names.get(id(module._parameters.get(role)), "")
            if name in net.selected:
                roles[name] = role
                owners.setdefault(name, []).append(module)
    partners = {
        name: next((b for b in owners if roles[b] == "bias" and owners[b] == owners[name]), None)
        for name in owners
        if roles[name] == "weight" and _joined(owners[name])
    }
    once = [name for pair in pairs for name in pair]
    partners |= {w: b for w, b in pairs if {w, b} <= set(net.selected) and once.count(w) == once.count(b) == 1}
    groups = []
    for name in net.selected:
        if name in partners.values():
            continue
        parameter, modules, bias = net.parameters[name], owners.get(name, []), partners.get(name)
        title: str = name
        # A table's orientation is the one in which what is looked up stays indices.
        modules = sorted(modules, key=lambda module: not _is_table(module))
        rule = rule_for(modules[0]) if roles.get(name) == "weight" else None
        o = parameter.shape[0] if parameter.ndim else 1
        i = parameter.numel() // max(o, 1)
        if rule is not None:
            o, i = rule.matrix(modules[0])
            alone = all(module._parameters.get("bias") is None for module in modules)
            if bias is not None or (alone and (rule.joined or rule.table)):
                title = paths[id(modules[0])] or name
        slots = [Slot(name, tuple(parameter.shape), 0, i, transposed=rule is not None and rule.transposed)]
        if bias is not None:
            slots.append(Slot(bias, tuple(net.parameters[bias].shape), i, 1))
        width = sum(slot.width for slot in slots)
        modes = rule.modes(modules[0]) if rule is not None else ()
        groups.append(Group(title, (o, width), tuple(slots), roles.get(name), bias is not None, tuple(modules), modes))
    return groups


def _joined(modules: list[nn.Module]) -> bool:
    rules = [rule_for(module) for module in modules]
    return all(rule is not None and rule.joined for rule in rules)


def _is_table(module: nn.Module) -> bool:
    rule = rule_for(module)
    return rule is not None and rule.table
