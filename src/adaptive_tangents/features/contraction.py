"""From blocks to kernels, K = ⟨Φ, Φ′⟩, by the route that features.plans expects to be fastest for the block.

- gram: ⟨Φ, Φ′⟩ = Σ_{t,t′} (δ_t·δ′_{t′})(h_t·h′_{t′}); features are never formed; of blocks with factors of several kinds,
  such as a tied table, every kind with every kind;
- nested: Σ_t δ_t·(Σ_{t′} (h_t·h′_{t′}) δ′_{t′}), the same sum, inner one first; for several outputs and positions;
- materialize: Φ of a range of output units at a time, then one matrix product.

Kernels stay in the (batch, N, M) layout of features.kernel_layout until the end.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.kernel_layout import Outputs, Precision, working_dtype
from adaptive_tangents.features.plans import KernelPlan, RouteName, common_factors, factors_only, gram_bytes, narrowed
from adaptive_tangents.features.summands import (
    Factors,
    Flipped,
    Lookup,
    SampleMap,
    Summand,
    sum_tensors,
    tensors_of,
)
from adaptive_tangents.linalg.factor_products import product
from adaptive_tangents.runtime.chunks import ranges

_CACHED_BYTES = 4_000_000  # of signals that the nested route works on at a time
_WHOLE = 128  # rows; a smaller symmetric kernel is made whole, since making only its triangle is no faster
_EIGHT = 8  # rows that a matrix product computes at a time


def accumulate(
    kernel: Float[Tensor, "batch N M"],
    a: Block,
    b: Block,
    outputs: Outputs,
    *,
    route: RouteName,
    symmetric: bool,
    budget: int,
) -> None:
    """Add one block's kernel in place; if symmetric, only the upper triangle (`mirror` fills the rest)."""
    rest_a, rest_b = narrowed(a.without_shared(), b.without_shared())
    if route != "materialize" and factors_only(rest_a, rest_b):
        walk = _accumulate_nested if route == "nested" and common_factors(a, b) else _accumulate_gram
        # The routes flatten ranges of the inputs over and over; contiguous inputs avoid copies.
        rows = {id(part): _in_rows(part) for part in (*rest_a.summands, *rest_b.summands)}
        for left, right in itertools.product(rest_a.summands, rest_b.summands):
            walk(kernel, rows[id(left)], rows[id(right)], outputs, symmetric=symmetric, budget=budget)
    elif rest_a.summands and rest_b.summands:
        _accumulate_features(kernel, rest_a, rest_b, outputs, symmetric=symmetric, budget=budget)
    if a.shared is not None or b.shared is not None:
        _accumulate_shared(kernel, a, b, outputs)


def _rows(features: Float[Tensor, "n c q"], outputs: Outputs) -> Float[Tensor, "batch N Q"]:
    """Features as rows; the inner products of rows are the kernel's entries."""
    if outputs == "full":
        return features.flatten(0, 1)[None]
    return features.flatten(1)[None] if outputs == "trace" else features.transpose(0, 1)


def _panel(rows: int) -> int:
    """Rows per panel of a symmetric kernel: few, so that little is computed twice, but enough for full speed."""
    return rows if rows < _WHOLE else _EIGHT * math.ceil(0.4 * math.sqrt(rows))


def _panels(total: int, group: int, size: int) -> list[slice]:
    """Sample ranges for a symmetric kernel with ``group`` rows per sample."""
    if total * group >= _WHOLE:
        samples, step = _panel(total * group) / group, _EIGHT // math.gcd(_EIGHT, group)
        size = min(size, step * round(samples / step) if samples > step else max(1, round(samples)))
    return list(ranges(total, size))


def _input_gram(a: Factors, p: slice, b: Factors, q: slice) -> Float[Tensor, "N M"]:
    """h·h′ for all pairs of positions of two ranges of samples."""
    if isinstance(a, Lookup) and isinstance(b, Lookup):
        return a.map(SampleMap(p)).input_gram(b.map(SampleMap(q)))
    if isinstance(b, Lookup):
        return _input_gram(b, q, a, p).mT
    return _against(a, p, b.inputs[q].flatten(0, 1))


def _against(a: Factors, p: slice, rows: Float[Tensor, "N i"]) -> Float[Tensor, "M N"]:
    """h·v for all positions of a range of samples and all vectors v."""
    if isinstance(a, Lookup):
        return a.map(SampleMap(p)).against(rows.mT).flatten(0, 1)
    return a.inputs[p].flatten(0, 1) @ rows.mT


def _in_rows(factors: Summand) -> Factors:
    """The same factors, with the inputs contiguous in memory position by position."""
    assert isinstance(factors, Factors)
    return factors if isinstance(factors, Lookup) else replace(factors, inputs=factors.inputs.contiguous())


