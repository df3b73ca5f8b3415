"""Features of many samples of a large network: computed in chunks, stored in the smaller form, and joined."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from adaptive_tangents.capture.batches import Batch, samples, take
from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.capture.network import OutputFn
from adaptive_tangents.capture.path_average import AverageFeatures, average_features
from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.features.blocks import Block, stack_blocks
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.runtime.memory import format_bytes, limit_for

Tick = Callable[[float], None]
_PROBED = 16


@dataclass(frozen=True)
class Cost:
    """Memory of one sample's features: while an average is made, and when kept (at one node, or the average)."""

    making: int
    kept: int
    kept_average: int

    def samples(self, limit: int, chunk: int) -> int:
        """How many samples' features, at the start and averaged, fit into the limit beside one chunk being made."""
        return max(0, (limit - chunk * self.making) // (self.kept + 2 * self.kept_average))


@dataclass(frozen=True)
class Tangents:
    """A network, samples and outputs; gives features at one state, or averaged between two."""

    model: nn.Module
    x: Batch
    output_fn: OutputFn
    wrt: tuple[str, ...] | None
    chunk: int = _PROBED
    making: int = 1

    def at(self, state: Mapping[str, Tensor], tick: Tick = lambda fraction: None) -> TangentFeatures:
        """Features of all samples."""
        parts = []
        for part, done in self._parts():
            made = tangent_features(self.model, part, params=state, wrt=self.wrt, output_fn=self.output_fn)
            parts.append(collapsed(made))
            tick(done)
        return together(parts)

    def average(
        self, start: Mapping[str, Tensor], end: Mapping[str, Tensor], nodes: int, tick: Tick = lambda fraction: None
    ) -> AverageFeatures:
        """Features averaged over ``nodes`` nodes; the identity's error is of all samples together."""
        parts = []
        for part, done in self._parts():
            parts.append(self._average(part, start, end, nodes=nodes))
            tick(done)
        changes = [part.change for part in parts if part.change is not None]
        moved = [part.buffer_change for part in parts if part.buffer_change is not None]
        change = torch.cat(changes)
        residual = math.hypot(*(p.error * float(c.norm()) for p, c in zip(parts, changes, strict=True)))
        whole = together([collapsed(part) for part in parts])
        return AverageFeatures(
            whole.n, whole.c, whole.blocks, whole.parameters, None, error=residual / float(change.norm()), nodes=nodes,
            change=change, buffer_change=torch.cat(moved) if moved else None,
        )  # fmt: skip

    def nodes(self, start: Mapping[str, Tensor], end: Mapping[str, Tensor], *, tol: float, most: int) -> int:
        """The number of nodes at which the identity holds to ``tol`` on a few samples, at most ``most``."""
        few = take(self.x, torch.linspace(0, samples(self.x) - 1, min(8, samples(self.x))).long())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TangentWarning)
            return self._average(few, start, end, tol=tol, max_nodes=most).nodes

    def cost(self, state: Mapping[str, Tensor], nodes: int) -> Cost:
        """The memory per sample, estimated from the features of one sample."""
        one = tangent_features(
            self.model, take(self.x, slice(0, 1)), params=state, wrt=self.wrt, output_fn=self.output_fn
        )
        size = torch.finfo(one.dtype).bits // 8
        kept = sum(min(_entries(b), _dense_entries(b)) for b in one.blocks.values())
        average = sum(min(nodes * _entries(b), _dense_entries(b)) for b in one.blocks.values())
        whole = sum(block.bytes for block in one.blocks.values() if block.kind == "materialized")
        factored, summed = one.bytes - whole, size * one.c * one.p
        making = 2 * (min(nodes * factored, summed + factored) + 2 * whole)
        return Cost(max(1, making), size * kept, size * average)

    def _average(
        self, part: Batch, start: Mapping[str, Tensor], end: Mapping[str, Tensor], *, nodes: int | None = None,
        tol: float = 1e-3, max_nodes: int = 256,
    ) -> AverageFeatures:  # fmt: skip
        return average_features(
            self.model, start, end, part, nodes=nodes, tol=tol, max_nodes=max_nodes, wrt=self.wrt, output_fn=self.output_fn,
            buffers="path",
        )  # fmt: skip

    def _parts(self) -> Iterator[tuple[Batch, float]]:
        """The batch in chunks; they shrink if less memory is free than planned."""
        n, first = samples(self.x), 0
        while first < n:
            room = limit_for(None, next(self.model.parameters()).device) // self.making
            last = min(n, first + max(1, min(self.chunk, room)))
            yield take(self.x, slice(first, last)), last / n
            first = last


def fitting_chunk(tangents: Tangents, cost: Cost, wanted: int) -> tuple[Tangents, int]:
    """Set the chunk size to what memory allows, and count how many of the wanted samples fit.

    Raises TangentError if fewer than eight fit.
    """
    limit = limit_for(None, next(tangents.model.parameters()).device)
    chunk = max(1, min(_PROBED, wanted, limit // 3 // cost.making))
    n = min(wanted, cost.samples(limit, chunk))
    if n < min(8, wanted):
        raise TangentError(
            f"inspect: features of one sample take {format_bytes(cost.kept + 2 * cost.kept_average)}, and "
            f"the {format_bytes(limit)} allowed are too little for 8 samples; narrow --wrt or use a machine with more memory"
        )
    return replace(tangents, chunk=chunk, making=cost.making), n


def collapsed(feats: TangentFeatures) -> TangentFeatures:
    """The same features; each block as factors or as their sum Σ_t δ_t h_tᵀ, whichever is smaller."""
    return replace(feats, blocks={name: block.compact(least=0) for name, block in feats.blocks.items()})


def together(parts: Sequence[TangentFeatures]) -> TangentFeatures:
    """Join the features of several batches, whose blocks have the same form."""
    first = parts[0]
    stacks = [dict(part.blocks) for part in parts]
    blocks = {name: stack_blocks([stack.pop(name) for stack in stacks]) for name in first.blocks}
    return TangentFeatures(sum(part.n for part in parts), first.c, blocks, first.parameters, None)


def _entries(block: Block) -> int:
    return block.positions * (block.outputs * block.shape[0] + block.shape[1]) or _dense_entries(block)


def _dense_entries(block: Block) -> int:
    return block.outputs * math.prod(block.shape)
