"""Blocks to kernels: K = ⟨Φ, Φ′⟩, by whichever of three routes is expected to be quickest for the block.

- gram: ⟨Φ, Φ′⟩ = Σ_{t,t′} (δ_t·δ′_{t′})(h_t·h′_{t′}), features never formed;
- nested: Σ_t δ_t·(Σ_{t′} (h_t·h′_{t′}) δ′_{t′}), the same sum with the inner one first, for several outputs and positions;
- materialise: Φ of a range of output units at a time, then one matrix product.

Kernels are kept as (batch, N, M) until the end: full (1, n·c, m·c), trace (1, n, m), diagonal (c, n, m).
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.blocks import Block, ranges
from adaptive_tangents.errors import TangentError
from adaptive_tangents.memory import empty, format_bytes
from adaptive_tangents.products import product
from adaptive_tangents.summands import (
    Dense,
    Factors,
    Flipped,
    Lookup,
    Outer,
    Outputs,
    SampleMap,
    Shared,
    Weighted,
    sum_tensors,
    tensors_of,
)

Route = Literal["gram", "nested", "materialise"]
Precision = Literal["float32", "mixed", "float64", "bfloat16"]

_CACHED_BYTES = 4_000_000  # what the nested route works on at a time
_WORKING_BYTES = 64_000_000  # more buys no speed, and features of a whole block are never held at once
_TILE_BYTES = 8_000_000  # features of a range of output units; larger ones leave the caches
_SHARES: Mapping[str, float] = {"gram": 0.4, "nested": 0.4, "materialise": 0.6}  # of that speed, seen in the benchmarks
_PLAIN = 0.8  # of the gram route where there are no positions to sum over: two large products
_WHOLE = 128  # rows of a symmetric kernel below which its triangle is not worth making by itself
_EIGHT = 8  # rows that a product does at a time


def check_outputs(call: str, outputs: str) -> None:
    """Raise TangentError unless ``outputs`` names a kind of kernel."""
    if outputs not in ("full", "trace", "diagonal"):
        raise TangentError(f"{call}: outputs is 'full', 'trace' or 'diagonal', got {outputs!r}")


def check_precision(call: str, precision: str) -> None:
    """Raise TangentError unless ``precision`` names a way to contract features."""
    if precision not in get_args(Precision):
        raise TangentError(f"{call}: precision is 'float32', 'mixed', 'float64' or 'bfloat16', got {precision!r}")


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
    kind = _common_factors(a, b)
    like = tensors_of(a.summands[0])[0]
    a, b = _narrowed(a, b)
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


def empty_kernel(
    n: int, m: int, c: int, outputs: Outputs, like: Tensor, precision: Precision = "float32"
) -> Float[Tensor, "batch N M"]:
    """A kernel of zeros in the layout of this module."""
    shape = {"full": (1, n * c, m * c), "trace": (1, n, m), "diagonal": (c, n, m)}[outputs]
    return empty(shape, like, kernel_dtype(like.dtype, precision)).zero_()


def working_dtype(dtype: torch.dtype, precision: Precision = "float32") -> torch.dtype:
    """The dtype that features of ``dtype`` are contracted in: float32 or better."""
    return torch.promote_types(dtype, torch.float64 if precision == "float64" else torch.float32)


def kernel_dtype(dtype: torch.dtype, precision: Precision = "float32") -> torch.dtype:
    """The dtype that blocks are added up in, which is the kernel's."""
    return torch.float64 if precision == "mixed" else working_dtype(dtype, precision)


def accumulate(
    kernel: Float[Tensor, "batch N M"],
    a: Block,
    b: Block,
    outputs: Outputs,
    *,
    route: Route,
    symmetric: bool,
    budget: int,
) -> None:
    """Add one block's kernel in place; where symmetric, the upper triangle only (`mirror` makes the rest)."""
    rest_a, rest_b = _narrowed(a.without_shared(), b.without_shared())
    if route != "materialise" and _common_factors(a, b) is not None:
        factors_a, factors_b = rest_a.summands[0], rest_b.summands[0]
        assert not isinstance(factors_a, Dense | Shared | Weighted)
        assert not isinstance(factors_b, Dense | Shared | Weighted)
        walk = _accumulate_gram if route == "gram" else _accumulate_nested
        # Walks flatten ranges of the inputs over and over, which must not copy.
        rows_a = _in_rows(factors_a)
        rows_b = rows_a if factors_b is factors_a else _in_rows(factors_b)
        walk(kernel, rows_a, rows_b, outputs, symmetric=symmetric, budget=budget)
    elif rest_a.summands and rest_b.summands:
        _accumulate_features(kernel, rest_a, rest_b, outputs, symmetric=symmetric, budget=budget)
    if a.shared is not None or b.shared is not None:
        _accumulate_shared(kernel, a, b, outputs)


