"""Features of many samples of a large network: computed in chunks, stored in the smaller form, and joined."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from adaptive_tangents.capture.batches import Batch, samples, take
from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.capture.network import OutputFn
from adaptive_tangents.capture.path_average import AverageFeatures, unwarned
from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.blocks import stack_blocks, sum_blocks
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.runtime.memory import format_bytes, limit_for
from adaptive_tangents.runtime.progress import Progress

Tick = Callable[[float], None]
_FEW = 8  # samples, of which the nodes are chosen; an inspection has no fewer, unless fewer are wanted
FEWEST_NODES = 2  # of an average: what does not fit with these does not fit at all
_PROBED = 16  # samples of a chunk, if memory allows: each chunk checks and probes the network again
_CHUNK_BYTES = 2_500_000_000  # of a chunk being made; above _PROBED samples, a larger one saves little


def ignored(fraction: float) -> None:
    """A tick that nobody watches."""


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

    def at(self, state: Mapping[str, Tensor], tick: Tick = ignored) -> TangentFeatures:
        """Features of all samples."""
        parts = []
        for part, done in self._parts():
            parts.append(collapsed(self.of(part, state)))
            tick(done)
        return together(parts)

    def average(
        self, start: Mapping[str, Tensor], end: Mapping[str, Tensor], nodes: int, tick: Tick = ignored
    ) -> AverageFeatures:
        """Features averaged over ``nodes`` nodes; the identity's error is of all samples together."""
        parts, before = [], 0.0
        for part, done in self._parts():
            told = partial(_within, tick, before, done - before)
            parts.append(self._average(part, start, end, nodes=nodes, progress=told))
            before = done
        changes = [part.change for part in parts if part.change is not None]
        moved = [part.buffer_change for part in parts if part.buffer_change is not None]
        change = torch.cat(changes)
        residual = math.hypot(*(p.error * float(c.norm()) for p, c in zip(parts, changes, strict=True)))
        whole = together([collapsed(part) for part in parts])
        return AverageFeatures(
            whole.n, whole.c, whole.blocks, whole.parameters, None, error=residual / float(change.norm()), nodes=nodes,
            change=change, buffer_change=torch.cat(moved) if moved else None,
        )  # fmt: skip

    def nodes(
        self, start: Mapping[str, Tensor], end: Mapping[str, Tensor], nodes: int | None, *, tol: float, most: int
    ) -> tuple[int, float]:
        """The nodes, if not given those at which the identity holds to ``tol`` on a few samples; seconds of one sample."""
        count = max(1, min(_FEW, samples(self.x), self.limit // self.making))
        few = take(self.x, torch.linspace(0, samples(self.x) - 1, count, device="cpu").long())
        marks: list[float] = []
        found = self._average(
            few, start, end, nodes=None if nodes is None else 2, tol=tol, max_nodes=most,
            progress=lambda stage, fraction: marks.append(time.perf_counter()),
        )  # fmt: skip
        steps = [after - before for before, after in pairwise(marks)] or [0.0]
        return nodes or found.nodes, sorted(steps)[len(steps) // 2] / samples(few)

    def layout(self, state: Mapping[str, Tensor]) -> TangentFeatures:
        """The features of one sample, whose blocks show what those of many will take."""
        return self.of(take(self.x, slice(0, 1)), state)

    def of(self, part: Batch, state: Mapping[str, Tensor]) -> TangentFeatures:
        """The features of a few samples, as they are made."""
        return tangent_features(self.model, part, params=state, wrt=self.wrt, output_fn=self.output_fn)

    def _average(
        self, part: Batch, start: Mapping[str, Tensor], end: Mapping[str, Tensor], *, nodes: int | None = None,
        tol: float = 1e-3, max_nodes: int = 256, progress: Progress | None = None,
    ) -> AverageFeatures:  # fmt: skip
        # The identity's error is told with the findings, so it needs no warning.
        found, _ = unwarned(
            self.model, start, end, part, nodes=nodes, tol=tol, max_nodes=max_nodes, wrt=self.wrt, output_fn=self.output_fn,
            buffers="path", progress=progress, call="inspect",
        )  # fmt: skip
        return found

    def _parts(self) -> Iterator[tuple[Batch, float]]:
        """The batch in chunks; they shrink if less memory is free than planned."""
        n, first = samples(self.x), 0
        while first < n:
            last = min(n, first + max(1, min(self.chunk, self.limit // self.making)))
            yield take(self.x, slice(first, last)), last / n
            first = last

    @property
    def limit(self) -> int:
        """The bytes that features may take now."""
        return limit_for(None, next(self.model.parameters()).device)


def _within(tick: Tick, before: float, share: float, stage: str, fraction: float) -> None:
    tick(before + share * fraction)


def making_of(one: TangentFeatures, nodes: int) -> int:
    """The memory per sample while an average is made, from the features of one."""
    size = torch.finfo(one.dtype).bits // 8
    whole = sum(block.bytes for block in one.blocks.values() if block.kind == "materialized")
    factored, summed = one.bytes - whole, size * one.c * one.p
    return max(1, 2 * (min(nodes * factored, summed + factored) + 2 * whole))


def cost_of(one: TangentFeatures, nodes: int) -> Cost:
    """The memory per sample, from the features of one."""
    return Cost(making_of(one, nodes), collapsed(one).bytes, averaged(one, nodes).bytes)


def averaged(one: TangentFeatures, nodes: int) -> TangentFeatures:
    """Features in the form of an average's over this many nodes, to count what its measures take."""
    blocks = {name: sum_blocks([block.scaled(1 / nodes)] * nodes) for name, block in one.blocks.items()}
    return collapsed(replace(one, blocks=blocks))


def fitting_chunk(tangents: Tangents, cost: Cost, wanted: int) -> tuple[Tangents, int]:
    """Set the chunk size to what memory allows, and count how many of the wanted samples fit.

    Raises TangentError if fewer than eight fit.
    """
    limit = tangents.limit
    chunk, n = _fitting(limit, cost, wanted)
    if n < min(_FEW, wanted):
        fewer = next((k for k in range(min(_FEW, wanted) - 1, 3, -1) if _fitting(limit, cost, k)[1] == k), None)
        raise TangentError(
            f"inspect: features of one sample take {format_bytes(cost.kept + 2 * cost.kept_average)}, and "
            f"the {format_bytes(limit)} allowed are too little for {min(_FEW, wanted)} samples; "
            + (f"give --samples {fewer}, " if fewer else "")
            + "measure fewer outputs (--outputs main is one), lower --nodes, narrow --wrt, or use a machine with more memory"
        )
    return replace(tangents, chunk=chunk, making=cost.making), n


def _fitting(limit: int, cost: Cost, wanted: int) -> tuple[int, int]:
    """The samples of a chunk, and how many of those wanted fit beside one."""
    room = min(limit // 3, max(_CHUNK_BYTES, _PROBED * cost.making))
    spare = max(limit - wanted * (cost.kept + 2 * cost.kept_average), _PROBED * cost.making)
    chunk = max(1, min(wanted, room // cost.making, spare // cost.making))
    return chunk, min(wanted, cost.samples(limit, chunk))


def collapsed(feats: TangentFeatures) -> TangentFeatures:
    """The same features; each block as factors or as their sum Σ_t δ_t h_tᵀ, whichever is smaller."""
    return replace(feats, blocks={name: block.compact(least=0) for name, block in feats.blocks.items()})


def together(parts: Sequence[TangentFeatures]) -> TangentFeatures:
    """Join the features of several batches, whose blocks have the same form."""
    first = parts[0]
    stacks = [dict(part.blocks) for part in parts]
    blocks = {name: stack_blocks([stack.pop(name) for stack in stacks]) for name in first.blocks}
    return TangentFeatures(sum(part.n for part in parts), first.c, blocks, first.parameters, None)
