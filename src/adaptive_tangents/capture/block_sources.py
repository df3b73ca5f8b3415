"""What the features of each block are made from, and what to try next where that is refuted."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from adaptive_tangents.capture.calls import Use
from adaptive_tangents.capture.derivatives import backward
from adaptive_tangents.capture.graph import Graph
from adaptive_tangents.capture.graph_uses import Key, Signature, Term, block_of, keyed, signatures, terms_of
from adaptive_tangents.capture.groups import Group
from adaptive_tangents.capture.sample_layouts import Layout
from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.summands import Dense
from adaptive_tangents.runtime.memory import empty

_MIXTURES = 32


@dataclass(frozen=True)
class Choice:
    """What is taken for the features of one block: by the probe, and so for every batch after it.

    ``preference`` counts through the dimensions that may be the samples'; ``layouts`` says which it came to for each use,
    as another batch may have more of them. ``calls``: calls of layers, else uses in the graph, only ``allowed`` ones where
    that is known and none that were ``refused``.
    """

    preference: int = 0
    layouts: Mapping[Key, Layout] | None = None
    calls: bool = True
    refused: frozenset[Signature] = frozenset()
    allowed: frozenset[Signature] | None = None


@dataclass(frozen=True)
class Source:
    """Where a block's features of n samples come from: layer calls, or uses of its parameters; ``unsure``: never probed."""

    n: int
    uses: tuple[Use, ...] = ()
    terms: Mapping[str, list[Term]] = field(default_factory=dict)
    unsure: bool = False

    @property
    def ways(self) -> int:
        """In how many ways samples may lie in all of these."""
        return len(self._arrangements)

    @cached_property
    def _possible(self) -> dict[Key, tuple[Layout, ...]]:
        """Where samples may be in each use."""
        if self.uses:
            return {("call", k): use.layouts(self.n) for k, use in enumerate(self.uses)}
        return {key: term.layouts for found in keyed(self.terms).values() for key, term in found}

    @cached_property
    def _arrangements(self) -> list[dict[tuple[Layout, ...], Layout]]:
        """A layout for every set of possible ones: the likeliest of all, the second of all, ..., then mixtures of these."""
        sets = list(dict.fromkeys(self._possible.values()))
        alike = [tuple(way[min(k, len(way) - 1)] for way in sets) for k in range(max(map(len, sets), default=1))]
        mixtures = () if self.uses else itertools.islice(itertools.product(*sets), _MIXTURES)
        every = dict.fromkeys([*alike, *mixtures])
        return [dict(zip(sets, ways, strict=True)) for ways in every]

    def layouts(self, choice: Choice) -> dict[Key, Layout]:
        """Where samples are taken to be in each use: where another batch's were found, as far as shapes allow it."""
        arrangements, known = self._arrangements, choice.layouts or {}
        guess = arrangements[min(choice.preference, len(arrangements) - 1)]
        ways = {key: (known.get(key), possible) for key, possible in self._possible.items()}
        return {key: there if there in possible else guess[possible] for key, (there, possible) in ways.items()}

    def departs(self, choice: Choice) -> bool:
        """Whether samples of some use cannot be where those of the same use were; one sample may be anywhere."""
        known = choice.layouts or {}
        return self.n > 1 and any(known.get(key) not in possible for key, possible in self._possible.items())

    @property
    def edges(self) -> list[GradientEdge]:
        """Where in the graph gradients are needed."""
        return [use.edge for use in self.uses] or [term.edge for found in self.terms.values() for term in found]

    @property
    def summed(self) -> bool:
        """Whether features are sums over positions, so that gradients of all outputs need not be held at once."""
        return bool(self.uses) and all(use.rule.summed for use in self.uses)

    @property
    def channels_last(self) -> list[bool]:
        """For each edge, whether a position's units lie together in memory."""
        if self.uses:
            return [use.rule.tokens for use in self.uses]
        return [term.kind == "lookup" for found in self.terms.values() for term in found]


