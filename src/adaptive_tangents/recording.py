"""Which layer calls make up the features of which parameters: hooks, uses counted in the autograd graph, blocks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from adaptive_tangents.blocks import Block, Dense, Outer, Slot, sum_blocks
from adaptive_tangents.inputs import Network
from adaptive_tangents.layers import LayerRule, bias_alone, rule_for, with_bias_column


@dataclass(frozen=True)
class Use:
    """One call of a layer with a rule: what went in, and where its output enters the graph."""

    module: nn.Module
    rule: LayerRule
    inputs: Tensor
    version: int
    edge: GradientEdge


@dataclass(frozen=True)
class Group:
    """Parameters that share one block: a weight or bias of ``modules``, both joined, or a lone parameter (no role)."""

    name: str
    matrix: tuple[int, int]
    slots: tuple[Slot, ...]
    role: str | None
    joined: bool
    modules: tuple[nn.Module, ...]

    def calls(self, uses: list[Use], counts: Mapping[str, int], n: int) -> list[Use]:
        """The layer calls that make up the features; empty where the parameters are used in any other way."""
        members = {id(module) for module in self.modules}
        found = [use for use in uses if id(use.module) in members]
        rows = all(use.inputs.shape[0] == n for use in found)
        return found if rows and all(counts[slot.parameter] == len(found) for slot in self.slots) else []

    def block(self, uses: list[Use], gradients: Mapping[int, Tensor]) -> Block:
        """The block made of all calls: positions one after the other, features without factors summed."""
        parts: list[Outer | Dense] = []
        for use in uses:
            rule, module, gradient = use.rule, use.module, gradients[id(use)]
            if self.role == "bias":
                parts.append(bias_alone(rule, module, gradient, self.matrix))
                continue
            weight = rule.weight(module, use.inputs, gradient)
            if self.joined:
                weight = with_bias_column(rule, module, weight, gradient)
            parts.append(weight)
        outers = [Block(self.name, self.matrix, self.slots, outer=part) for part in parts if isinstance(part, Outer)]
        denses = [Block(self.name, self.matrix, self.slots, dense=part) for part in parts if isinstance(part, Dense)]
        return sum_blocks([*outers, *denses]) if len(parts) > 1 else (outers or denses)[0]

    def materialised(self, values: Mapping[str, Tensor]) -> Block:
        """The block from ∂f/∂θ (n, c, *shape) of its parameters."""
        parts = [slot.place(values[slot.parameter], self.matrix[0]) for slot in self.slots]
        dense = Dense(parts[0] if len(parts) == 1 else torch.cat(parts, -1))
        return Block(self.name, self.matrix, self.slots, dense=dense)


@contextmanager
def recorded_calls(model: nn.Module, uses: list[Use], *, copy: bool) -> Iterator[None]:
    """Record every call of a layer that has a rule; all hooks are gone afterwards."""

    def record(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> None:
        rule = rule_for(module)
        x = arguments[0] if arguments else keywords.get("input")
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


def graph_uses(out: Tensor, leaves: Mapping[int, str]) -> tuple[dict[str, int], set[Node]]:
    """How often the graph of ``out`` uses each leaf, and all its nodes."""
    counts = dict.fromkeys(leaves.values(), 0)
    nodes: set[Node] = set()
    stack = [out.grad_fn] if out.grad_fn is not None else []
    while stack:
        node = stack.pop()
        if node in nodes:
            continue
        nodes.add(node)
        for successor, _ in node.next_functions:
            if successor is None:
                continue
            variable = getattr(successor, "variable", None)
            if variable is not None and id(variable) in leaves:
                counts[leaves[id(variable)]] += 1
            stack.append(successor)
    return counts, nodes


def parameter_groups(net: Network) -> list[Group]:
    """The blocks of the selected parameters: a layer's weight with its bias, wherever the same layers own both."""
    names = {id(p): name for name, p in net.model.named_parameters()}
    owners: dict[str, list[nn.Module]] = {}
    roles: dict[str, str] = {}
    paths: dict[int, str] = {}
    for path, module in net.model.named_modules():
        rule, paths[id(module)] = rule_for(module), path
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
    groups = []
    for name in net.selected:
        if name in partners.values():
            continue
        parameter, modules, bias, title = net.parameters[name], owners.get(name, []), partners.get(name), name
        rule = rule_for(modules[0]) if roles.get(name) == "weight" else None
        o = parameter.shape[0] if parameter.ndim else 1
        i = parameter.numel() // max(o, 1)
        if rule is not None:
            o, i = rule.matrix(modules[0])
            alone = all(module._parameters.get("bias") is None for module in modules)
            if bias is not None or (alone and rule.joined):
                title = paths[id(modules[0])] or name
        slots = [Slot(name, tuple(parameter.shape), 0, i, transposed=rule is not None and rule.transposed)]
        if bias is not None:
            slots.append(Slot(bias, tuple(net.parameters[bias].shape), i, 1))
        width = sum(slot.width for slot in slots)
        groups.append(Group(title, (o, width), tuple(slots), roles.get(name), bias is not None, tuple(modules)))
    return groups


def _joined(modules: list[nn.Module]) -> bool:
    rules = [rule_for(module) for module in modules]
    return all(rule is not None and rule.joined for rule in rules)
