"""Model and inputs to tangent features: hooks where layers factor, one batched backward pass, a fallback for the rest.

Which parameters share a block is read off the model alone, so features of any two batches go together. A block counts
as factored only where every use of its parameters in the autograd graph is a call of a layer with a rule, and where a
random combination of its features is what autograd says; every other block is materialised. Nothing is skipped.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy as copy_of
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from adaptive_tangents.blocks import Block
from adaptive_tangents.errors import TangentError
from adaptive_tangents.features import TangentFeatures
from adaptive_tangents.inputs import Batch, Network, Output, Selection, check_finite, network, samples, take, tensors
from adaptive_tangents.memory import memory_limit, require_memory
from adaptive_tangents.recording import Group, Use, graph_uses, parameter_groups, recorded_calls


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


_PROBED = 16  # samples, spread over a batch, on which is tested what no layer can tell


@dataclass(frozen=True)
class Probe:
    """What a few samples of a batch tell: outputs, bytes a sample takes, blocks, and those whose factors are refuted."""

    c: int
    dtype: torch.dtype
    device: torch.device
    factored_bytes: int
    whole_bytes: int
    whole: tuple[str, ...]
    blocks: int
    refuted: frozenset[str]


class Capture:
    """A network probed on a few samples: checks done once, the cost of a sample known, features on request."""

    def __init__(
        self, call: str, model: nn.Module, x: Batch, params: Mapping[str, Tensor] | None, wrt: Selection | None,
        output: Output | None, limit: int | None,
    ) -> None:  # fmt: skip
        self.call = call
        self.network: Network = network(call, model, x, params, wrt, output)
        self.requested = limit
        self.probe = self._probe(x)
        self.limit = memory_limit(limit, self.probe.device)

    @property
    def bytes_per_sample(self) -> int:
        """Memory that the features of one sample take."""
        return max(1, self.probe.factored_bytes + self.probe.whole_bytes)

    def check_more(self, x: Batch) -> None:
        """The checks of a second batch."""
        network(self.call, self.network.model, x, None, None, None)
        refuted = self.probe.refuted | self._probe(x).refuted
        self.probe = replace(self.probe, refuted=refuted)

    def features(self, x: Batch) -> TangentFeatures:
        """The features of a batch, after a check that they fit into memory."""
        probe = self.probe
        # Factors are copied once while they are put together; materialised features are not.
        needed = samples(x) * (2 * probe.factored_bytes + probe.whole_bytes)
        if probe.whole:
            remedy = f"take fewer samples, or narrow wrt: {', '.join(probe.whole[:4])} cannot be factored"
        else:
            remedy = "take fewer samples, narrow wrt, or use tangent_kernel, which works tile by tile"
        require_memory(self.call, needed, self.limit, remedy=remedy)
        return self._features(x)

    def at(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None) -> "Capture":
        """The same capture at other parameters, and buffers where given, its checks not repeated."""
        other = copy_of(self)
        buffers = self.network.buffers if buffers is None else buffers
        other.network = replace(self.network, parameters=parameters, buffers=buffers)
        return other

    def outputs(self, x: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        """f(x; θ), shape (n, c)."""
        with self._quiet(), torch.no_grad():
            out = self.network(x, parameters)
        check_finite(self.call, "the output", [out])
        return out

    def _probe(self, x: Batch) -> Probe:
        n = samples(x)
        some = x
        if n > _PROBED:
            # Out of order between first and last, so that a model which sorts its batch cannot find it sorted.
            spread = torch.linspace(0, n - 1, _PROBED).long()
            some = take(x, torch.cat([spread[:1], spread[1:-1].flip(0), spread[-1:]]).to(tensors(x)[0].device))
        out, groups, blocks, refuted = self._factored(some, verify=True)
        c = out.shape[1]
        if not bool(torch.isfinite(out).all()):
            self.outputs(x, {})  # names the sample by its place in the batch
        self._check_interaction(some, out)
        kept = [block.outer for name, block in blocks.items() if name not in refuted and block.outer is not None]
        factored = {name for name, block in blocks.items() if block.dense is None} - refuted
        whole = [group for group in groups if group.name not in factored]
        return Probe(
            c,
            out.dtype,
            out.device,
            sum(c * outer.backward[0].nbytes + outer.inputs[0].nbytes for outer in kept),
            sum(c * group.matrix[0] * group.matrix[1] * out.element_size() for group in whole),
            tuple(slot.parameter for group in whole for slot in group.slots),
            len(groups),
            refuted,
        )

    def _check_interaction(self, x: Batch, together: Tensor) -> None:
        n = samples(x)
        if n == 1:
            return
        # The last sample too: a model that refers every sample to the first of its batch agrees on the first.
        for k in (0, n - 1):
            alone = self.outputs(take(x, slice(k, k + 1)), {})[0]
            scale = max(float(together.abs().max()), torch.finfo(together.dtype).tiny)
            gap = float((together[k] - alone).abs().max()) / scale
            if gap > 30 * torch.finfo(together.dtype).eps ** 0.75:
                raise TangentError(
                    f"{self.call}: the output of the {'last' if k else 'first'} sample is different in the batch "
                    f"and alone (by {gap:.1e} of the largest output), so samples of a batch influence each other or "
                    "outputs are random; take out what mixes the batch, e.g. batch statistics or dropout"
                )

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Leave the global random state as it was, whatever the model draws."""
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
            yield

    def _features(self, x: Batch) -> TangentFeatures:
        net = self.network
        out, groups, blocks, _ = self._factored(x, verify=False)
        n, c = out.shape
        check_finite(self.call, "the output", [out])
        for name in self.probe.refuted & set(blocks):
            del blocks[name]
        rest = [group for group in groups if group.name not in blocks]
        if rest:
            names = [slot.parameter for group in rest for slot in group.slots]
            with self._quiet():
                values = _materialise(net, names, x)
            blocks |= {group.name: group.materialised(values) for group in rest}
        for block in blocks.values():
            parts = [tensor for part in block.summands for tensor in vars(part).values()]
            check_finite(self.call, f"the tangent feature in block {block.name!r}", parts)
        shapes = {name: tuple(net.parameters[name].shape) for name in net.selected}
        return TangentFeatures(n, c, {group.name: blocks[group.name] for group in groups}, shapes, self.requested)

    def _factored(self, x: Batch, *, verify: bool) -> "_Factored":
        """Outputs, groups, and the blocks that have factors.

        To verify, the blocks are of one random combination of the outputs, and those that autograd refutes are named.
        """
        made = self._attempt(x, copy=False, verify=verify)
        if made is None:
            made = self._attempt(x, copy=True, verify=verify)
        assert made is not None
        return made

    def _attempt(self, x: Batch, *, copy: bool, verify: bool) -> "_Factored | None":
        """One pass, or None where an in-place operation overwrote an input that was not copied."""
        net = self.network
        leaves = {name: net.parameters[name].detach().requires_grad_(True) for name in net.selected}
        uses: list[Use] = []
        with self._quiet(), torch.enable_grad():
            with recorded_calls(net.model, uses, copy=copy):
                out = net(x, leaves)
            if any(use.inputs._version != use.version for use in uses):
                return None
            counts, nodes = graph_uses(out, {id(leaf): name for name, leaf in leaves.items()})
            uses = [use for use in uses if use.edge.node in nodes]
            groups = parameter_groups(net)
            plan = {g.name: g.calls(uses, counts, len(out)) for g in groups}
            plan = {name: calls for name, calls in plan.items() if calls}
            edges = {id(use): use.edge for calls in plan.values() for use in calls}
            seen = _mixed(out) if verify else out
            gradients = dict(zip(edges, _backward(seen, list(edges.values())), strict=True)) if edges else {}
            blocks = {g.name: g.block(plan[g.name], gradients) for g in groups if g.name in plan}
            refuted = _refuted(seen, leaves, blocks) if verify else frozenset[str]()
        return out.detach(), groups, blocks, refuted


