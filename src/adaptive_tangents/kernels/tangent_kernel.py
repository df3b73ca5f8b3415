"""Tangent kernels in memory, made from pairs of tiles of samples: features of all samples are never held at once."""

from dataclasses import replace
from typing import Literal, overload

from torch import Tensor, nn

from adaptive_tangents.capture.batches import Batch, samples, take
from adaptive_tangents.capture.capture import Capture
from adaptive_tangents.capture.network import OutputFn, Selection
from adaptive_tangents.capture.state_names import Params
from adaptive_tangents.errors import TangentError, raised_as
from adaptive_tangents.features.kernel_layout import (
    Outputs,
    Precision,
    check_outputs,
    check_precision,
    column_axis,
    entries,
    kernel_dtype,
    kernel_shape,
    swapped,
)
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.kernels.schedule import FeatureCache, Key, ordered
from adaptive_tangents.runtime.chunks import ranges
from adaptive_tangents.runtime.memory import require_memory
from adaptive_tangents.runtime.progress import Progress
from adaptive_tangents.sketching.sketches import Sketch, SketchedKernel, sketched_kernel


@overload
def tangent_kernel(
    model: nn.Module, x: Batch, x2: Batch | None = None, *, outputs: Outputs = "full",
    params: Params | None = None, wrt: Selection | None = None, by_block: Literal[False] = False,
    output_fn: OutputFn | None = None, memory_limit: int | None = None, tile: int | None = None, sketch: None = None,
    precision: Precision = "float32", progress: Progress | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def tangent_kernel(
    model: nn.Module, x: Batch, x2: Batch | None = None, *, outputs: Outputs = "full",
    params: Params | None = None, wrt: Selection | None = None, by_block: Literal[True] = True,
    output_fn: OutputFn | None = None, memory_limit: int | None = None, tile: int | None = None, sketch: None = None,
    precision: Precision = "float32", progress: Progress | None = None,
) -> dict[str, Tensor]: ...  # fmt: skip
@overload
def tangent_kernel(
    model: nn.Module, x: Batch, x2: Batch | None = None, *, outputs: Outputs = "full",
    params: Params | None = None, wrt: Selection | None = None, by_block: Literal[False] = False,
    output_fn: OutputFn | None = None, memory_limit: int | None = None, tile: int | None = None, sketch: Sketch,
    precision: Precision = "float32", progress: Progress | None = None,
) -> SketchedKernel: ...  # fmt: skip
def tangent_kernel(
    model: nn.Module,
    x: Batch,
    x2: Batch | None = None,
    *,
    outputs: Outputs = "full",
    params: Params | None = None,
    wrt: Selection | None = None,
    by_block: bool = False,
    output_fn: OutputFn | None = None,
    memory_limit: int | None = None,
    tile: int | None = None,
    sketch: Sketch | None = None,
    precision: Precision = "float32",
    progress: Progress | None = None,
) -> Tensor | dict[str, Tensor] | SketchedKernel:
    """The tangent kernel K(x, x₂) = φ(x) φ(x₂)ᵀ, made tile by tile: features of all samples are never held at once.

    Features are kept for the next tiles as far as memory allows. The kernel of x with itself is exactly symmetric.

    Args:
        model: the network f; it is left as it was.
        x: samples of the rows first, (n, ...): a tensor, or a tuple, list, dict or dataclass of tensors, flags and None.
        x2: samples of the columns, (m, ...), in the same form; None is x.
        outputs: "full" (n, c, m, c), "trace" (n, m) summed over outputs, or "diagonal" (n, m, c) each output with itself.
        params: a state dict to evaluate the model at, as ``tangent_features`` takes; None is the model's own values.
        wrt: the parameters θ: a name pattern, a parameter, or several of these; None is all that require a gradient.
        by_block: whether to give one kernel per block, by name; they add up to the whole.
        output_fn: picks a tensor (n, c) from what the model returns; None if the model returns one.
        memory_limit: bytes that may be used; None is half of what is free.
        tile: samples along a side of a tile; None is as many as memory allows.
        sketch: gives an unbiased estimate from this sketch, a ``SketchedKernel`` with the error of every entry; None is
            the exact kernel.
        precision: "float32", "mixed", "float64" or "bfloat16", as in ``TangentFeatures.kernel``.
        progress: called with "tiles" (of a sketch "samples") and the fraction that is done.

    Raises:
        TangentError: when samples of a batch interact, shapes, dtypes or devices do not fit, values are not finite, or
            memory would exceed the limit.

    >>> import torch, adaptive_tangents as at
    >>> model, x = torch.nn.Linear(3, 2), torch.randn(7, 3)
    >>> K = at.tangent_kernel(model, x, tile=3)
    >>> torch.allclose(K, at.tangent_features(model, x).kernel(), atol=1e-6)
    True
    """
    call = "tangent_kernel"
    check_outputs(call, outputs)
    check_precision(call, precision)
    if sketch is not None:
        if by_block or tile is not None or precision != "float32":
            raise TangentError(
                f"{call}: with sketch, kernels are made whole and in float32; leave out by_block, tile and precision, or use "
                "sketch_features(...).kernel(...)"
            )
        return sketched_kernel(model, x, x2, sketch, outputs, params, wrt, output_fn, memory_limit, progress)
    if tile is not None and tile < 1:
        raise TangentError(f"{call}: tile is a positive number of samples, got {tile}")
    capture = Capture(call, model, x, params, wrt, output_fn, memory_limit, whole=tile is None)
    if x2 is not None:
        capture.check_more(x2)
    n, m = samples(x), samples(x if x2 is None else x2)
    limit, c = capture.limit, capture.probe.c
    copies = capture.probe.blocks if by_block else 1
    kernel_bytes = copies * n * m * entries(outputs, c) * kernel_dtype(capture.probe.dtype, precision).itemsize
    require_memory(call, kernel_bytes, limit, remedy="use outputs='trace' or 'diagonal', or fewer samples")
    # A quarter of what is left: for two tiles of features, and for making and checking them.
    room = max(1, (limit - kernel_bytes - capture.gradient_bytes) // 4)
    tile = tile or max(1, min(max(n, m), room // capture.bytes_per_sample))
    if tile >= max(n, m):
        left, right = replace(capture.features(x), limit=limit), None if x2 is None else capture.features(x2)
        with raised_as(call, "kernel"):
            found = left.kernel(right, outputs=outputs, by_block=by_block, precision=precision)  # type: ignore[call-overload]
        if progress is not None:
            progress("tiles", 1.0)
        return found  # type: ignore[no-any-return]
    kernels: dict[str, Tensor] = {}
    rows, columns = list(ranges(n, tile)), list(ranges(m, tile))
    batches = (x, x if x2 is None else x2)
    capacity = max(2, 2 * room // (tile * capture.bytes_per_sample))
    places = [(i, j) for i in range(len(rows)) for j in range(len(columns)) if x2 is not None or i <= j]
    order = ordered(places, capacity, symmetric=x2 is None)

    def part(key: Key) -> TangentFeatures:
        return capture.features(take(batches[key[0]], (rows, columns)[key[0]][key[1]]))

    held = FeatureCache(part, order, capacity, symmetric=x2 is None)
    for done, place in enumerate(order, start=1):
        left, other = held.pair(place)
        right = None if other is left else other
        with raised_as(call, "kernel"):
            piece = (
                left.kernel(right, outputs=outputs, by_block=True, precision=precision)
                if by_block
                else {"": left.kernel(right, outputs=outputs, precision=precision)}
            )
        for name, values in piece.items():
            if name not in kernels:
                kernels[name] = values.new_zeros(kernel_shape(outputs, n, m, c))
            _place(kernels[name], values, rows[place[0]], columns[place[1]], outputs, mirror=x2 is None)
        if progress is not None:
            progress("tiles", done / len(order))
    return kernels if by_block else kernels[""]


def _place(kernel: Tensor, piece: Tensor, rows: slice, columns: slice, outputs: Outputs, *, mirror: bool) -> None:
    along = (slice(None),) * (column_axis(outputs) - 1)
    kernel[(rows, *along, columns)] = piece
    if mirror:
        kernel[(columns, *along, rows)] = swapped(piece, outputs)
