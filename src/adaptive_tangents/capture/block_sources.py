"""What the features of each block are made from, and what to try next if a guess is refuted."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from adaptive_tangents.capture.calls import Use
from adaptive_tangents.capture.derivatives import Gradients, backward
from adaptive_tangents.capture.graph import Graph
from adaptive_tangents.capture.graph_uses import Signature, Term, UseKey, keyed, signatures, terms_of
from adaptive_tangents.capture.groups import Group
from adaptive_tangents.capture.sample_layouts import SampleLayout
from adaptive_tangents.capture.use_features import block_of
from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.summands import Dense
from adaptive_tangents.runtime.memory import empty

_MIXTURES = 32


@dataclass(frozen=True)
class Choice:
    """The guess for how one block's features are made; the probe settles it for every later batch.

    ``preference`` counts through the possible sample dimensions. ``layouts`` is the settled one for each use, since
    another batch may allow more of them. ``calls`` takes calls of layers, otherwise uses in the graph: only the
    ``allowed`` ones, if these are known, and none of the ``refused``.
    """

    preference: int = 0
    layouts: Mapping[UseKey, SampleLayout] | None = None
    calls: bool = True
    refused: frozenset[Signature] = frozenset()
    allowed: frozenset[Signature] | None = None


@dataclass(frozen=True)
class Source:
    """Where a block's features of n samples come from: layer calls, or uses of its parameters.

    ``unsure`` means that the probe has not seen this source.
    """

    n: int
    uses: tuple[Use, ...] = ()
    terms: Mapping[str, list[Term]] = field(default_factory=dict)
    unsure: bool = False

    @property
    def ways(self) -> int:
        """The number of candidate layouts of the samples in all uses together."""
        return len(self._arrangements)

    @cached_property
    def _possible(self) -> dict[UseKey, tuple[SampleLayout, ...]]:
        """The possible layouts of the samples in each use."""
        if self.uses:
            return {("call", k): use.layouts(self.n) for k, use in enumerate(self.uses)}
        return {key: term.layouts for found in keyed(self.terms).values() for key, term in found}

    @cached_property
    def _arrangements(self) -> list[dict[tuple[SampleLayout, ...], SampleLayout]]:
        """Candidates: a layout for every set of possible ones. First the likeliest of all, then the second, then mixtures."""
        sets = list(dict.fromkeys(self._possible.values()))
        alike = [tuple(way[min(k, len(way) - 1)] for way in sets) for k in range(max(map(len, sets), default=1))]
        mixtures = () if self.uses else itertools.islice(itertools.product(*sets), _MIXTURES)
        every = dict.fromkeys([*alike, *mixtures])
        return [dict(zip(sets, ways, strict=True)) for ways in every]

    def layouts(self, choice: Choice) -> dict[UseKey, SampleLayout]:
        """The layout to use for each use: the settled one if shapes allow it, otherwise the guess of ``preference``."""
        arrangements, known = self._arrangements, choice.layouts or {}
        guess = arrangements[min(choice.preference, len(arrangements) - 1)]
        ways = {key: (known.get(key), possible) for key, possible in self._possible.items()}
        return {key: there if there in possible else guess[possible] for key, (there, possible) in ways.items()}

    def departs(self, choice: Choice) -> bool:
        """Whether some use cannot have its settled layout; a single sample tells nothing about this."""
        known = choice.layouts or {}
        return self.n > 1 and any(known.get(key) not in possible for key, possible in self._possible.items())

    def settled(self, choice: Choice) -> Choice:
        """The choice that makes the features of other batches as those of this one were made."""
        allowed = None if self.uses else signatures(self.terms)
        return replace(choice, calls=bool(self.uses), allowed=allowed, layouts=self.layouts(choice))

    @property
    def edges(self) -> list[GradientEdge]:
        """The edges of the graph where gradients are needed."""
        return [use.edge for use in self.uses] or [term.edge for found in self.terms.values() for term in found]

    @property
    def summed(self) -> bool:
        """Whether features are sums over positions; then gradients of all outputs need not be held at once."""
        return bool(self.uses) and all(use.rule.summed for use in self.uses)

    def narrow(self, choice: Choice) -> list[bool]:
        """For each edge, whether positions without gradients may be left out there."""
        if not self.uses:
            return [False for _ in self.edges]
        ways = self.layouts(choice).values()
        return [way == "first" and use.has_positions(self.n) for use, way in zip(self.uses, ways, strict=True)]

    @property
    def channels_last(self) -> list[bool]:
        """For each edge, whether the units of a position are adjacent in memory."""
        if self.uses:
            return [use.rule.tokens for use in self.uses]
        return [term.kind == "lookup" for found in self.terms.values() for term in found]


def source_of(group: Group, uses: Mapping[int, Sequence[Use]], graph: Graph, n: int, choice: Choice) -> Source | None:
    """Where a block's features come from, or None if no source is known; ``uses`` are by the id of their module."""
    probed = choice.layouts is not None
    calls = group.calls(uses, graph.counts, n) if choice.calls else []
    if calls:
        found = Source(n, tuple(calls))
    else:
        terms = _terms(group, graph, n, choice, choice.allowed)
        other = probed and (choice.calls or terms is None)
        if terms is None and choice.allowed is not None:
            # Another batch may use other operations, for example one of a single sample.
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
    """The choice to try after this one was refuted; None if nothing is left to try."""
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
    gradients: Mapping[tuple[Any, int], Gradients],
    out: Tensor,
    choices: Mapping[str, Choice],
) -> Block:
    """A block, made from its source and the gradients (c, ...) at the source's edges."""
    choice = choices.get(group.name, Choice())
    there = {(e.node, e.output_nr): gradients[e.node, e.output_nr].values.detach() for e in source.edges}
    if source.uses:
        places = [(use.edge.node, use.edge.output_nr) for use in source.uses]
        uses = [use.at(gradients[place].live) for use, place in zip(source.uses, places, strict=True)]
        found = {id(use): there[place] for use, place in zip(uses, places, strict=True)}
        return group.called(uses, found, len(out), list(source.layouts(choice).values()))
    return block_of(group, source.terms, there, out, source.layouts(choice))