def _common_factors(a: Block, b: Block) -> type[Factors] | None:
    """The one kind of factors that both blocks are made of, if so (a shared summand aside)."""
    own = [{type(part) for part in block.summands} - {Shared} for block in (a, b)]
    kind = next(iter(own[0]), None)
    return kind if own[0] == own[1] == {kind} and kind in (Outer, Lookup, Flipped) else None


def _narrowed(a: Block, b: Block) -> tuple[Block, Block]:
    """Blocks of lookups with only those columns that any sample looks up."""
    if _common_factors(a, b) is not Lookup:
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


def mirror(kernel: Float[Tensor, "batch N N"]) -> None:
    """Copy the upper triangle onto the lower, in place."""
    for rows in ranges(kernel.shape[1], 128):
        diagonal = kernel[:, rows, rows]
        diagonal.copy_(diagonal.triu() + diagonal.triu(1).mT)
        kernel[:, rows.stop :, rows] = kernel[:, rows, rows.stop :].mT


def finish(kernel: Float[Tensor, "batch N M"], n: int, m: int, c: int, outputs: Outputs) -> Tensor:
    """From this module's layout to the user's: (n, c, m, c), (n, m) or (n, m, c)."""
    if outputs == "full":
        return kernel.reshape(n, c, m, c)
    return kernel[0] if outputs == "trace" else kernel.permute(1, 2, 0).contiguous()


def _rows(features: Float[Tensor, "n c q"], outputs: Outputs) -> Float[Tensor, "batch N Q"]:
    """Features as rows whose inner products are the kernel's entries."""
    if outputs == "full":
        return features.flatten(0, 1)[None]
    return features.flatten(1)[None] if outputs == "trace" else features.transpose(0, 1)


def _panel(rows: int) -> int:
    """The rows of a panel of a symmetric kernel: few, so that little is made twice, and enough to run at full speed."""
    return rows if rows < _WHOLE else _EIGHT * math.ceil(0.4 * math.sqrt(rows))


def _panels(total: int, group: int, size: int) -> list[slice]:
    """Sample ranges for a symmetric kernel with ``group`` rows a sample."""
    if total * group >= _WHOLE:
        samples, step = _panel(total * group) / group, _EIGHT // math.gcd(_EIGHT, group)
        size = min(size, step * round(samples / step) if samples > step else max(1, round(samples)))
    return list(ranges(total, size))


def _input_gram(a: Factors, p: slice, b: Factors, q: slice) -> Float[Tensor, "N M"]:
    """h·h′ for all pairs of positions of ranges of samples."""
    if isinstance(a, Lookup):
        assert isinstance(b, Lookup)
        return a.map(SampleMap(p)).input_gram(b.map(SampleMap(q)))
    assert not isinstance(b, Lookup)
    return a.inputs[p].flatten(0, 1) @ b.inputs[q].flatten(0, 1).mT


def _in_rows(factors: Factors) -> Factors:
    """The same with the inputs of one position after the other in memory."""
    return factors if isinstance(factors, Lookup) else replace(factors, inputs=factors.inputs.contiguous())


