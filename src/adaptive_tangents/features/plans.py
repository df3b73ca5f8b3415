"""Which route each block takes to a kernel, planned before it runs: operations, working memory, expected time."""

import itertools
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.kernel_layout import Outputs, entries, working_dtype
from adaptive_tangents.features.summands import (
    Factors,
    Flipped,
    Lookup,
    Outer,
    Shared,
    tensors_of,
)
from adaptive_tangents.runtime.memory import format_bytes
from adaptive_tangents.runtime.told import html

RouteName = Literal["gram", "nested", "materialize"]
WORKING_BYTES = 64_000_000  # more is no faster
_STEP = 1_000_000  # operations that a large matrix product does in the time that a step of a loop takes to start
_TILE_BYTES = 8_000_000  # of features of a range of output units; larger ones do not fit into the caches
_FEW_UNITS = 32  # output units; products with fewer are slower by as much


@dataclass(frozen=True)
class BlockPlan:
    """How one block will be contracted: its route, floating-point operations, and bytes of working memory.

    ``share`` is the fraction of a large matrix product's speed that the route is expected to reach, in loops of ``steps``.
    """

    name: str
    shape: tuple[int, int]
    positions: int
    route: RouteName
    operations: int
    working_bytes: int
    dtype: torch.dtype
    device: torch.device
    share: float
    steps: int = 0

    @property
    def effort(self) -> float:
        """By what routes are compared: operations of a large matrix product in the same time, and those of a loop's steps."""
        return self.operations / self.share + _STEP * self.steps

    @property
    def seconds(self) -> float:
        """Expected seconds."""
        return self.operations / self.share / matmul_speed(self.dtype, self.device)


@dataclass(frozen=True, repr=False)
class KernelPlan:
    """What a kernel will cost, before it is made; ``print`` it.

    Expected seconds are the operations over the speed of a large matrix product on this machine, which is measured once,
    times the share of it that each route reaches.
    """

    blocks: tuple[BlockPlan, ...]
    kernel_bytes: int
    feature_bytes: int
    limit: int

    @property
    def operations(self) -> int:
        """Floating-point operations of all blocks."""
        return sum(block.operations for block in self.blocks)

    @property
    def seconds(self) -> float:
        """Expected seconds for all blocks."""
        return sum(block.seconds for block in self.blocks)

    @property
    def bytes(self) -> int:
        """Peak memory: the features, the kernel, and the largest block's working memory."""
        return self.feature_bytes + self.kernel_bytes + max((b.working_bytes for b in self.blocks), default=0)

    def __repr__(self) -> str:
        return (
            f"KernelPlan({len(self.blocks)} blocks, {self.operations:.3g} operations, about {self.seconds:.2g} s, peak "
            f"{format_bytes(self.bytes)} of {format_bytes(self.limit)} allowed)"
        )

    def _repr_html_(self) -> str:
        facts = {
            "kernel": format_bytes(self.kernel_bytes), "features": format_bytes(self.feature_bytes),
            "peak": f"{format_bytes(self.bytes)} of {format_bytes(self.limit)} allowed",
            "operations": f"{self.operations:.3g}", "expected": f"{self.seconds:.2g} s",
        }  # fmt: skip
        rows = (
            (b.name, f"{b.shape[0]} × {b.shape[1]}", b.positions, b.route, f"{b.operations:.3g}",
             format_bytes(b.working_bytes), f"{b.seconds:.2g}")
            for b in self.blocks
        )  # fmt: skip
        head = ("block", "o × i", "positions", "route", "operations", "working", "seconds")
        return html("KernelPlan", facts, head, rows)

    def __str__(self) -> str:
        rows = [f"{'block':<24}{'o × i':>14}{'t':>7}  {'route':<12}{'operations':>12}{'working':>10}{'seconds':>10}"]
        for b in self.blocks:
            shape = f"{b.shape[0]} × {b.shape[1]}"
            rows.append(
                f"{b.name:<24}{shape:>14}{b.positions:>7}  {b.route:<12}{b.operations:>12.3g}"
                f"{format_bytes(b.working_bytes):>10}{b.seconds:>10.2g}"
            )
        rows.append(
            f"kernel {format_bytes(self.kernel_bytes)}, features {format_bytes(self.feature_bytes)}, "
            f"peak {format_bytes(self.bytes)} of {format_bytes(self.limit)} allowed, {self.operations:.3g} operations, "
            f"about {self.seconds:.2g} s"
        )
        return "\n".join(rows)


