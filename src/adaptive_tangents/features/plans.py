"""Which route each block takes to a kernel, counted before it runs: multiply-adds, working memory, expected time."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.kernel_layout import Outputs, working_dtype
from adaptive_tangents.features.summands import (
    Factors,
    Flipped,
    Lookup,
    Outer,
    Shared,
    tensors_of,
)
from adaptive_tangents.runtime.memory import format_bytes

Route = Literal["gram", "nested", "materialise"]
_WORKING_BYTES = 64_000_000  # more buys no speed, and features of a whole block are never held at once
_TILE_BYTES = 8_000_000  # features of a range of output units; larger ones leave the caches
_SHARES: Mapping[str, float] = {"gram": 0.4, "nested": 0.4, "materialise": 0.6}  # of that speed, seen in the benchmarks
_PLAIN = 0.8  # of the gram route where there are no positions to sum over: two large products


@dataclass(frozen=True)
class BlockPlan:
    """How one block will be contracted: its route, multiply-adds counted twice, and bytes of working memory."""

    name: str
    shape: tuple[int, int]
    positions: int
    route: Route
    operations: int
    working_bytes: int
    dtype: torch.dtype
    device: torch.device

    @property
    def seconds(self) -> float:
        """Seconds expected."""
        share = _PLAIN if self.route == "gram" and self.positions == 1 else _SHARES[self.route]
        return self.operations / (matmul_speed(self.dtype, self.device) * share)


@dataclass(frozen=True)
class KernelPlan:
    """What a kernel will cost before it is made; ``print`` it.

    Seconds are expected ones: operations at the speed that a large matrix product has on this machine, measured once, and
    the share of it that each route reaches.
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
        """Seconds expected of all blocks."""
        return sum(block.seconds for block in self.blocks)

    @property
    def bytes(self) -> int:
        """Peak memory: features held, the kernel, and the largest block's working memory."""
        return self.feature_bytes + self.kernel_bytes + max((b.working_bytes for b in self.blocks), default=0)

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


def plan_block(
    a: Block, b: Block, n: int, m: int, c: int, outputs: Outputs, *, symmetric: bool, budget: int, itemsize: int
) -> BlockPlan:
    """The quickest route for one block by counted operations (theory §6) and the speed that each reaches, that fits."""
    kind = common_factors(a, b)
    like = tensors_of(a.summands[0])[0]
    a, b = narrowed(a, b)
    (o, i), pairs = a.shape, n * (n + 1) // 2 if symmetric else n * m
    t, s, depth = a.positions, b.positions, c * c if outputs == "full" else c
    forms = [(a, n)] if symmetric else [(a, n), (b, m)]
    sums = sum(rows * block.positions * c * o * i for block, rows in forms if kind is not Lookup)
    counted: dict[Route, int] = {"materialise": 2 * sums + 2 * pairs * depth * o * i}
    if kind is not None:
        counted["gram"] = 2 * pairs * t * s * (i + depth * (o + 1))
        if outputs == "full" and c > 1 and min(t, s) > 1:
            counted["nested"] = 2 * pairs * (t * s * (i + c * o) + t * depth * o)
    size = max(depth // c, 1)
    least = {
        "materialise": 2 * c * i * itemsize,
        "nested": (t * s + 2 * t * c * o + t * depth) * itemsize,
        "gram": 2 * (c if outputs == "diagonal" else size) * size * t * s * itemsize,
    }
    fitting = [name for name in counted if least[name] <= budget] or [min(counted, key=lambda name: least[name])]
    route = min(fitting, key=lambda name: (counted[name] / _SHARES[name], name == "materialise"))
    whole = least[route] * (max(n, m) * o if route == "materialise" else n * m)
    working = min(budget, whole, _TILE_BYTES if route == "materialise" else _WORKING_BYTES)
    working_in = working_dtype(like.dtype), like.device
    return BlockPlan(a.name, a.shape, a.positions, route, counted[route], max(working, least[route]), *working_in)


@cache
def matmul_speed(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second that a product of two 768 × 768 matrices runs at, measured once."""
    one = torch.ones(768, 768, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        float((one @ one)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * 768**3 / best


def common_factors(a: Block, b: Block) -> type[Factors] | None:
    """The one kind of factors that both blocks are made of, if so (a shared summand aside)."""
    own = [{type(part) for part in block.summands} - {Shared} for block in (a, b)]
    kind = next(iter(own[0]), None)
    return kind if own[0] == own[1] == {kind} and kind in (Outer, Lookup, Flipped) else None


def narrowed(a: Block, b: Block) -> tuple[Block, Block]:
    """Blocks of lookups with only those columns that any sample looks up."""
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