def _accumulate_gram(kernel: Tensor, a: Factors, b: Factors, outputs: Outputs, *, symmetric: bool, budget: int) -> None:
    n, t, c, _ = a.backward.shape
    m, s = b.backward.shape[:2]
    if t * s == 0:
        return
    group, batch = (c, 1) if outputs == "full" else (1, kernel.shape[0])
    crossed = isinstance(a, Flipped) != isinstance(b, Flipped)
    pair = gram_bytes(outputs, t, s, c, kernel.element_size(), crossed=crossed)
    columns = max(1, min(m, budget // pair))
    rows_a, rows_b = _rows(a.backward.flatten(0, 1), outputs), _rows(b.backward.flatten(0, 1), outputs)
    for p in (
        _panels(n, t * group, max(1, budget // (pair * columns)))
        if symmetric
        else ranges(n, budget // (pair * columns))
    ):
        for q in ranges(m, columns):
            if symmetric:
                q = slice(max(q.start, p.start), q.stop)
            width, height = q.stop - q.start, p.stop - p.start
            if width <= 0:
                continue
            target = kernel[:, p.start * group : p.stop * group, q.start * group : q.stop * group]
            if crossed:
                target += _crossed(a, p, b, q, outputs) if isinstance(b, Flipped) else _crossed(b, q, a, p, outputs).mT
                continue
            left = rows_a[:, p.start * t * group : p.stop * t * group]
            right = rows_b[:, q.start * s * group : q.stop * s * group]
            signals = product(left, right.mT).reshape(batch, height, t, group, width, s, group)
            signals *= _input_gram(a, p, b, q).reshape(1, height, t, 1, width, s, 1)
            total = signals.sum((2, 5)) if t * s > 1 else signals
            target += total.reshape(batch, height * group, width * group)


def _crossed(a: Factors, p: slice, b: Factors, q: slice, outputs: Outputs) -> Float[Tensor, "batch N M"]:
    """⟨Σ δhᵀ, Σ gεᵀ⟩ = Σ_{t,s} (δ_t·g_s)(h_t·ε_s), for factors and flipped factors of two ranges of samples."""
    assert isinstance(b, Flipped)
    backward, signals = a.backward[p], b.backward[q]
    (n, t, c, o), (m, s, _, i) = backward.shape, signals.shape
    outer = (backward.reshape(-1, o) @ b.inputs[q].reshape(-1, o).mT).reshape(n, t, c, m, s).permute(2, 0, 3, 1, 4)
    inner = _against(a, p, signals.reshape(-1, i)).reshape(n, t, m, s, c).permute(4, 0, 2, 1, 3)
    if outputs == "full":
        pairs = outer.reshape(c, n * m, t * s).transpose(0, 1) @ inner.reshape(c, n * m, t * s).permute(1, 2, 0)
        return pairs.reshape(n, m, c, c).transpose(1, 2).reshape(1, n * c, m * c)
    summed = (outer * inner).sum((3, 4))
    return summed.sum(0, keepdim=True) if outputs == "trace" else summed


def _accumulate_nested(
    kernel: Tensor, a: Factors, b: Factors, outputs: Outputs, *, symmetric: bool, budget: int
) -> None:
    n, t, c, o = a.backward.shape
    m, s = b.backward.shape[:2]
    blocks = kernel.view(n, c, m, c)
    # If positions are adjacent in memory, as convolutions leave them, products over them need no copies.
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
            # On the diagonal both sides are the same features, so twice as many rows fit.
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
    """Add ⟨Φ + sD, Φ′ + s′D′⟩ − ⟨Φ, Φ′⟩, by inner products with the few directions D."""

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
    """Add every block's kernel to its target in ``kernels`` (one common tensor, or one per block)."""
    for step in plan.blocks:
        target = kernels[step.name]
        dtype = working_dtype(tensors_of(a[step.name].summands[0])[0].dtype, precision)
        left = a[step.name].map(dtype=dtype)
        right = left if b is a else b[step.name].map(dtype=dtype)
        piece = target if target.dtype == dtype else torch.zeros_like(target, dtype=dtype)
        accumulate(piece, left, right, outputs, route=step.route, symmetric=symmetric, budget=step.working_bytes)
        if piece is not target:
            target += piece


def contracted_at_once(
    a: Mapping[str, Block], b: Mapping[str, Block] | None, outputs: Outputs, precision: Precision
) -> Float[Tensor, "batch N M"]:
    """The kernel of all blocks together, as one product of all features; without b, of a with itself."""
    left = _rows(_side_by_side(list(a.values()), precision), outputs)
    right = left if b is None else _rows(_side_by_side([b[name] for name in a], precision), outputs)
    return left @ right.mT


def _side_by_side(blocks: Sequence[Block], precision: Precision) -> Float[Tensor, "n c p"]:
    dtype = working_dtype(tensors_of(blocks[0].summands[0])[0].dtype, precision)
    return torch.cat([block.map(dtype=dtype).features().flatten(2) for block in blocks], 2)
