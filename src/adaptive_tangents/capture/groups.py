"""Which parameters share a block: a layer's weight with its bias, tied weights, lone parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adaptive_tangents.capture.calls import Use
from adaptive_tangents.capture.layers import bias_alone, packed_pairs, rule_for
from adaptive_tangents.capture.network import Network
from adaptive_tangents.capture.sample_layouts import Layout, arranged, gathered
from adaptive_tangents.features.blocks import Block, Slot
from adaptive_tangents.features.summands import Dense, Flipped, Lookup, Outer, Summand


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