def source_of(group: Group, uses: list[Use], graph: Graph, n: int, choice: Choice) -> Source | None:
    """Where a block's features come from, or None where that is not known."""
    probed = choice.layouts is not None
    calls = group.calls(uses, graph.counts, n) if choice.calls else []
    if calls:
        found = Source(n, tuple(calls))
    else:
        terms = _terms(group, graph, n, choice, choice.allowed)
        other = probed and (choice.calls or terms is None)
        if terms is None and choice.allowed is not None:
            # Another batch, of one sample say, may take other operations.
            terms = _terms(group, graph, n, choice, None)
        if terms is None:
            return None
        found = Source(n, (), terms, other)
    return replace(found, unsure=found.unsure or (probed and found.departs(choice)))


def _terms(
    group: Group, graph: Graph, n: int, choice: Choice, allowed: frozenset[Signature] | None
) -> dict[str, list[Term]] | None:
    terms: dict[str, list[Term]] = {}
    for slot in group.slots:
        leaf = graph.leaves.get(slot.parameter)
        if leaf is None and graph.opaque:
            return None
        found = terms_of(leaf, slot.shape, graph.parents, n, allowed=allowed, refused=choice.refused) if leaf else []
        if found is None:
            return None
        terms[slot.parameter] = found
    return terms


def next_choice(choice: Choice, source: Source) -> Choice | None:
    """What to try after a choice was refuted."""
    if choice.preference + 1 < source.ways:
        return replace(choice, preference=choice.preference + 1)
    if source.uses:
        return replace(choice, preference=0, calls=False)
    if choice.refused or not source.terms or not signatures(source.terms):
        return None
    return replace(choice, preference=0, calls=False, refused=signatures(source.terms))


def made_from(
    group: Group,
    source: Source,
    gradients: Mapping[tuple[Any, int], Tensor],
    out: Tensor,
    choices: Mapping[str, Choice],
) -> Block:
    """The block made from its source and the gradients (c, ...) at the source's edges."""
    choice = choices.get(group.name, Choice())
    gradients = {(e.node, e.output_nr): gradients[e.node, e.output_nr].detach() for e in source.edges}
    if source.uses:
        found = {id(use): gradients[use.edge.node, use.edge.output_nr] for use in source.uses}
        return group.called(list(source.uses), found, len(out), list(source.layouts(choice).values()))
    return block_of(group, source.terms, gradients, out, source.layouts(choice))


def blocks_of(
    groups: Sequence[Group],
    sources: Mapping[str, Source],
    out: Tensor,
    choices: Mapping[str, Choice],
    graph: Graph,
    dtype: torch.dtype,
) -> tuple[dict[str, Block], dict[tuple[Any, int], int]]:
    """The blocks of all groups with a source, in ``dtype``, by one backward pass; and the bytes of each gradient held."""
    n, c = out.shape
    last: dict[tuple[Any, int], bool] = {}
    edges: dict[tuple[Any, int], GradientEdge] = {}
    held: dict[tuple[Any, int], bool] = {}
    for source in sources.values():
        for edge, together in zip(source.edges, source.channels_last, strict=True):
            place = edge.node, edge.output_nr
            edges[place], last[place] = edge, together
            held[place] = held.get(place, False) or not source.summed
    found = [group for group in groups if group.name in sources]
    early = [group for group in found if sources[group.name].summed]
    values = {group.name: empty((n, c, *group.matrix), out, dtype) for group in early}

    def sum_positions(outputs: slice, gradients: list[Tensor]) -> None:
        there = dict(zip(edges, gradients, strict=True))
        for group in early:
            made = made_from(group, sources[group.name], there, out.detach()[:, outputs], choices)
            values[group.name][:, outputs] = made.features()

    held_gradients = backward(
        out, list(edges.values()), channels_last=list(last.values()), held=list(held.values()), seen=sum_positions,
        parents=graph.parents,
    )  # fmt: skip
    kept = {
        place: gradient
        for place, gradient in zip(edges, held_gradients, strict=True)
        if gradient is not None and held[place]
    }
    sizes = {place: gradient.nbytes for place, gradient in kept.items()}
    blocks = {
        group.name: group.of([Dense(values[group.name])])
        if group.name in values
        else made_from(group, sources[group.name], kept, out, choices).map(dtype=dtype)
        for group in found
    }
    return blocks, sizes
