"""What the features of each block are made from, and what to try next where that is refuted."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from adaptive_tangents.blocks import Block
from adaptive_tangents.operations import Signature, Term, block_of, signatures, terms_of
from adaptive_tangents.recording import Graph, Group, Use


@dataclass(frozen=True)
class Choice:
    """What is taken for the features of one block: by the probe, and so for every batch after it.

    ``preference`` counts through the dimensions that may be the samples'; ``calls``: calls of layers, else uses in the
    graph, only ``allowed`` ones where that is known and none that were ``refused``.
    """

    preference: int = 0
    calls: bool = True
    refused: frozenset[Signature] = frozenset()
    allowed: frozenset[Signature] | None = None


@dataclass(frozen=True)
class Source:
    """Where the features of a block come from: layer calls, or uses of each of its parameters; ``unsure``: never probed."""

    uses: tuple[Use, ...] = ()
    terms: Mapping[str, list[Term]] = field(default_factory=dict)
    ways: int = 1
    unsure: bool = False

    @property
    def edges(self) -> list[GradientEdge]:
        """Where in the graph gradients are needed."""
        return [use.edge for use in self.uses] or [term.edge for found in self.terms.values() for term in found]

    @property
    def channels_last(self) -> list[bool]:
        """For each edge, whether a position's units lie together in memory."""
        if self.uses:
            return [use.rule.tokens for use in self.uses]
        return [term.kind == "lookup" for found in self.terms.values() for term in found]


def source_of(group: Group, uses: list[Use], graph: Graph, n: int, choice: Choice) -> Source | None:
    """Where a block's features come from, or None where that is not known."""
    if choice.calls:
        calls = group.calls(uses, graph.counts, n)
        if calls:
            return Source(tuple(calls), ways=max(len(use.layouts(n)) for use in calls))
        if choice.allowed is not None:
            return None
    terms = _terms(group, graph, n, choice, choice.allowed)
    unsure = terms is None and choice.allowed is not None
    if unsure:
        # Another batch, of one sample say, may take other operations.
        terms = _terms(group, graph, n, choice, None)
    if terms is None:
        return None
    ways = max((len(term.layouts) for found in terms.values() for term in found), default=1)
    return Source((), terms, ways, unsure)


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
    preference = choices.get(group.name, Choice()).preference
    gradients = {place: gradient.detach() for place, gradient in gradients.items()}
    if source.uses:
        found = {id(use): gradients[use.edge.node, use.edge.output_nr] for use in source.uses}
        return group.called(list(source.uses), found, len(out), preference)
    return block_of(group, source.terms, gradients, out, preference)
