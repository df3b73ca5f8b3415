"""What a stored kernel will cost, before it is made: tiles, features held, bytes, operations, seconds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt

import torch

from adaptive_tangents.capture.capture import PASS_BYTES
from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.kernel_layout import Outputs
from adaptive_tangents.features.plans import WORKING_BYTES, KernelPlan
from adaptive_tangents.runtime.memory import format_bytes, require_memory
from adaptive_tangents.runtime.told import html

_CHUNK_BYTES = 32_000_000  # of a tile on disk: larger tiles save no time, and a kill loses more
_SIDE = 8  # least number of tiles along a side, so that there is something to share and to resume
_SMALLEST, _SMALL = 128, 32  # least samples per tile: when made smaller for more tiles; when made smaller for memory
_MOST = 500  # ranges of samples
_STORED_A_SECOND = 1e8  # bytes compressed, written and read back per second


@dataclass(frozen=True)
class Sizes:
    """Bytes for the features of one sample: when ``held``, while they are ``made``, and ``passing`` in a pass.

    ``checking`` is what the comparison with autograd takes in every pass, ``always`` what is held throughout. A pair of
    samples has ``entries`` kernel entries of ``itemsize`` bytes.
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
        """The number of ranges of ``tile`` samples."""
        return -(-self.n // tile) + (0 if self.symmetric else -(-self.m // tile))


@dataclass(frozen=True)
class Layout:
    """How a kernel is cut into tiles, and what is held at a time.

    ``tile`` is the samples along a side. Features of ``cached`` ranges are held, and features of ``pass_samples`` samples
    are made at once. Contraction uses ``working_bytes``; everything together takes ``bytes``.
    """

    tile: int
    cached: int
    pass_samples: int
    working_bytes: int
    bytes: int


@dataclass(frozen=True, repr=False)
class StorePlan:
    """What a kernel store will cost, before it is made; ``print`` it.

    There are ``tiles`` tiles. All ``processes`` together capture the features of a range ``captures`` times.
    ``contraction`` is the plan of one tile. Expected seconds are from operations at this machine's speed, captures as
    measured on a few samples, and processes that run in parallel.
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
        """Peak memory of a process: features held and being made, a tile, and the working memory of contracting it."""
        return self.layout.bytes

    @property
    def store_seconds(self) -> float:
        """Expected seconds for compressing, writing and reading back."""
        return self.disk_bytes / _STORED_A_SECOND

    @property
    def seconds(self) -> float:
        """Expected seconds."""
        return (self.capture_seconds + self.contract_seconds + self.store_seconds) / self.processes

    def __repr__(self) -> str:
        return (
            f"StorePlan({self.kernels} × {' × '.join(map(str, self.shape))} {self.outputs}, {self.tiles} tiles, at most "
            f"{format_bytes(self.disk_bytes)} on disk, {self.captures} captures, about {duration(self.seconds)})"
        )

    def _repr_html_(self) -> str:
        facts = {
            "kernels": f"{self.kernels} of {' × '.join(map(str, self.shape))}, {self.outputs}",
            "on disk": f"at most {format_bytes(self.disk_bytes)}, {self.tiles} tiles of {self.layout.tile} samples a side",
            "features": f"{self.layout.cached} of {self.ranges} ranges held, {self.captures} captures",
            "memory": f"{format_bytes(self.bytes)} of {format_bytes(self.limit)} allowed, in each of {self.processes}",
            "expected": duration(self.seconds),
        }
        rows = ((b.name, f"{b.shape[0]} × {b.shape[1]}", b.positions, b.route) for b in self.contraction.blocks)
        return html("StorePlan", facts, ("block", "o × i", "positions", "route"), rows)

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
    """The tiles of a kernel within a memory limit.

    ``tile`` fixes their size. ``fixed`` is an earlier layout: only the number of features held is chosen anew. Raises
    TangentError if the tiles given, or even tiles of one sample, exceed the limit, or if there would be too many.
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
    # Smaller tiles use memory better, but are slower to contract.
    while layout.tile > 2 * _SMALL and layout.cached < min(_SIDE, sizes.ranges(layout.tile)):
        layout = _laid_out(sizes, limit, layout.tile // 2)
    return _checked(call, sizes, limit, layout)


def _checked(call: str, sizes: Sizes, limit: int, layout: Layout) -> Layout:
    smaller = "a smaller tile" if layout.tile > 1 else "fewer outputs or parameters (wrt)"
    require_memory(call, layout.bytes, limit, remedy=f"use {smaller}, outputs='trace' or a sketch")
    if sizes.ranges(layout.tile) > _MOST:
        raise TangentError(
            f"{call}: tiles of {layout.tile} samples would make {sizes.ranges(layout.tile)} ranges of samples, and {_MOST} "
            "is the most that makes sense; use a larger tile, a larger memory_limit, or a sketch"
        )
    return layout


def _laid_out(sizes: Sizes, limit: int, tile: int) -> Layout:
    samples = max(1, min(tile, min(limit // 4, PASS_BYTES) // max(1, sizes.passing)))
    return _held(sizes, limit, Layout(tile, 1, samples, min(WORKING_BYTES, limit // 16), 0))


def _held(sizes: Sizes, limit: int, layout: Layout) -> Layout:
    """The layout with as many ranges' features held as fit."""
    tile, ranges = layout.tile, sizes.ranges(layout.tile)
    features = tile * sizes.held
    # A tile in float64; one block's kernel; and the tile as stored, compressed, and read back.
    entries = tile * tile * sizes.entries * (8 + 4 * sizes.itemsize)
    making = tile * sizes.made + layout.pass_samples * sizes.passing + sizes.checking
    least = sizes.always + max(making, features + entries + layout.working_bytes)
    cached = max(min(2, ranges), min(ranges, 1 + max(0, limit - least) // max(1, features)))
    return replace(layout, cached=cached, bytes=(cached - 1) * features + least)


def tile_costs(
    places: Sequence[tuple[int, int]], tile: int, n: int, m: int, *, symmetric: bool
) -> dict[tuple[int, int], float]:
    """The cost of contracting each tile, relative to a full one: less at the edges, and about half on the diagonal."""

    def share(k: int, total: int) -> float:
        return (min((k + 1) * tile, total) - k * tile) / tile

    return {(i, j): share(i, n) * share(j, m) * (0.6 if symmetric and i == j else 1.0) for i, j in places}


def duration(seconds: float) -> str:
    """A time in readable units.

    >>> duration(7300)
    '2 h 2 min'
    """
    if seconds < 120:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