_Factored = tuple[Tensor, list[Group], dict[str, Block], frozenset[str]]


def _mixed(out: Tensor) -> Tensor:
    """A random combination of the outputs (n, 1)."""
    return out @ torch.randn(out.shape[1], 1, generator=torch.Generator().manual_seed(1)).to(out)


def _refuted(out: Tensor, leaves: Mapping[str, Tensor], blocks: Mapping[str, Block]) -> frozenset[str]:
    """Blocks whose features, summed with random weights over samples and outputs, are not the gradient of that sum.

    So shows itself what no layer can tell: samples in another order inside the model, say, or a changed ``Linear``.
    Both sides are compared in a random direction of the input side, which costs less than the whole matrices.
    """
    if not blocks:
        return frozenset()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(out.shape, generator=generator).to(out)
    names = [slot.parameter for block in blocks.values() for slot in block.slots]
    try:
        found = torch.autograd.grad(out, [leaves[name] for name in names], weights, retain_graph=True)
    except RuntimeError:
        return frozenset()  # an input of a layer was overwritten: autograd cannot say, and the copy is right
    gradients = dict(zip(names, found, strict=True))
    wide = torch.promote_types(out.dtype, torch.float32)
    # What products in reduced precision differ by stays below.
    tolerance = 1e-6 if out.dtype == torch.float64 else max(1e-2, 16 * torch.finfo(out.dtype).eps)
    wrong = []
    for name, block in blocks.items():
        o, i = block.shape
        direction = torch.randn(i, generator=generator).to(out).to(wide)
        along, size = weights.new_zeros(o, dtype=wide), weights.new_zeros((), dtype=wide)
        wide_block, w = block.map(dtype=wide), weights.to(wide)
        if wide_block.outer is not None:
            outer = wide_block.outer
            signals = w[:, None, :] * (outer.inputs @ direction)[..., None]
            along = along + signals.flatten() @ outer.backward.reshape(-1, o)
            squares = w[:, None, :] ** 2 * (outer.backward**2).sum(-1) * (outer.inputs**2).sum(-1)[..., None]
            size = size + squares.sum()
        if wide_block.dense is not None:
            along = along + wide_block.dense.combine(w) @ direction
            size = size + (w[..., None, None] * wide_block.dense.values).square().sum()
        theirs = block.join(gradients).to(wide) @ direction
        if bool((along - theirs).norm() > tolerance * size.sqrt()):
            wrong.append(name)
    return frozenset(wrong)