@dataclass(frozen=True)
class Pair:
    """What the cost of a route depends on: two blocks (o, i) of n and m samples with t and s positions, and their kernel.

    ``pairs`` counts the pairs of samples, ``depth`` the pairs of outputs, and ``made`` the multiply-adds that materialize
    the features. ``alike`` says that both blocks have factors of the same single kind. ``crossings`` are the pairs of
    summands if both have nothing but factors: the positions of each, and the multiply-adds of a pair of positions.
    ``flipped`` says that some factors have their signals on the input side.
    """

    alike: bool
    flipped: bool
    crossings: tuple[tuple[int, int, int], ...]
    outputs: Outputs
    n: int
    m: int
    t: int
    s: int
    o: int
    i: int
    c: int
    pairs: int
    depth: int
    made: int
    itemsize: int


class Gram:
    """⟨Φ, Φ′⟩ = Σ_{t,t′} (δ_t·δ′_{t′})(h_t·h′_{t′}); features are never formed."""

    name: RouteName = "gram"

    def applies(self, p: Pair) -> bool:
        return bool(p.crossings)

    def operations(self, p: Pair) -> int:
        return 2 * p.pairs * sum(t * s * work for t, s, work in p.crossings)

    def share(self, p: Pair) -> float:
        """The share of a large product's speed; with one position per sample the route is just two large products."""
        return 0.8 if p.t == p.s == 1 and min(p.o, p.i) > 1 else 0.4

    def steps(self, p: Pair) -> int:
        """Steps of the route's outermost loop."""
        return 1

    def least_bytes(self, p: Pair) -> int:
        """The least working memory: that of one pair of samples."""
        return max(gram_bytes(p.outputs, t, s, p.c, p.itemsize, crossed=not p.alike) for t, s, _ in p.crossings)

    def most_bytes(self, p: Pair) -> int:
        """The most working memory that is of use."""
        return min(self.least_bytes(p) * p.n * p.m, WORKING_BYTES)


class Nested(Gram):
    """Σ_t δ_t·(Σ_{t′} (h_t·h′_{t′}) δ′_{t′}): the same sum, inner one first."""

    name: RouteName = "nested"

    def applies(self, p: Pair) -> bool:
        return p.alike and p.outputs == "full" and p.c > 1 and min(p.t, p.s) > 1

    def operations(self, p: Pair) -> int:
        return 2 * p.pairs * (p.t * p.s * (p.i + p.c * p.o) + p.t * p.depth * p.o)

    def steps(self, p: Pair) -> int:
        return p.n

    def least_bytes(self, p: Pair) -> int:
        return (p.t * p.s + 2 * p.t * p.c * p.o + p.t * p.depth) * p.itemsize


class Materialize:
    """Φ of a range of output units at a time, then one matrix product."""

    name: RouteName = "materialize"

    def applies(self, p: Pair) -> bool:
        return True

    def operations(self, p: Pair) -> int:
        return 2 * p.made + 2 * p.pairs * p.depth * p.o * p.i

    def share(self, p: Pair) -> float:
        # Flipped factors are read whole for every range of output units.
        units = self.most_bytes(p) // (self.least_bytes(p) * max(p.n, p.m))
        return 0.6 * min(1, max(1, units) / _FEW_UNITS) if p.flipped else 0.6

    def steps(self, p: Pair) -> int:
        return 1

    def least_bytes(self, p: Pair) -> int:
        """The least working memory: one output unit of one sample, on both sides."""
        return 2 * p.c * p.i * p.itemsize

    def most_bytes(self, p: Pair) -> int:
        return min(self.least_bytes(p) * max(p.n, p.m) * p.o, _TILE_BYTES)


def gram_bytes(outputs: Outputs, t: int, s: int, c: int, itemsize: int, *, crossed: bool) -> int:
    """Working memory of the gram route for a pair of samples: two Gram matrices, their product if positions are summed.

    ``crossed`` factors have their signals on different sides, so both matrices run over outputs, and are rearranged.
    """
    return (4 * max(c, entries(outputs, c)) if crossed else 2 * entries(outputs, c)) * t * s * itemsize