def blocks_from(
    groups: Sequence[Group],
    sources: Mapping[str, Source],
    out: Tensor,
    choices: Mapping[str, Choice],
    graph: Graph,
    dtype: torch.dtype,
    *,
    batched: bool = False,
    known: Mapping[tuple[Any, int], Gradients] | None = None,
) -> tuple[dict[str, Block], dict[tuple[Any, int], Gradients]]:
    """The blocks of all groups with a source, in ``dtype``, by one backward pass; and the gradients that they hold.

    ``known`` are gradients of an earlier pass over the same graph, which need not be made again.
    """
    n, c = out.shape
    last: dict[tuple[Any, int], bool] = {}
    edges: dict[tuple[Any, int], GradientEdge] = {}
    held: dict[tuple[Any, int], bool] = {}
    narrow: dict[tuple[Any, int], bool] = {}
    for name, source in sources.items():
        summed, few = source.summed, source.narrow(choices.get(name, Choice()))
        for edge, together, some in zip(source.edges, source.channels_last, few, strict=True):
            place = edge.node, edge.output_nr
            edges[place], last[place] = edge, together
            narrow[place] = narrow.get(place, True) and some
            held[place] = held.get(place, False) or not summed
    found = [group for group in groups if group.name in sources]
    early = [group for group in found if sources[group.name].summed]
    values = {group.name: empty((n, c, *group.matrix), out, dtype) for group in early}
    # Gradients at live positions only may not do for another layout, and sums over positions need all of them at once.
    kept = {} if early else {place: known[place] for place in edges if known and place in known}
    kept = {place: gradients for place, gradients in kept.items() if gradients.live is None}
    asked = [place for place in edges if place not in kept]

    def sum_positions(outputs: slice, gradients: list[Tensor]) -> None:
        there = {place: Gradients(gradient) for place, gradient in zip(asked, gradients, strict=True)}
        for group in early:
            made = made_from(group, sources[group.name], there, out.detach()[:, outputs], choices)
            values[group.name][:, outputs] = made.features()

    made = backward(
        out, [edges[place] for place in asked], channels_last=[last[place] for place in asked],
        held=[held[place] for place in asked], narrow=[narrow[place] for place in asked], seen=sum_positions,
        operations=graph.operations, batched=batched,
    )  # fmt: skip
    kept |= {
        place: gradient for place, gradient in zip(asked, made, strict=True) if gradient is not None and held[place]
    }
    blocks = {
        group.name: group.of([Dense(values[group.name])])
        if group.name in values
        else made_from(group, sources[group.name], kept, out, choices).map(dtype=dtype)
        for group in found
    }
    return blocks, kept
