"""What a stored kernel will take before it is made: tiles, room for features, bytes, operations, seconds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt

import torch

from adaptive_tangents.capture.capture import PASS_BYTES
from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.kernel_layout import Outputs
from adaptive_tangents.features.plans import WORKING_BYTES, KernelPlan
from adaptive_tangents.runtime.memory import format_bytes, require_memory

_CHUNK_BYTES = 32_000_000  # of a tile on disk: larger ones save nothing, and less is lost by a kill
_SIDE = 8  # tiles a side at least, so that there is something to share and to resume
_SMALLEST, _SMALL = 128, 32  # samples a tile: not fewer for the sake of more tiles; for the sake of room
_MOST = 500  # ranges of samples
_STORED_A_SECOND = 1e8  # bytes compressed, written and read back


@dataclass(frozen=True)
class Sizes:
    """Bytes that the features of one sample take: ``held``, while they are ``made``, and in the pass that makes them.

    ``checking`` is what comparing them with autograd's gradients takes in every pass, ``always`` what is held throughout.
    ``entries`` of the kernel there are for a pair of samples, each of ``itemsize`` bytes.
    """

    n: int
    m: int
    symmetric: bool
    held: int
    made: int
    passing: int
    checking: int
    always: int
    entries: int
    itemsize: int

    def ranges(self, tile: int) -> int:
        """How many ranges of ``tile`` samples there are."""
        return -(-self.n // tile) + (0 if self.symmetric else -(-self.m // tile))


@dataclass(frozen=True)
class Layout:
    """How a kernel is cut into tiles, and what is held at a time.

    ``tile`` samples a side; ``cached`` tiles' features; features of ``pass_samples`` samples are made at once;
    ``working_bytes`` for contracting them; ``bytes`` of memory altogether.
    """

    tile: int
    cached: int
    pass_samples: int
    working_bytes: int
    bytes: int


@dataclass(frozen=True)
class StorePlan:
    """What a kernel store will cost before it is made; ``print`` it.

    ``tile`` samples a side of each of ``tiles`` tiles; ``cached`` of N ranges of samples have their features held, so that
    features are captured ``captures`` times by all ``processes`` together; ``contraction`` is the plan of one tile. Seconds
    are expected ones: operations at this machine's speed, captures as measured on a few samples, processes in parallel.
    """

    outputs: Outputs
    shape: tuple[int, ...]
    dtype: torch.dtype
    kernels: int
    layout: Layout
    tiles: int
    ranges: int
    captures: int
    processes: int
    contraction: KernelPlan
    operations: int
    disk_bytes: int
    capture_seconds: float
    contract_seconds: float
    limit: int

    @property
    def bytes(self) -> int:
        """Peak memory of a process: features held and being made, a tile, and the room for contracting it."""
        return self.layout.bytes

    @property
    def store_seconds(self) -> float:
        """Seconds expected for compressing, writing and reading back."""
        return self.disk_bytes / _STORED_A_SECOND

    @property
    def seconds(self) -> float:
        """Seconds expected."""
        return (self.capture_seconds + self.contract_seconds + self.store_seconds) / self.processes

    def __str__(self) -> str:
        layout, kernels = self.layout, f"{self.kernels} kernels of" if self.kernels > 1 else "kernel"
        shape = " × ".join(map(str, self.shape))
        spent = (self.capture_seconds, self.contract_seconds, self.store_seconds)
        parts = zip(("capturing", "contracting", "storing"), spent, strict=True)
        return "\n".join(
            [
                f"{kernels} {shape} ({self.outputs}, {str(self.dtype).removeprefix('torch.')}), "
                f"at most {format_bytes(self.disk_bytes)} on disk",
                f"{self.tiles} tiles of {layout.tile} samples a side, features of {layout.cached} of {self.ranges} ranges of "
                f"samples held, {self.captures} captures",
                str(self.contraction).rpartition("\n")[0],
                f"memory of a process: {format_bytes(self.bytes)} of {format_bytes(self.limit)} allowed",
                f"{self.operations:.3g} operations, {self.processes} {'process' if self.processes == 1 else 'processes'}",
                f"about {duration(self.seconds)}: "
                + ", ".join(f"{what} {duration(seconds / self.processes)}" for what, seconds in parts),
            ]
        )


def lay_out(call: str, sizes: Sizes, limit: int, *, tile: int | None = None, fixed: Layout | None = None) -> Layout:
    """The tiles of a kernel within a memory limit; their size given, or all but what is held as in an earlier layout.

    Raises TangentError where even tiles of one sample, or those given, exceed it, or would be too many.
    """
    longest = max(sizes.n, sizes.m)
    if fixed is not None:
        return _checked(call, sizes, limit, _held(sizes, limit, fixed))
    if tile is not None:
        return _checked(call, sizes, limit, _laid_out(sizes, limit, min(tile, longest)))
    chunk = isqrt(_CHUNK_BYTES // (sizes.entries * sizes.itemsize))
    side = max(1, min(longest, chunk, max(_SMALLEST, -(-longest // _SIDE))))
    layout = _laid_out(sizes, limit, side)
    while layout.tile > 1 and layout.bytes > limit:
        layout = _laid_out(sizes, limit, layout.tile // 2)
    # Smaller tiles waste less of the room, but are slower to contract.
    while layout.tile > 2 * _SMALL and layout.cached < min(_SIDE, sizes.ranges(layout.tile)):
        layout = _laid_out(sizes, limit, layout.tile // 2)
    return _checked(call, sizes, limit, layout)


def _checked(call: str, sizes: Sizes, limit: int, layout: Layout) -> Layout:
    smaller = "a smaller tile" if layout.tile > 1 else "fewer outputs or parameters (wrt)"
    require_memory(call, layout.bytes, limit, remedy=f"use {smaller}, outputs='trace' or a sketch")
    if sizes.ranges(layout.tile) > _MOST:
        raise TangentError(
            f"{call}: tiles of {layout.tile} samples would cut the kernel at {sizes.ranges(layout.tile)} places, and {_MOST} "
            "are the most that makes sense; use a larger tile, a larger memory_limit, or a sketch"
        )
    return layout


def _laid_out(sizes: Sizes, limit: int, tile: int) -> Layout:
    samples = max(1, min(tile, min(limit // 4, PASS_BYTES) // max(1, sizes.passing)))
    return _held(sizes, limit, Layout(tile, 1, samples, min(WORKING_BYTES, limit // 16), 0))


def _held(sizes: Sizes, limit: int, layout: Layout) -> Layout:
    """With as many tiles' features held as there is room for."""
    tile, ranges = layout.tile, sizes.ranges(layout.tile)
    features = tile * sizes.held
    # A tile in float64, one block's kernel, and the tile as stored, as compressed and as read back.
    entries = tile * tile * sizes.entries * (8 + 4 * sizes.itemsize)
    making = tile * sizes.made + layout.pass_samples * sizes.passing + sizes.checking
    least = sizes.always + max(making, features + entries + layout.working_bytes)
    cached = max(min(2, ranges), min(ranges, 1 + max(0, limit - least) // max(1, features)))
    return replace(layout, cached=cached, bytes=(cached - 1) * features + least)


def tile_costs(
    places: Sequence[tuple[int, int]], tile: int, n: int, m: int, *, symmetric: bool
) -> dict[tuple[int, int], float]:
    """Contracting each tile, in full tiles: those at the edges are smaller, of those on the diagonal half is made."""

    def share(k: int, total: int) -> float:
        return (min((k + 1) * tile, total) - k * tile) / tile

    return {(i, j): share(i, n) * share(j, m) * (0.6 if symmetric and i == j else 1.0) for i, j in places}


def duration(seconds: float) -> str:
    """A time for people.

    >>> duration(7300)
    '2 h 2 min'
    """
    if seconds < 120:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