def _accumulate_gram(kernel: Tensor, a: Factors, b: Factors, outputs: Outputs, *, symmetric: bool, budget: int) -> None:
    n, t, c, _ = a.backward.shape
    m, s = b.backward.shape[:2]
    if t * s == 0:
        return
    group, batch = (c, 1) if outputs == "full" else (1, kernel.shape[0])
    # One sample pair's working memory: gram of δ and of h, and their product where positions are summed.
    pair = 2 * batch * (t * group) * (s * group) * kernel.element_size()
    columns = max(1, min(m, budget // pair))
    rows_a, rows_b = _rows(a.backward.flatten(0, 1), outputs), _rows(b.backward.flatten(0, 1), outputs)
    for p in (
        _panels(n, group, max(1, budget // (pair * columns))) if symmetric else ranges(n, budget // (pair * columns))
    ):
        for q in ranges(m, columns):
            if symmetric:
                q = slice(max(q.start, p.start), q.stop)
            width, height = q.stop - q.start, p.stop - p.start
            if width <= 0:
                continue
            left = rows_a[:, p.start * t * group : p.stop * t * group]
            right = rows_b[:, q.start * s * group : q.stop * s * group]
            signals = product(left, right.mT).reshape(batch, height, t, group, width, s, group)
            signals *= _input_gram(a, p, b, q).reshape(1, height, t, 1, width, s, 1)
            total = signals.sum((2, 5)) if t * s > 1 else signals
            target = kernel[:, p.start * group : p.stop * group, q.start * group : q.stop * group]
            target += total.reshape(batch, height * group, width * group)


def _accumulate_nested(
    kernel: Tensor, a: Factors, b: Factors, outputs: Outputs, *, symmetric: bool, budget: int
) -> None:
    n, t, c, o = a.backward.shape
    m, s = b.backward.shape[:2]
    blocks = kernel.view(n, c, m, c)
    # Where positions lie together in memory, as convolutions leave them, sums over them end where they are wanted.
    inner = all(part.backward.permute(0, 2, 3, 1).is_contiguous() for part in (a, b))
    width = max(1, min(_CACHED_BYTES, budget) // (t * c * o * kernel.element_size()))
    for k in range(n):
        here = slice(k, k + 1)
        own = a.backward[k].permute(1, 2, 0) if inner else a.backward[k].transpose(0, 1)
        own = own.reshape(c, o * t)
        for q in ranges(m, width):
            q = slice(max(q.start, k), q.stop) if symmetric else q
            size = q.stop - q.start
            if size <= 0:
                continue
            grams = _input_gram(b, q, a, here).reshape(size, s, t)
            if inner:
                signals = b.backward[q].permute(0, 2, 3, 1).reshape(size, c * o, s)
                summed = (signals @ grams).reshape(size * c, o * t)
            else:
                signals = b.backward[q].reshape(size, s, c * o)
                summed = (grams.mT @ signals).reshape(size, t, c, o).transpose(1, 2).reshape(size * c, t * o)
            blocks[k, :, q] += (own @ summed.mT).reshape(c, size, c)


def _accumulate_features(kernel: Tensor, a: Block, b: Block, outputs: Outputs, *, symmetric: bool, budget: int) -> None:
    n, c = a.samples, a.outputs
    m, group = b.samples, kernel.shape[1] // n
    unit = max(1, 2 * c * a.shape[1] * kernel.element_size())  # both sides of one sample, one output unit
    size = max(1, min(max(n, m), budget // unit))
    for p in ranges(n, size):
        for q in ranges(m, size):
            if symmetric and q.start < p.start:
                continue
            target = kernel[:, p.start * group : p.stop * group, q.start * group : q.stop * group]
            tile = (a if n == size else a.map(index=p), b if m == size else b.map(index=q))
            diagonal = symmetric and p == q
            # One side is the other there, and leaves its room.
            rows = max(1, (2 if diagonal else 1) * budget // (unit * size))
            _accumulate_tile(target, *tile, outputs, symmetric=diagonal, rows=rows)


def _accumulate_tile(target: Tensor, a: Block, b: Block, outputs: Outputs, *, symmetric: bool, rows: int) -> None:
    for units in ranges(a.shape[0], rows):
        left = _rows(a.features(units).flatten(2), outputs)
        right = left if symmetric else _rows(b.features(units).flatten(2), outputs)
        for panel in ranges(target.shape[1], _panel(target.shape[1]) if symmetric else target.shape[1]):
            first = panel.start if symmetric else 0
            target[:, panel, first:].baddbmm_(left[:, panel], right[:, first:].mT)


def _accumulate_shared(kernel: Tensor, a: Block, b: Block, outputs: Outputs) -> None:
    """⟨Φ + sD, Φ′ + s′D′⟩ − ⟨Φ, Φ′⟩, through inner products with the few directions D."""

    def add(left: Tensor, right: Tensor) -> None:
        kernel.baddbmm_(_rows(left, outputs), _rows(right, outputs).mT)

    rest = a.without_shared().summands
    if b.shared is not None and rest:
        add(sum_tensors([part.inner(b.shared.directions) for part in rest]), b.shared.coefficients)
    if a.shared is not None:
        add(a.shared.coefficients, b.inner(a.shared.directions))


def contract_blocks(
    a: Mapping[str, Block],
    b: Mapping[str, Block],
    plan: KernelPlan,
    kernels: Mapping[str, Tensor],
    outputs: Outputs,
    *,
    symmetric: bool,
    precision: Precision = "float32",
) -> None:
    """Add every block's kernel to its target in ``kernels`` (one common tensor, or one a block)."""
    for step in plan.blocks:
        target = kernels[step.name]
        dtype = working_dtype(tensors_of(a[step.name].summands[0])[0].dtype, precision)
        left = a[step.name].map(dtype=dtype)
        right = left if b is a else b[step.name].map(dtype=dtype)
        piece = target if target.dtype == dtype else torch.zeros_like(target, dtype=dtype)
        accumulate(piece, left, right, outputs, route=step.route, symmetric=symmetric, budget=step.working_bytes)
        if piece is not target:
            target += piece
