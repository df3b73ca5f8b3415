"""Features of many samples of a large network: made in chunks, kept in whichever form is smaller, put together."""

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
    """Memory that features of one sample take: while an average is made, and kept (one node, the average)."""

    making: int
    kept: int
    kept_average: int

    def samples(self, limit: int, chunk: int) -> int:
        """Samples whose features at start and on average, with one chunk in the making, stay within the limit."""
        return max(0, (limit - chunk * self.making) // (self.kept + 2 * self.kept_average))


@dataclass(frozen=True)
class Tangents:
    """A network, its samples and the outputs measured: features at any state, or averaged between two."""

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
        """Features averaged over so many nodes; the error of the identity is of all samples together."""
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
        """Nodes at which the identity holds to ``tol`` on a few samples, ``most`` where it does not."""
        few = take(self.x, torch.linspace(0, samples(self.x) - 1, min(8, samples(self.x))).long())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TangentWarning)
            return self._average(few, start, end, tol=tol, max_nodes=most).nodes

    def cost(self, state: Mapping[str, Tensor], nodes: int) -> Cost:
        """What one sample takes, from the features of a single one."""
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
        """The batch in chunks, smaller ones where less memory is free than when they were planned."""
        n, first = samples(self.x), 0
        while first < n:
            room = limit_for(None, next(self.model.parameters()).device) // self.making
            last = min(n, first + max(1, min(self.chunk, room)))
            yield take(self.x, slice(first, last)), last / n
            first = last


def fitting_chunk(tangents: Tangents, cost: Cost, wanted: int) -> tuple[Tangents, int]:
    """Chunks of a size that memory allows, and how many of the samples wanted fit.

    Raises TangentError where not even eight do.
    """
    limit = limit_for(None, next(tangents.model.parameters()).device)
    chunk = max(1, min(_PROBED, wanted, limit // 3 // cost.making))
    n = min(wanted, cost.samples(limit, chunk))
    if n < min(8, wanted):
        raise TangentError(
            f"inspect: features of one sample take {format_bytes(cost.kept + 2 * cost.kept_average)} and "
            f"{format_bytes(limit)} may be used, too little for 8 samples; narrow --wrt, or give a machine with more memory"
        )
    return replace(tangents, chunk=chunk, making=cost.making), n


def collapsed(feats: TangentFeatures) -> TangentFeatures:
    """The same features, each block as factors or as their sum Σ_t δ_t h_tᵀ, whichever takes less memory."""
    return replace(feats, blocks={name: block.compact(least=0) for name, block in feats.blocks.items()})


def together(parts: Sequence[TangentFeatures]) -> TangentFeatures:
    """Features of several batches as those of one; each part's blocks have the same form."""
    first = parts[0]
    stacks = [dict(part.blocks) for part in parts]
    blocks = {name: stack_blocks([stack.pop(name) for stack in stacks]) for name in first.blocks}
    return TangentFeatures(sum(part.n for part in parts), first.c, blocks, first.parameters, None)


def _entries(block: Block) -> int:
    return block.positions * (block.outputs * block.shape[0] + block.shape[1]) or _dense_entries(block)


def _dense_entries(block: Block) -> int:
    return block.outputs * math.prod(block.shape)
