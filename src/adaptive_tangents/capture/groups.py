"""Which parameters share a block: a layer's weight with its bias, tied weights, lone parameters."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_tangents.capture.calls import Use
from adaptive_tangents.capture.layers import bias_alone, packed_pairs, rule_for
from adaptive_tangents.capture.network import Network
from adaptive_tangents.capture.sample_layouts import SampleLayout, arranged, gathered
from adaptive_tangents.features.blocks import Block, Slot
from adaptive_tangents.features.summands import Dense, Flipped, Lookup, Outer, Summand

TOGETHER = 8 << 20  # bytes of gradients that are joined; joining larger ones takes longer than it saves


@dataclass(frozen=True)
class Group:
    """Parameters that share one block.

    The block is a weight or a bias of ``modules``, both of them (``joined``), or a lone parameter (no role).
    """

    name: str
    matrix: tuple[int, int]
    slots: tuple[Slot, ...]
    role: str | None
    joined: bool
    modules: tuple[nn.Module, ...]
    modes: tuple[tuple[str, int], ...] = ()

    def calls(self, uses: Mapping[int, Sequence[Use]], counts: Mapping[str, int], n: int) -> list[Use]:
        """The layer calls that make up the features; none if the parameters are also used in any other way.

        ``uses`` are by the id of their module.
        """
        found = [use for module in dict.fromkeys(map(id, self.modules)) for use in uses.get(module, ())]
        rows = all(use.layouts(n) for use in found)
        return found if rows and all(counts[slot.parameter] == len(found) for slot in self.slots) else []

    def of(self, parts: list[Summand]) -> Block:
        """The block whose features are the sum of ``parts``."""
        return Block(self.name, self.matrix, self.slots, modes=self.modes).of(parts)

    def called(self, uses: list[Use], gradients: Mapping[int, Tensor], n: int, ways: Sequence[SampleLayout]) -> Block:
        """The block made from all calls: positions are concatenated, features without factors are summed."""
        parts: list[Summand] = []
        for alike, way in _alike(uses, gradients, ways):
            rule, module = alike[0].rule, alike[0].module
            inputs = _together([arranged(use.inputs, way, n) for use in alike], n, 0)
            gradient = _together([arranged(gradients[id(use)], way, n, lead=1) for use in alike], n, 1)
            made: Outer | Lookup | Flipped | Dense
            if self.role == "bias":
                made = bias_alone(rule, module, gradient, self.matrix)
            else:
                made = rule.weight(module, inputs, gradient, self.joined)
            made = gathered(made, n)
            if self.role != "bias" and rule.transposed != self.slots[0].transposed:
                # The weight is shared with a layer of another kind, which uses it transposed.
                assert not isinstance(made, Lookup | Flipped)
                made = Flipped(made.backward, made.inputs) if isinstance(made, Outer) else Dense(made.values.mT)
            parts.append(made)
        return self.of(parts)

    def materialized(self, values: Mapping[str, Tensor]) -> Block:
        """The block from ∂f/∂θ (n, c, *shape) of its parameters."""
        parts = [slot.place(values[slot.parameter], self.matrix[0]) for slot in self.slots]
        return self.of([Dense(parts[0] if len(parts) == 1 else torch.cat(parts, -1))])


def _alike(
    uses: Sequence[Use], gradients: Mapping[int, Tensor], ways: Sequence[SampleLayout]
) -> list[tuple[list[Use], SampleLayout]]:
    """The calls in groups with one layer, layout and shape: as many as are joined at a time."""
    groups = defaultdict[Any, list[Use]](list)
    for use, way in zip(uses, ways, strict=True):
        groups[id(use.module), way, use.inputs.shape, gradients[id(use)].shape].append(use)
    found = []
    for (_, way, *_), alike in groups.items():
        most = max(1, TOGETHER // max(1, alike[0].inputs.nbytes, gradients[id(alike[0])].nbytes))
        found += [(alike[k : k + most], way) for k in range(0, len(alike), most)]
    return found


def _together(tensors: list[Tensor], n: int, dim: int) -> Tensor:
    """The rows of all tensors, sample by sample."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([t.reshape(*t.shape[:dim], n, -1, *t.shape[dim + 1 :]) for t in tensors], dim + 1).flatten(
        dim, dim + 1
    )


