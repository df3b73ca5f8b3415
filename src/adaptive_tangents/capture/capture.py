"""Model and inputs to tangent features: hooks where layers factor, one batched backward pass, a fallback for the rest.

Which parameters share a block is read off the model alone, so features of any two batches go together. A block is made
of calls of layers with a rule where they are every use of its parameters in the autograd graph, else of uses found in that
graph. It counts only where a random combination of its features is what autograd says, on every batch, or where the same
operations give the features that stood this check on some of its samples; every other block is
materialised, sample by sample. Nothing is skipped.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from copy import copy as copy_of
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from adaptive_tangents.capture.batches import Batch, samples, take, tensors
from adaptive_tangents.capture.block_sources import Choice, Source, blocks_of, next_choice, source_of
from adaptive_tangents.capture.calls import Use, recorded_calls
from adaptive_tangents.capture.derivatives import (
    materialise,
    mixed,
    projections,
    refuted,
    saved_copies,
    spreads,
    tolerance,
)
from adaptive_tangents.capture.graph import Form, form_of, read_graph, same_form
from adaptive_tangents.capture.graph_uses import signatures
from adaptive_tangents.capture.groups import parameter_groups
from adaptive_tangents.capture.network import Network, Output, Selection, network
from adaptive_tangents.checks import check_finite
from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.blocks import Block, stack_blocks
from adaptive_tangents.features.summands import Flipped, Lookup, Outer
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.runtime.chunks import ranges
from adaptive_tangents.runtime.memory import keep_freed, memory_limit, require_memory


def tangent_features(
    model: nn.Module,
    x: Batch,
    *,
    params: Mapping[str, Tensor] | None = None,
    wrt: Selection | None = None,
    output: Output | None = None,
    memory_limit: int | None = None,
) -> TangentFeatures:
    r"""Tangent features φ(x) = ∂f(x;θ)/∂θ of a network, exact, in factors Σ_t δ_t h_tᵀ wherever a layer allows it.

    ``x`` is a tensor, tuple or dict of tensors with n samples first; ``params`` a state dict to evaluate at
    (default: the model's own); ``wrt`` a name pattern, a parameter, or several (default: those requiring a gradient);
    ``output`` picks a tensor (n, c) from what the model returns; ``memory_limit`` is in bytes (default: half of what
    is free). The model is left as found. Source: LeJeune & Alemohammad, CPAL 2024, §2.

    Raises TangentError where samples of a batch interact, shapes, dtypes or devices do not fit, values are not finite,
    or memory would not suffice.

    >>> import torch, adaptive_tangents as at
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> feats = at.tangent_features(model, torch.randn(10, 4))
    >>> {name: block.shape for name, block in feats.blocks.items()}
    {'0': (8, 5), '2': (2, 9)}
    >>> feats.kernel(outputs="trace").shape
    torch.Size([10, 10])
    """
    return Capture("tangent_features", model, x, params, wrt, output, memory_limit).features(x)


# Samples, spread over a batch, from which is learnt what features are made of. A prime: a dimension of the network that is
# a multiple of it, and could be taken for the samples, is rare.
_PROBED = 7
_LEAST_PROBED = 3  # where memory has no room for more
_PROBE_SHARE = 12  # memory a sample takes in a probe, in units of what autograd keeps of it; twice that of convolutions
_PASS_BYTES = 1_000_000_000  # more at once buys no speed


@dataclass(frozen=True)
class Probe:
    """What a few samples of a batch tell: outputs, bytes that a sample takes, where the features of each block come from.

    ``factors`` and ``dense`` are bytes of each block's factors and of its features materialised, per sample; ``pass_bytes``
    what a pass needs besides; ``index`` and ``out`` the samples and their outputs; ``whole`` the parameters whose features
    are made sample by sample; ``form`` the operations; ``projections`` what their features show of each block, and
    ``spreads`` the squares of what rounding of that is relative to.
    """

    c: int
    dtype: torch.dtype
    device: torch.device
    factors: Mapping[str, int]
    dense: Mapping[str, int]
    pass_bytes: int
    whole: tuple[str, ...]
    choices: Mapping[str, Choice]
    refuted: frozenset[str]
    index: Tensor
    out: Tensor
    form: Form | None
    projections: Mapping[str, Tensor]
    spreads: Mapping[str, Tensor]

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self.dense)

    def held_bytes(self, copies: int = 1) -> int:
        """Memory that the features of one sample take, positions of ``copies`` passes side by side where that is less."""
        return sum(min(copies * self.factors.get(name, size), size) for name, size in self.dense.items())

    @property
    def whole_bytes(self) -> int:
        """The part of it that is held materialised whatever is done."""
        return sum(size for name, size in self.dense.items() if name not in self.factors)


class Capture:
    """A network probed on a few samples: checks done once, the cost of a sample known, features on request."""

    def __init__(
        self, call: str, model: nn.Module, x: Batch, params: Mapping[str, Tensor] | None, wrt: Selection | None,
        output: Output | None, limit: int | None,
    ) -> None:  # fmt: skip
        self.call = call
        self.network: Network = network(call, model, x, params, wrt, output)
        self.requested = limit
        self.verify = True
        self.groups = parameter_groups(self.network)
        keep_freed()
        self.limit = memory_limit(limit, tensors(x)[0].device)
        self.probe = self._probe(x)
        self._probed: list[tuple[Batch, Probe]] = [(x, self.probe)]

    @property
    def bytes_per_sample(self) -> int:
        """Memory that the features of one sample take."""
        return max(1, self.probe.held_bytes())

    @property
    def gradient_bytes(self) -> int:
        """Memory that one gradient of the selected parameters takes."""
        return sum(self.network.parameters[name].nbytes for name in self.network.selected)

    def check_more(self, x: Batch) -> None:
        """The checks of a second batch."""
        network(self.call, self.network.model, x, None, None, None)
        other = self._probe(x)
        self._probed.append((x, other))
        # A batch of more samples tells more of where they are.
        choices = self.probe.choices if len(other.index) <= len(self.probe.index) else other.choices
        self.probe = replace(self.probe, refuted=self.probe.refuted | other.refuted, choices=choices)

    def features(self, x: Batch, chunk: int | None = None) -> TangentFeatures:
        """The features of a batch, after a check that they fit into memory; ``chunk`` samples a pass, if not by memory."""
        probe, n = self.probe, samples(x)
        # Features are copied once while they are put together; materialised ones are not.
        needed = n * (2 * probe.held_bytes() - probe.whole_bytes)
        if probe.whole:
            remedy = f"take fewer samples, or narrow wrt: {', '.join(probe.whole[:4])} cannot be factored"
        else:
            remedy = "take fewer samples, narrow wrt, or use tangent_kernel, which works tile by tile"
        require_memory(self.call, needed, self.limit, remedy=remedy)
        # A pass is one of several things held: a kernel, another tile's features.
        room = min(max(self.limit - needed, 0), self.limit // 4, _PASS_BYTES)
        chunk = max(1, min(n, chunk or room // max(1, probe.pass_bytes)))
        made = [self._features(x if chunk == n else take(x, part)) for part in ranges(n, chunk)]
        out = torch.cat([found for found, _ in made])
        self._check_same(x, out)
        blocks = {name: stack_blocks([parts.pop(name) for _, parts in made]) for name in list(made[0][1])}
        shapes = {name: tuple(self.network.parameters[name].shape) for name in self.network.selected}
        return TangentFeatures(n, out.shape[1], blocks, shapes, self.requested)

    def at(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None) -> "Capture":
        """The same capture at other parameters, and buffers where given, its checks not repeated."""
        other = copy_of(self)
        buffers = self.network.buffers if buffers is None else buffers
        other.network = replace(self.network, parameters=parameters, buffers=buffers)
        other.verify = False
        return other

    def _own_probe(self, x: Batch) -> Probe | None:
        """What was learnt from samples of this very batch."""
        return next((probe for batch, probe in self._probed if batch is x), None)

    def outputs(self, x: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        """f(x; θ), shape (n, c)."""
        with self._quiet(), torch.no_grad():
            out = self.network(x, parameters)
        check_finite(self.call, "the output", [out])
        return out

    def _probe(self, x: Batch) -> Probe:
        n = samples(x)
        one, saved = take(x, slice(0, 1)), 0
        with suppress(TangentError):  # an output of no use is told of the batch
            first, saved = self._alone(one)
        probed = min(_PROBED, max(_LEAST_PROBED, self.limit // (_PROBE_SHARE * max(1, saved))))
        index, some = torch.arange(n), x
        if n > probed:
            # Out of order between first and last, so that a model which sorts its batch cannot find it sorted.
            spread = torch.linspace(0, n - 1, probed).long()
            index = torch.cat([spread[:1], spread[1:-1].flip(0), spread[-1:]])
            some = take(x, index.to(tensors(x)[0].device))
        seen = self._pass(some, {}, frozenset(), combined=True, verify=True)
        if not bool(torch.isfinite(seen.out).all()):
            self.outputs(x, {})  # names the sample by its place in the batch
        out, blocks, choices = seen.out, seen.blocks, dict(seen.choices)
        if not saved:
            first, saved = self._alone(one)
        self._check_interaction(some, out, first)
        for name, source in seen.sources.items():
            allowed = None if source.uses else signatures(source.terms)
            choice = choices.get(name, Choice())
            choices[name] = replace(choice, calls=bool(source.uses), allowed=allowed, layouts=source.layouts(choice))
        c = out.shape[1]
        made = [group for group in self.groups if group.name not in blocks]
        sizes = {group.name: c * group.matrix[0] * group.matrix[1] * out.element_size() for group in self.groups}
        factors = {name: _factor_bytes(block, c) for name, block in blocks.items() if block.dense is None}
        return Probe(
            c, out.dtype, out.device, factors, sizes,
            c * seen.reach // len(out) + saved,
            tuple(slot.parameter for group in made for slot in group.slots), choices, seen.refuted, index, out,
            seen.form, projections(blocks), spreads(blocks),
        )  # fmt: skip

    def _alone(self, x: Batch) -> tuple[Tensor, int]:
        """The output of one sample by itself, and the memory that autograd keeps of its forward pass."""
        held: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            # Tensors inside a functional transform have no memory of their own to ask for.
            with suppress(RuntimeError):
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        leaves = {name: self.network.parameters[name].detach().requires_grad_(True) for name in self.network.selected}
        own = {p.untyped_storage().data_ptr() for p in self.network.parameters.values()}
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with self._quiet(), torch.enable_grad(), hooks:
            out = self.network(x, leaves).detach()[0]
        return out, sum(size for place, size in held.items() if place not in own)

    def _check_interaction(self, x: Batch, together: Tensor, first: Tensor) -> None:
        n = samples(x)
        if n == 1:
            return
        # The last sample too: a model that refers every sample to the first of its batch agrees on the first.
        for k in (0, n - 1):
            alone = self.outputs(take(x, slice(k, k + 1)), {})[0] if k else first
            gap = self._gap(together[k], alone, together)
            if not gap <= self._tolerance(together):
                raise TangentError(
                    f"{self.call}: the output of the {'last' if k else 'first'} sample is different in the batch "
                    f"and alone (by {gap:.1e} of the largest output), so samples of a batch influence each other or "
                    "outputs are random; take out what mixes the batch, e.g. batch statistics or dropout"
                )

    def _check_same(self, x: Batch, out: Tensor) -> None:
        """The probed samples' outputs in the whole batch are those of the probe."""
        probe = self._own_probe(x)
        if probe is None or not self.verify or len(out) == len(probe.index):
            return
        gap = self._gap(out[probe.index.to(out.device)], probe.out, out)
        if gap > self._tolerance(out):
            raise TangentError(
                f"{self.call}: outputs are different in the whole batch and in a part of it (by {gap:.1e} of the largest "
                "output), so samples of a batch influence each other; take out what mixes the batch"
            )

    @staticmethod
    def _gap(one: Tensor, two: Tensor, all_outputs: Tensor) -> float:
        scale = max(float(all_outputs.abs().max()), torch.finfo(all_outputs.dtype).tiny)
        return float((one - two).abs().max()) / scale

    @staticmethod
    def _tolerance(out: Tensor) -> float:
        return float(30 * torch.finfo(out.dtype).eps ** 0.75)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Leave the global random state as it was, whatever the model draws."""
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
            yield

    def _features(self, x: Batch) -> tuple[Tensor, dict[str, Block]]:
        """Outputs and blocks of samples that one pass has room for."""
        net, probe, own = self.network, self.probe, self._own_probe(x)
        unseen = self.verify and (own is None or samples(x) > len(own.index))
        choices = probe.choices if own is None else own.choices
        seen = self._pass(x, choices, probe.refuted, combined=False, verify=unseen, own=own)
        out = seen.out
        check_finite(self.call, "the output", [out])
        made = {name: block for name, block in seen.blocks.items() if name not in seen.refuted}
        rest = [group for group in self.groups if group.name not in made]
        if rest:
            names = [slot.parameter for group in rest for slot in group.slots]
            held = sum(net.parameters[name].nbytes for name in names)
            fit = max(1, min(samples(x), _PASS_BYTES // max(1, 2 * probe.pass_bytes + probe.c * held)))
            with self._quiet():
                values = materialise(net, names, x, chunk=fit)
            made |= {group.name: group.materialised(values).map(dtype=self._common()) for group in rest}
        for block in made.values():
            parts = [tensor for part in block.summands for tensor in vars(part).values()]
            check_finite(self.call, f"the tangent feature in block {block.name!r}", parts)
        return out, {group.name: made[group.name] for group in self.groups}

    def _common(self) -> torch.dtype:
        """The dtype of the features: what the selected parameters' dtypes promote to."""
        dtypes = [self.network.parameters[name].dtype for name in self.network.selected]
        common = dtypes[0]
        for dtype in dtypes[1:]:
            common = torch.promote_types(common, dtype)
        return common

    def _pass(
        self, x: Batch, choices: Mapping[str, Choice], wrong: Collection[str], *, combined: bool, verify: bool,
        own: Probe | None = None,
    ) -> "_Pass":  # fmt: skip
        """One pass over a batch; ``combined``: of one random combination of the outputs.

        ``own`` is the probe of these samples: blocks need no other check where it found the same operations and features.
        """
        found = self._attempt(x, choices, wrong, copy=False, combined=combined, verify=verify, own=own)
        if found is None:
            found = self._attempt(x, choices, wrong, copy=True, combined=combined, verify=verify, own=own)
        assert found is not None
        return found

    def _attempt(
        self, x: Batch, choices: Mapping[str, Choice], wrong: Collection[str], *, copy: bool, combined: bool,
        verify: bool, own: Probe | None,
    ) -> "_Pass | None":  # fmt: skip
        """One pass, or None where an in-place operation overwrote what was not copied."""
        net = self.network
        leaves = {name: net.parameters[name].detach().requires_grad_(True) for name in net.selected}
        uses: list[Use] = []
        with self._quiet(), torch.enable_grad(), saved_copies() if copy else nullcontext():
            with recorded_calls(net.model, uses, copy=copy):
                out = net(x, leaves)
            if not out.requires_grad:
                raise TangentError(
                    f"{self.call}: autograd sees no way from the output to the selected parameters; take out no_grad, "
                    "inference_mode or detach, or select parameters that the output depends on"
                )
            if any(use.inputs._version != use.version for use in uses):
                return None
            graph = read_graph(out, {id(leaf): name for name, leaf in leaves.items()})
            uses = [use for use in uses if use.edge.node in graph.parents]
            try:
                sources: dict[str, Source] = {}
                for group in self.groups:
                    # What the probe found no source for could be taken for something else in a batch of another size.
                    if group.name not in wrong and (combined or group.name in choices):
                        choice = choices.get(group.name, Choice())
                        source = source_of(group, uses, graph, len(out), choice)
                        sources |= {group.name: source} if source is not None else {}
                seen = mixed(out) if combined else out
                blocks, held = blocks_of(self.groups, sources, seen, choices, graph, self._common())
                if not combined:
                    blocks = {name: block.compact() for name, block in blocks.items()}
                form = form_of(graph) if verify else None
                confirmed = (
                    _confirmed(own, form, blocks, len(out), graph.dtype) if verify and own is not None else frozenset()
                )
                doubted = {
                    name: block
                    for name, block in blocks.items()
                    if (verify and name not in confirmed) or sources[name].unsure
                }
                found = refuted(seen, leaves, doubted, graph.dtype)
                choices, given_up = dict(choices), set(wrong)
                while combined and found:
                    # The graph is the same, and so is all that stood the check.
                    again: dict[str, Source] = {}
                    for group in (group for group in self.groups if group.name in found):
                        next_one = next_choice(choices.get(group.name, Choice()), sources.pop(group.name))
                        del blocks[group.name]
                        if next_one is None:
                            given_up.add(group.name)
                            continue
                        choices[group.name] = next_one
                        source = source_of(group, uses, graph, len(out), next_one)
                        again |= {group.name: source} if source is not None else {}
                    more, more_held = blocks_of(self.groups, again, seen, choices, graph, self._common())
                    sources, blocks, held = sources | again, blocks | more, held | more_held
                    found = refuted(seen, leaves, more, graph.dtype)
            except RuntimeError:
                if copy:
                    raise
                return None
        places = {(edge.node, edge.output_nr) for source in sources.values() for edge in source.edges}
        reach = sum(held.get(place, 0) for place in places)
        return _Pass(out.detach(), blocks, sources, choices, frozenset(given_up) if combined else found, reach, form)


@dataclass(frozen=True)
class _Pass:
    """Outputs, the blocks that need no going through the samples one by one, their sources and choices, those ``refuted``.

    A pass of a combination goes on to the next choice of a refuted block until none is left. ``reach`` is the bytes of all
    gradients, ``form`` the operations.
    """

    out: Tensor
    blocks: Mapping[str, Block]
    sources: Mapping[str, Source]
    choices: Mapping[str, Choice]
    refuted: frozenset[str]
    reach: int
    form: Form | None


def _confirmed(
    probe: Probe, form: Form | None, blocks: Mapping[str, Block], n: int, dtype: torch.dtype
) -> frozenset[str]:
    """Blocks whose features of the probed samples are those of the probe, made by the same operations."""
    if not same_form(probe.form, len(probe.index), form, n):
        return frozenset()
    known = {name: block for name, block in blocks.items() if name in probe.projections}
    confirmed, allowed = [], tolerance(dtype, probe.device)
    for name, values in projections(known, probe.index).items():
        gap = (probe.projections[name] - values).norm()
        if bool(gap <= allowed * probe.spreads[name].sqrt()):
            confirmed.append(name)
    return frozenset(confirmed)


def _factor_bytes(block: Block, c: int) -> int:
    """Memory that one sample's factors take, of c outputs; ``block`` has one."""
    total = 0
    for part in block.summands:
        if isinstance(part, Outer | Lookup | Flipped):
            total += c * part.backward[0].nbytes
            total += sum(t[0].nbytes for name, t in vars(part).items() if name not in ("backward", "directions"))
    return total