# Their shares of a large product's speed were measured in the benchmarks.
ROUTES = (Gram(), Nested(), Materialize())


def plan_block(
    a: Block, b: Block, n: int, m: int, c: int, outputs: Outputs, *, symmetric: bool, budget: int, itemsize: int
) -> BlockPlan:
    """The fastest route for one block that fits into memory, by its operations (theory §6) and expected speed."""
    kind, like = common_factors(a, b), tensors_of(a.summands[0])[0]
    a, b = narrowed(a, b)
    (o, i), t, s = a.shape, a.positions, b.positions
    pairs, depth = n * (n + 1) // 2 if symmetric else n * m, c * c if outputs == "full" else c
    summed = 0 if kind is Lookup else n * t if symmetric else n * t + m * s
    pair = Pair(
        kind is not None, a.flipped is not None, _crossings(a, b, c, depth), outputs, n, m, t, s, o, i, c, pairs, depth,
        summed * c * o * i, itemsize,
    )  # fmt: skip
    routes = [route for route in ROUTES if route.applies(pair)]
    fitting = [route for route in routes if route.least_bytes(pair) <= budget]
    costs = [
        BlockPlan(
            a.name, a.shape, t, route.name, route.operations(pair),
            max(min(budget, route.most_bytes(pair)), route.least_bytes(pair)),
            working_dtype(like.dtype), like.device, route.share(pair), route.steps(pair),
        )
        for route in fitting or [min(routes, key=lambda route: route.least_bytes(pair))]
    ]  # fmt: skip
    return min(costs, key=lambda cost: cost.effort)


@cache
def matmul_speed(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a product of two 768 × 768 matrices, measured once."""
    one = torch.ones(768, 768, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        float((one @ one)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * 768**3 / best


def common_factors(a: Block, b: Block) -> type[Factors] | None:
    """The kind of factors that both blocks consist of (besides a shared summand), or None if there is no single kind."""
    own = [{type(part) for part in block.summands} - {Shared} for block in (a, b)]
    kind = next(iter(own[0]), None)
    return kind if own[0] == own[1] == {kind} and kind in (Outer, Lookup, Flipped) else None


def factors_only(a: Block, b: Block) -> bool:
    """Whether both blocks consist of factors, of any kinds (besides a shared summand)."""
    own = [part for block in (a, b) for part in block.summands if not isinstance(part, Shared)]
    return all(isinstance(part, Factors) for part in own) and all(factored(block) for block in (a, b))


def _crossings(a: Block, b: Block, c: int, depth: int) -> tuple[tuple[int, int, int], ...]:
    """For every two summands the positions of each, and the multiply-adds of a pair of positions; () if not all factors."""
    if not factors_only(a, b):
        return ()
    (o, i), found = a.shape, []
    for one, two in itertools.product(factored(a), factored(b)):
        flipped = isinstance(one, Flipped), isinstance(two, Flipped)
        sides = (i, o) if all(flipped) else (o, i)
        if flipped[0] == flipped[1]:
            work = sides[1] + depth * (sides[0] + 1)
        else:
            looked = isinstance(one, Lookup) or isinstance(two, Lookup)
            work = c * (o + (1 if looked else i)) + depth
        found.append((one.backward.shape[1], two.backward.shape[1], work))
    return tuple(found)


def factored(block: Block) -> list[Factors]:
    """The factors that a block is the sum of, beside anything else."""
    return [part for part in block.summands if isinstance(part, Factors)]


def narrowed(a: Block, b: Block) -> tuple[Block, Block]:
    """Blocks of lookups, reduced to the columns that some sample looks up; other blocks as they are."""
    if common_factors(a, b) is not Lookup:
        return a, b
    looked = [block.lookup for block in (a, b) if block.lookup is not None]
    if any(part.directions.shape[0] for part in looked):
        return a, b
    kept = torch.unique(torch.cat([part.index.flatten() for part in looked]))
    first, second = (
        replace(block, lookup=part.restricted(kept), shape=(block.shape[0], len(kept)))
        for block, part in zip((a, b), looked, strict=True)
    )
    return first, second
