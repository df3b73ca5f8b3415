"""One pass of a batch: forward -> assemble -> retry, until no block's features are refuted.

`forward` runs the model and records its layer calls and graph. `assemble` makes the features of every block by one
backward pass. `refuted` compares them with autograd, and `retry` makes the wrong ones by their next choice.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from adaptive_tangents.capture.batches import Batch
from adaptive_tangents.capture.block_sources import Choice, Source, blocks_from, next_choice, source_of
from adaptive_tangents.capture.calls import Use, recorded_calls
from adaptive_tangents.capture.derivatives import Gradients, disproved, saved_copies
from adaptive_tangents.capture.graph import Graph, read_graph
from adaptive_tangents.capture.groups import Group
from adaptive_tangents.capture.held_nodes import free_graphs, held_nodes
from adaptive_tangents.capture.network import Network
from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.blocks import Block


@dataclass(frozen=True)
class Forward:
    """The result of a forward pass: outputs (n, c), the selected parameters, their graph, and the layer calls in it."""

    out: Tensor
    leaves: Mapping[str, Tensor]
    graph: Graph
    uses: list[Use]

    def check_inputs(self) -> None:
        """Raise RuntimeError if an in-place operation changed a layer's input, as autograd does for tensors it saved."""
        if any(use.inputs._version != use.version for use in self.uses):
            raise RuntimeError("the input of a layer was modified by an in-place operation")


def forward(net: Network, x: Batch, *, copy: bool) -> Forward:
    """Run the model, on loan, on a batch under autograd; ``copy`` keeps copies of saved tensors, lest any be overwritten."""
    free_graphs()
    leaves = net.leaves()
    uses: list[Use] = []
    net.put(leaves)
    with held_nodes() as nodes:
        calls = recorded_calls(net.model, uses, copy=copy, hold=nodes.calls.append)
        with saved_copies() if copy else nullcontext(), calls:
            out = net.run(x)
        net.check_unwritten()
        if not out.requires_grad:
            raise TangentError(
                f"{net.call}: autograd finds no path from the output to the selected parameters; remove no_grad, "
                "inference_mode or detach, or select parameters that the output depends on"
            )
        graph = read_graph(out, {id(leaf): name for name, leaf in leaves.items()}, nodes)
    net.check_fresh(graph.parents)
    return Forward(out, leaves, graph, [use for use in uses if use.edge.node in graph.parents])


@dataclass(frozen=True)
class Found:
    """The features of ``target`` block by block, their sources, and the choices made.

    ``held`` is the bytes of each gradient, and ``gradients`` are those kept to make blocks by another choice. ``unchecked``
    names the blocks not yet compared with autograd, and ``given_up`` those for which no choice is left.
    """

    seen: Forward
    target: Tensor
    blocks: Mapping[str, Block]
    sources: Mapping[str, Source]
    choices: Mapping[str, Choice]
    held: Mapping[tuple[Any, int], int]
    unchecked: Collection[str]
    given_up: frozenset[str] = frozenset()
    gradients: Mapping[tuple[Any, int], Gradients] = field(default_factory=dict, repr=False)

    @property
    def gradient_bytes(self) -> int:
        """Bytes that all gradients take together."""
        places = {(edge.node, edge.output_nr) for source in self.sources.values() for edge in source.edges}
        return sum(self.held.get(place, 0) for place in places)

    def without(self, names: Collection[str]) -> "Found":
        """The same without some blocks, which were refuted."""
        blocks = {name: block for name, block in self.blocks.items() if name not in names}
        sources = {name: source for name, source in self.sources.items() if name not in names}
        return replace(self, blocks=blocks, sources=sources)


def assemble(
    seen: Forward, target: Tensor, groups: Sequence[Group], choices: Mapping[str, Choice], *, batched: bool = False,
    keep: bool = False, known: Mapping[tuple[Any, int], Gradients] | None = None,
) -> Found:  # fmt: skip
    """The features of ``target`` (n, k), the outputs or a function of them, for each group with a known source.

    With ``batched``, gradients of all outputs may come from one batched pass, so the features must be checked. ``keep``
    holds the gradients for `retry`, and ``known`` are those of the same target held before.
    """
    calls = defaultdict[int, list[Use]](list)
    for use in seen.uses:
        calls[id(use.module)].append(use)
    made = ((g.name, source_of(g, calls, seen.graph, len(target), choices.get(g.name, Choice()))) for g in groups)
    sources = {name: source for name, source in made if source is not None}
    dtype = common_dtype(seen.leaves.values())
    blocks, gradients = blocks_from(groups, sources, target, choices, seen.graph, dtype, batched=batched, known=known)
    held = {place: gradient.values.nbytes for place, gradient in gradients.items()}
    # Only another place of the samples can be tried with the same gradients.
    several = [source for source in sources.values() if keep and source.ways > 1]
    places = {(edge.node, edge.output_nr) for source in several for edge in source.edges}
    kept = {place: gradient for place, gradient in gradients.items() if place in places}
    return Found(seen, target, blocks, sources, choices, held, frozenset(blocks), gradients=kept)


def refuted(found: Found) -> frozenset[str]:
    """The unchecked blocks whose features disagree with autograd."""
    blocks = {name: block for name, block in found.blocks.items() if name in found.unchecked}
    return disproved(found.target, found.seen.leaves, blocks, found.seen.graph.dtype)


def retry(found: Found, wrong: Collection[str], groups: Sequence[Group]) -> Found:
    """The same with each refuted block made by its next choice, from the same graph."""
    kept = found.without(wrong)
    following = {name: next_choice(found.choices.get(name, Choice()), found.sources[name]) for name in wrong}
    choices = {**found.choices, **{name: choice for name, choice in following.items() if choice is not None}}
    left = [group for group in groups if following.get(group.name) is not None]
    more = assemble(
        found.seen, found.target, left, choices, keep=bool(found.gradients), known=found.gradients
    )  # fmt: skip
    return replace(
        more,
        blocks={**kept.blocks, **more.blocks},
        sources={**kept.sources, **more.sources},
        held={**kept.held, **more.held},
        gradients={**kept.gradients, **more.gradients},
        given_up=found.given_up | {name for name, choice in following.items() if choice is None},
    )


def common_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    """The dtype of the features: what the selected parameters' dtypes promote to."""
    return reduce(torch.promote_types, (parameter.dtype for parameter in parameters))