def parameter_groups(net: Network) -> list[Group]:
    """The blocks of the selected parameters: a layer's weight with its bias if the same layers own both."""
    names = {id(p): name for name, p in net.model.named_parameters()}
    owners = _owners(net, names)
    biases = _pair_biases(net, names, owners)
    paired = set(biases.values())
    return [
        _oriented(net, name, owners.get(name, _Owners()), biases.get(name))
        for name in net.selected
        if name not in paired
    ]


@dataclass(frozen=True)
class _Owners:
    """The layers with a rule that own a parameter, by path, and its role in them: weight or bias."""

    role: str | None = None
    modules: Mapping[str, nn.Module] = field(default_factory=dict)


def _owners(net: Network, names: Mapping[int, str]) -> dict[str, _Owners]:
    owners: dict[str, _Owners] = {}
    selected = set(net.selected)
    for path, module in net.model.named_modules():
        for role in ("weight", "bias") if rule_for(module) is not None else ():
            own = module._parameters.get(role)
            name = names.get(id(own))
            # A complex one is a pair of real ones here, so no layer's rule holds.
            if name is not None and own is not None and not own.is_complex() and name in selected:
                owners[name] = _Owners(role, {**owners.get(name, _Owners()).modules, path: module})
    return owners


def _pair_biases(net: Network, names: Mapping[int, str], owners: Mapping[str, _Owners]) -> dict[str, str]:
    """For each weight that shares its block with a bias, that bias: owned by the same layers, or packed with it."""
    biases: dict[tuple[str, ...], str] = {}
    for name, own in owners.items():
        if own.role == "bias":
            biases.setdefault(tuple(own.modules), name)
    pairs = {}
    for name, own in owners.items():
        bias = biases.get(tuple(own.modules))
        if own.role == "weight" and bias is not None and all(map(_is_joined, own.modules.values())):
            pairs[name] = bias
    packed = [
        tuple(names.get(id(module._parameters.get(part)), "") for part in pair)
        for module in net.model.modules()
        for pair in packed_pairs(module)
    ]
    uses = Counter(name for pair in packed for name in pair)
    return pairs | {w: b for w, b in packed if {w, b} <= set(net.selected) and uses[w] == uses[b] == 1}


def _oriented(net: Network, name: str, owners: _Owners, bias: str | None) -> Group:
    """The group of a parameter; its matrix is oriented as in its first layer."""
    # A table comes first: in the other orientation its inputs could not stay indices.
    modules = dict(sorted(owners.modules.items(), key=lambda item: not _is_table(item[1])))
    path, first = next(iter(modules.items()), (name, None))
    rule = rule_for(first) if first is not None and owners.role == "weight" else None
    parameter, title = net.parameters[name], name
    modes: tuple[tuple[str, int], ...] = ()
    o = parameter.shape[0] if parameter.ndim else 1
    i = parameter.numel() // max(o, 1)
    if rule is not None and first is not None:
        (o, i), modes = rule.matrix(first), rule.modes(first)
        alone = all(module._parameters.get("bias") is None for module in modules.values())
        if bias is not None or (alone and (rule.joined or rule.table)):
            title = path or name
    slots = [Slot(name, tuple(parameter.shape), 0, i, transposed=rule is not None and rule.transposed)]
    if bias is not None:
        slots.append(Slot(bias, tuple(net.parameters[bias].shape), i, 1))
    width = sum(slot.width for slot in slots)
    return Group(title, (o, width), tuple(slots), owners.role, bias is not None, tuple(modules.values()), modes)


def _is_joined(module: nn.Module) -> bool:
    rule = rule_for(module)
    return rule is not None and rule.joined


def _is_table(module: nn.Module) -> bool:
    rule = rule_for(module)
    return rule is not None and rule.table