def _backward(out: Tensor, edges: list[GradientEdge]) -> list[Tensor]:
    """Gradients (c, n, ...) of every output, summed over samples that do not interact, at each edge."""
    n, c = out.shape
    selectors = torch.eye(c, dtype=out.dtype, device=out.device)[:, None, :].expand(c, n, c)
    try:
        return list(torch.autograd.grad(out, edges, selectors, retain_graph=True, is_grads_batched=True))
    except RuntimeError:
        # vmap over the backward pass is refused by some operations; one pass an output always works.
        rows = [torch.autograd.grad(out, edges, selector, retain_graph=True) for selector in selectors]
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def _materialise(net: Network, names: list[str], x: Batch) -> dict[str, Tensor]:
    """∂f/∂θ (n, c, *shape) of parameters without factors: vmap of reverse mode, else sample by sample."""
    chosen = {name: net.parameters[name].detach() for name in names}

    def single(parameters: dict[str, Tensor], sample: Any) -> Tensor:
        return net(_map(sample, lambda tensor: tensor[None]), parameters)[0]

    try:
        per_sample = torch.func.vmap(torch.func.jacrev(single), in_dims=(None, 0), chunk_size=_chunk(chosen, x))
        made = per_sample(chosen, x)
        return {name: made[name].detach() for name in names}
    except RuntimeError:
        return _sample_by_sample(net, chosen, x)


def _sample_by_sample(net: Network, chosen: Mapping[str, Tensor], x: Batch) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {name: [] for name in chosen}
    for k in range(samples(x)):
        leaves = {name: tensor.detach().requires_grad_(True) for name, tensor in chosen.items()}
        with torch.enable_grad():
            out = net(take(x, slice(k, k + 1)), leaves)[0]
            per_output = [
                torch.autograd.grad(
                    value, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
                )
                if value.requires_grad
                else [torch.zeros_like(leaf) for leaf in leaves.values()]
                for value in out
            ]
        for name, gradients in zip(chosen, zip(*per_output, strict=True), strict=True):
            rows[name].append(torch.stack(list(gradients)))
    return {name: torch.stack(parts) for name, parts in rows.items()}


def _chunk(chosen: Mapping[str, Tensor], x: Batch) -> int:
    """Samples a vmap call holds at once."""
    return max(1, min(samples(x), 50_000_000 // max(1, sum(t.numel() for t in chosen.values()))))


def _map(x: Any, function: Any) -> Any:
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, Mapping):
        return {name: function(tensor) for name, tensor in x.items()}
    return tuple(function(tensor) for tensor in x)
