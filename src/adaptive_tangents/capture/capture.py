"""From a model and inputs to tangent features: recorded layer calls, one backward pass, and a fallback for the rest.

The model alone says which parameters share a block, so features of any two batches fit together. A block is made from
calls of layers with a rule, if these are all uses of its parameters in the autograd graph; otherwise from the uses found
in that graph. A block is accepted only if a random combination of its features equals what autograd gives. This is checked
on every batch, unless the same operations reproduce features that passed the check on some of the batch's samples. Every
other block is materialized, sample by sample. Nothing is skipped.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import copy as copy_of
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adaptive_tangents.capture.batches import Batch, check_batch, samples, take, tensors
from adaptive_tangents.capture.block_sources import Choice
from adaptive_tangents.capture.derivatives import materialize, mixed, projections, spreads, tolerance
from adaptive_tangents.capture.differences import check_state, follows, verify
from adaptive_tangents.capture.failures import worded
from adaptive_tangents.capture.graph import form_of, same_form
from adaptive_tangents.capture.groups import parameter_groups
from adaptive_tangents.capture.held_nodes import free_graphs
from adaptive_tangents.capture.interaction import allowed_gap, check_interaction, check_part, gap
from adaptive_tangents.capture.lease import LOCK
from adaptive_tangents.capture.network import Network, OutputFn, Selection, network, recordable
from adaptive_tangents.capture.passes import Forward, Found, assemble, common_dtype, forward, refuted, retry
from adaptive_tangents.capture.probe import (
    LEAST_PROBED,
    PROBE_SHARE,
    PROBED,
    Probe,
    at_once,
    factor_bytes,
    spread_over,
)
from adaptive_tangents.capture.recording import bytes_kept
from adaptive_tangents.capture.state_names import Params
from adaptive_tangents.checks import check_finite
from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.blocks import Block, stack_blocks
from adaptive_tangents.features.summands import tensors_of
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.runtime.chunks import ranges
from adaptive_tangents.runtime.memory import keep_freed, limit_for, require_memory
from adaptive_tangents.runtime.recursion import room_for

_Made = TypeVar("_Made")


def tangent_features(
    model: nn.Module,
    x: Batch,
    *,
    params: Params | None = None,
    wrt: Selection | None = None,
    output_fn: OutputFn | None = None,
    memory_limit: int | None = None,
) -> TangentFeatures:
    r"""Tangent features φ(x) = ∂f(x;θ)/∂θ of a network, exact, in factors Σ_t δ_t h_tᵀ wherever a layer allows it.

    Args:
        model: the network f; it is left as it was.
        x: samples first, (n, ...): a tensor, or a tuple, list, dict or dataclass of tensors, flags and None.
        params: a state dict to evaluate the model at; None is the model's own values. A prefix that all names share
            ("module.", "_orig_mod.", "model.") is dropped or added, and one under "state_dict" or "model" is found.
        wrt: the parameters θ: a name pattern, a parameter, or several of these; None is all that require a gradient.
        output_fn: picks a tensor (n, c) from what the model returns; None takes that itself, or its `logits`.
        memory_limit: bytes that may be used; None is half of what is free.

    Raises:
        TangentError: when samples of a batch interact, shapes, dtypes or devices do not fit, values are not finite, or
            memory would exceed the limit.

    Source: LeJeune & Alemohammad, CPAL 2024, §2.

    >>> import torch, adaptive_tangents as at
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> feats = at.tangent_features(model, torch.randn(10, 4))
    >>> {name: block.shape for name, block in feats.blocks.items()}
    {'0': (8, 5), '2': (2, 9)}
    >>> feats.kernel(outputs="trace").shape
    torch.Size([10, 10])
    """
    return Capture("tangent_features", model, x, params, wrt, output_fn, memory_limit, whole=True).features(x)


PASS_BYTES = 1_000_000_000  # more at once is no faster, but for networks whose parameters themselves take that much
_SOURCES = 3  # of a block that are tried with features of all samples; with a few samples and one output, all are
_GRADIENTS = 4  # a pass of a large network may take as much as so many gradients: each pass makes and reads some


class Capture:
    """A network that is checked and probed on a few samples once, and then gives features on request.

    With ``whole``, features of a small batch are made at once, and kept until they are asked for.
    """

    def __init__(
        self, call: str, model: Any, x: Any, params: Params | None, wrt: Selection | None,
        output_fn: OutputFn | None, limit: int | None, *, whole: bool = False,
    ) -> None:  # fmt: skip
        self.call, self.requested, self.verify, self._whole = call, limit, True, whole
        self._made: list[tuple[Batch, tuple[Tensor, dict[str, Block]]]] = []
        self._sound: list[tuple[int, tuple[str, ...]]] = []
        self.network: Network

        def probed() -> Probe:
            with LOCK:
                self.network = network(call, model, x, params, wrt, output_fn)
                self.groups = parameter_groups(self.network)
            keep_freed()
            self.limit = limit_for(limit, tensors(x)[0].device)
            with worded(self.network, x):
                return self.network.lend(lambda: self._probe(x))

        self.probe = room_for(call, probed)
        free_graphs()
        self._probed: list[tuple[Batch, Probe]] = [(x, self.probe)]

    @property
    def bytes_per_sample(self) -> int:
        """Bytes that the features of one sample take."""
        return max(1, self.probe.held_bytes())

    @property
    def gradient_bytes(self) -> int:
        """Bytes that one gradient of the selected parameters takes."""
        return sum(self.network.parameters[name].nbytes for name in self.network.selected)

    def check_more(self, x: Any) -> None:
        """Check and probe a second batch, unless it is the first one."""
        if self._own_probe(x) is not None:
            return
        check_batch(self.call, x, self.network.parameters)

        def probed() -> Probe:
            with worded(self.network, x):
                return self.network.lend(lambda: self._probe(x))

        other = room_for(self.call, probed)
        free_graphs()
        self._probed.append((x, other))
        # A larger batch says more about where the samples are.
        choices = self.probe.choices if len(other.index) <= len(self.probe.index) else other.choices
        self.probe = replace(self.probe, refuted=self.probe.refuted | other.refuted, choices=choices)

    def features(self, x: Batch, chunk: int | None = None) -> TangentFeatures:
        """The features of a batch, after a check that they fit into memory; ``chunk`` samples per pass, or as fit."""
        probe, n = self.probe, samples(x)
        # Joining the passes copies the factors of one block at a time.
        needed = n * (probe.held_bytes() + probe.largest_bytes)
        if probe.whole:
            remedy = f"take fewer samples, or narrow wrt: {', '.join(probe.whole[:4])} cannot be factored"
        else:
            remedy = "take fewer samples, narrow wrt, or use tangent_kernel, which works tile by tile"
        require_memory(self.call, needed, self.limit, remedy=remedy)
        # A pass must leave memory for what is held beside it: a kernel, or another tile's features.
        room = min(max(self.limit - needed, 0), self.limit // 4, max(PASS_BYTES, _GRADIENTS * self.gradient_bytes))
        chunk = max(1, min(n, chunk or room // max(1, probe.pass_bytes)))

        def passes() -> list[tuple[Tensor, dict[str, Block]]]:
            with worded(self.network, self._users(x), x):
                return [self._features(x if chunk == n else take(x, part)) for part in ranges(n, chunk)]

        there = [made for batch, made in self._made if batch is x and chunk == n][:1]
        self._made = [(batch, made) for batch, made in self._made if batch is not x]
        made = there or room_for(self.call, passes)
        out = torch.cat([found for found, _ in made])
        self._check_same(x, out)
        blocks = {name: stack_blocks([parts.pop(name) for _, parts in made]) for name in list(made[0][1])}
        shapes = {name: tuple(self.network.parameters[name].shape) for name in self.network.selected}
        return TangentFeatures(n, out.shape[1], blocks, shapes, self.requested)

    def at(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None) -> "Capture":
        """The same capture at other parameters, and other buffers if given; its checks are not repeated."""
        other = copy_of(self)
        buffers = self.network.buffers if buffers is None else buffers
        other.network = replace(self.network, parameters=recordable(parameters), buffers=recordable(buffers))
        other.verify, other._made = False, []
        return other

    def forget(self) -> None:
        """Let go of features that were made at once, where only the probe is of use."""
        self._made = []

    def _own_probe(self, x: Batch) -> Probe | None:
        """The probe that was made from this very batch, if there is one."""
        return next((probe for batch, probe in self._probed if batch is x), None)

    def _users(self, part: Batch) -> Batch:
        """The batch that the user gave and of which ``part`` may be a part."""
        return next((batch for batch, _ in self._probed if samples(batch) >= samples(part)), part)

    def outputs(self, x: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        """f(x; θ), shape (n, c)."""

        def evaluated() -> Tensor:
            with torch.no_grad():
                return self.network(x, parameters)

        out = room_for(self.call, evaluated)
        check_finite(self.call, "the output", [out])
        return out

    def _probe(self, x: Batch) -> Probe:
        n, one, saved, small = samples(x), take(x, slice(0, 1)), 0, False
        with suppress(TangentError):  # errors of the output are reported for the batch below
            first, saved, small = self._alone(one, n)
        if small:
            probe = self._at_once(x, first, saved)
            if probe is not None:
                return probe
            with suppress(TangentError):
                first, saved, _ = self._alone(one)
        probed = min(PROBED, max(LEAST_PROBED, self.limit // (PROBE_SHARE * max(1, saved))))
        index, some = torch.arange(n, device="cpu"), x
        if n > probed:
            index = spread_over(n, probed)
            some = take(x, index.to(tensors(x)[0].device))
        found = self._pass(some, self._search)
        out, blocks = found.seen.out.detach(), found.blocks
        if not bool(torch.isfinite(out).all()):
            self.outputs(x, {})  # names the sample by its place in the batch
        if not saved:
            first, saved, _ = self._alone(one)
        graph = found.seen.graph
        probe = self._told(found, saved, index)
        check_interaction(self.network, some, out, first, probe.least)
        return replace(probe, form=form_of(graph), projections=projections(blocks), spreads=spreads(blocks))

    def _told(self, found: Found, saved: int, index: Tensor) -> Probe:
        """What features of a combination of the outputs, or of all of them, tell."""
        out, blocks, graph = found.seen.out.detach(), found.blocks, found.seen.graph
        c = out.shape[1]
        # A block without a source here gets no choice: in a batch of another size a wrong source could seem to fit.
        choices = {name: source.settled(found.choices.get(name, Choice())) for name, source in found.sources.items()}
        made = [group for group in self.groups if group.name not in blocks]
        sizes = {group.name: c * group.matrix[0] * group.matrix[1] * out.element_size() for group in self.groups}
        return Probe(
            c, out.dtype, graph.dtype if graph.dtype == torch.float32 else out.dtype, out.device,
            {name: factor_bytes(block, c) for name, block in blocks.items() if block.dense is None}, sizes,
            c * found.gradient_bytes // found.target.numel() + saved,
            tuple(slot.parameter for group in made for slot in group.slots), choices, found.given_up, index, out,
        )  # fmt: skip

    def _at_once(self, x: Batch, first: Tensor, saved: int) -> Probe | None:
        """Make, check and keep all features of a small batch; None if the first few sources of some block are not right."""

        def steps(seen: Forward) -> tuple[Found, bool]:
            found = assemble(seen, seen.out, self.groups, {}, batched=True, keep=True)
            for _ in range(_SOURCES):
                right = len(found.blocks) == len(self.groups)
                if not right or not (wrong := refuted(found)):
                    break
                found, right = retry(found, wrong, self.groups), False
            self.network.check_returned()
            return replace(found, gradients={}), right

        found, right = self._pass(x, steps)
        if not right:
            return None
        out = found.seen.out.detach()
        if not bool(torch.isfinite(out).all()):
            self.outputs(x, {})
        probe = self._told(found, saved, torch.arange(len(out), device="cpu"))
        blocks = {group.name: found.blocks[group.name].compact() for group in self.groups}
        self._check_features(blocks)
        near = allowed_gap(probe.least)
        index = (
            spread_over(len(out), PROBED).flip(0) if len(out) > PROBED else torch.tensor([len(out) - 1], device="cpu")
        )
        alone = gap(out[0], first, out) <= near
        if not alone or not follows(self.network, x, blocks, found.seen, index, near):
            self._alone(take(x, slice(0, 1)))
            check_interaction(self.network, x, out, first, probe.least)
            if len(index) > 1:
                check_part(self.network, self.outputs(take(x, index.to(out.device)), {}), index, out, probe.least)
        self._made.append((x, (out, blocks)))
        self._sound.append((len(out), found.seen.graph.operations))
        return probe

    def _alone(self, x: Batch, n: int = 0) -> tuple[Tensor, int, bool]:
        """The output of one sample by itself, the bytes that autograd keeps of its forward pass, and whether n are small.

        Of a small batch, the gradient is judged with its features.
        """
        own = {p.untyped_storage().data_ptr() for p in self.network.parameters.values() if p.layout == torch.strided}

        def run() -> tuple[Tensor, int, bool]:
            leaves = self.network.leaves()
            out, saved = bytes_kept(lambda: self.network(x, leaves), own)
            numbers = sum(leaf.numel() for leaf in leaves.values())
            small = n > 0 and self._whole and saved > 0 and at_once(n, out.shape[1], saved, self.limit, numbers)
            if small:
                check_state(self.network, out)
            else:
                verify(self.network, x, out, leaves)
            return out.detach()[0], saved, small

        with torch.enable_grad():
            return self.network.lend(run)

    def _check_same(self, x: Batch, out: Tensor) -> None:
        """Raise TangentError if the probed samples have other outputs in the whole batch than in the probe."""
        probe = self._own_probe(x)
        if probe is not None and self.verify and len(out) != len(probe.index):
            check_part(self.network, probe.out, probe.index.to(out.device), out, probe.least)

    def _features(self, x: Batch) -> tuple[Tensor, dict[str, Block]]:
        """Outputs and blocks of as many samples as fit into one pass."""
        out, made = self._in_one_pass(x)
        check_finite(self.call, "the output", [out])
        net, probe = self.network, self.probe
        rest = [group for group in self.groups if group.name not in made]
        if rest:
            names = [slot.parameter for group in rest for slot in group.slots]
            held = sum(net.parameters[name].nbytes for name in names)
            fit = max(1, min(samples(x), PASS_BYTES // max(1, 2 * probe.pass_bytes + probe.c * held)))
            values = net.lend(lambda: materialize(net, names, x, chunk=fit))
            dtype = common_dtype(net.parameters[name] for name in net.selected)
            made |= {group.name: group.materialized(values).map(dtype=dtype) for group in rest}
        self._check_features(made)
        return out, {group.name: made[group.name] for group in self.groups}

    def _check_features(self, blocks: Mapping[str, Block]) -> None:
        held = [
            t for block in blocks.values() for part in block.summands for t in tensors_of(part) if t.is_floating_point()
        ]
        if bool(torch.isfinite(torch.stack([norm.double() for norm in torch._foreach_norm(held)])).all()):
            return
        for block in blocks.values():
            parts = [tensor for part in block.summands for tensor in vars(part).values()]
            check_finite(self.call, f"the tangent feature in block {block.name!r}", parts)

    def _search(self, seen: Forward) -> Found:
        """Features of a random combination of the outputs; a refuted block tries its next choice until none is left."""
        found = assemble(seen, mixed(seen.out), self.groups, {})
        while wrong := refuted(found):
            found = retry(found, wrong, self.groups)
        return found

    def _in_one_pass(self, x: Batch) -> tuple[Tensor, dict[str, Block]]:
        """Outputs, and the blocks that need not be made sample by sample."""
        probe, own = self.probe, self._own_probe(x)
        choices = probe.choices if own is None else own.choices
        groups = [group for group in self.groups if group.name in choices and group.name not in probe.refuted]
        unseen = self.verify and (own is None or samples(x) > len(own.index))

        def steps(seen: Forward) -> tuple[Tensor, dict[str, Block]]:
            # Batched gradients were right for as many samples and the same operations, so they are at other parameters.
            sound = not self.verify and (len(seen.out), seen.graph.operations) in self._sound
            found = assemble(seen, seen.out, groups, choices, batched=sound)
            found = replace(found, blocks={name: block.compact() for name, block in found.blocks.items()})
            sure = found.sources.keys() if not unseen else _confirmed(own, found) if own is not None else frozenset()
            # Where a gradient was zero, as below a head of zeros, the probe took whatever place of the samples came first.
            unsure = {
                n for n, source in found.sources.items() if source.unsure or (not self.verify and source.ways > 1)
            }
            found = replace(found, unchecked=(found.blocks.keys() - sure) | unsure)
            return seen.out.detach(), dict(found.without(refuted(found)).blocks)

        return self._pass(x, steps)

    def _pass(self, x: Batch, steps: Callable[[Forward], _Made]) -> _Made:
        """Apply ``steps`` to a forward pass; to one with copies, if an in-place operation overwrote what they need."""
        try:
            made = self._attempt(x, steps, copy=False)
            made = self._attempt(x, steps, copy=True) if made is None else made
            assert made is not None
            return made
        finally:
            free_graphs()

    def _attempt(self, x: Batch, steps: Callable[[Forward], _Made], *, copy: bool) -> _Made | None:
        def taken() -> _Made | None:
            with torch.enable_grad():
                seen = forward(self.network, x, copy=copy)
                try:
                    seen.check_inputs()
                    return steps(seen)
                except RuntimeError:
                    if copy:
                        raise
            return None

        # On loan until gradients are made: a backward pass may run modules again.
        return self.network.lend(taken)


def _confirmed(probe: Probe, found: Found) -> frozenset[str]:
    """Blocks that the same operations made and whose features of the probed samples are those of the probe."""
    graph = found.seen.graph
    if not same_form(probe.form, len(probe.index), form_of(graph), len(found.target)):
        return frozenset()
    known = {name: block for name, block in found.blocks.items() if name in probe.projections}
    confirmed, allowed = [], tolerance(graph.dtype, probe.device)
    for name, values in projections(known, probe.index).items():
        gap = (probe.projections[name] - values).norm()
        if bool(gap <= allowed * probe.spreads[name].sqrt()):
            confirmed.append(name)
    return frozenset(confirmed)
