"""Write a kernel to disk: planned, tile by tile, resumable, by one process or by all that torchrun started."""

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptive_tangents._version import __version__
from adaptive_tangents.capture.batches import Batch, take, tensors
from adaptive_tangents.capture.network import OutputFn, Selection
from adaptive_tangents.capture.state_names import Params
from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.kernel_layout import Outputs, check_outputs, working_dtype
from adaptive_tangents.features.plans import KernelPlan, plan_block
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.features.transforms import Transform
from adaptive_tangents.kernels.schedule import Deal, Place, dealt, keys_of
from adaptive_tangents.runtime.memory import format_bytes, limit_for
from adaptive_tangents.runtime.progress import Progress
from adaptive_tangents.runtime.tensor_files import fingerprint
from adaptive_tangents.storage.feature_stream import Sketching, Stream, stream
from adaptive_tangents.storage.folders import FEATURES, LOCK, check_empty, clear_claims
from adaptive_tangents.storage.locks import writer_lock
from adaptive_tangents.storage.packing import tensors_within
from adaptive_tangents.storage.passing import Passing, passing_seconds
from adaptive_tangents.storage.planning import Layout, Sizes, StorePlan, lay_out, tile_costs
from adaptive_tangents.storage.processes import Team, team
from adaptive_tangents.storage.provenance import batch_fingerprint, check_same
from adaptive_tangents.storage.record import FORMAT, read_meta
from adaptive_tangents.storage.store import KernelStore, open_kernel
from adaptive_tangents.storage.tile_making import check_entries, make_tiles, worded

_TELLING = 0.2  # seconds of capturing that are enough to estimate the rest
_PASSING = 0.1  # of the cost of a capture, with a margin: an MLP takes 0.06
_COMPRESSED = 0.7  # least compressed fraction of a kernel's bytes; usually 0.9


def kernel_to_store(
    model: nn.Module,
    x: Batch,
    path: str | Path,
    *,
    x2: Batch | None = None,
    outputs: Outputs = "full",
    params: Params | None = None,
    wrt: Selection | None = None,
    by_block: bool = False,
    output_fn: OutputFn | None = None,
    tile: int | None = None,
    memory_limit: int | None = None,
    dtype: torch.dtype | None = None,
    transforms: Mapping[str, Transform] | None = None,
    sketch: Sketching | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> KernelStore:
    """The tangent kernel K(x, x₂) = φ(x) φ(x₂)ᵀ, written tile by tile into a Zarr store.

    Contraction is in float32 or better, and blocks are added in float64. For the same ``tile`` the result is the same bit
    for bit, no matter how often it was interrupted or how many processes made it. Under torchrun the processes share the
    tiles.

    Args:
        model: the network f; it is left as it was.
        x: samples of the rows first, (n, ...): a tensor, or a tuple, list, dict or dataclass of tensors, flags and None.
        path: the folder of the store, for example ``K.zarr``; it is made.
        x2: samples of the columns, (m, ...), in the same form; None is x.
        outputs: "full" (n, c, m, c), "trace" (n, m) summed over outputs, or "diagonal" (n, m, c) each output with itself.
        params: a state dict to evaluate the model at, as ``tangent_features`` takes; None is the model's own values.
        wrt: the parameters θ: a name pattern, a parameter, or several of these; None is all that require a gradient.
        by_block: whether to store one kernel per block, by name; they add up to the whole.
        output_fn: picks a tensor (n, c) from what the model returns; None if the model returns one.
        tile: samples along a side of a tile; None is chosen by memory.
        memory_limit: bytes that each process may use; None is half of what is free, shared by the processes of a machine.
        dtype: float64 or float32 evaluates the network in it; bfloat16 keeps features in it, with an error of at most about
            2⁻⁶·√(K(x,x)K(x₂,x₂)) per entry; None keeps the model's dtype.
        transforms: a transform for each block to adapt, such as ``Fit.transforms``; None is the plain kernel.
        sketch: contracts sketched features instead of exact ones; None is exact.
        resume: whether to continue a store of the same model, data and settings; only missing and damaged tiles are made.
        progress: called with what is being done ("verifying", "tiles") and the fraction that is done.

    Raises:
        TangentError: when the path holds something else or another kernel, another process writes it, or it cannot be
            written; and as ``tangent_kernel``.

    >>> import tempfile, torch, adaptive_tangents as at
    >>> model, x = torch.nn.Linear(3, 2), torch.randn(7, 3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = at.kernel_to_store(model, x, f"{folder}/K.zarr", outputs="full", tile=3)
    ...     torch.allclose(store.read(), at.tangent_kernel(model, x), atol=1e-6)
    True
    """
    call, path = "kernel_to_store", Path(path)
    check_outputs(call, outputs)
    if "\0" in str(path):
        raise TangentError(f"{call}: {str(path)!r} holds a null character, which no path can hold; give another path")
    with team() as crew, ExitStack() as stack:
        made = crew.settled(
            lambda: stream(
                call, model, x, x2, outputs=outputs, params=params, wrt=wrt, by_block=by_block, output_fn=output_fn,
                memory_limit=_share(memory_limit, x, crew.beside), dtype=dtype, transforms=transforms, sketch=sketch,
            )
        )  # fmt: skip
        some = crew.settled(made.some)
        asked = crew.settled(lambda: _identity(call, made, some, tile))

        def begin() -> tuple[Mapping[str, Any], list[Place]]:
            stack.enter_context(worded(call, path))
            stack.enter_context(writer_lock(call, _folder_for(call, path) / LOCK))
            return _begin(call, path, made, some, asked, resume=resume, progress=progress)

        meta, missing = crew.told(begin)
        crew.settled(lambda: check_same(call, path, meta, asked))
        if not meta["complete"]:
            _fill(call, crew, made, some, KernelStore(path, meta), missing, progress)
            crew.settled(lambda: _finish(call, open_kernel(path)) if crew.leads else None)
    return open_kernel(path)


def plan_kernel(
    model: nn.Module,
    x: Batch,
    *,
    x2: Batch | None = None,
    outputs: Outputs = "full",
    params: Params | None = None,
    wrt: Selection | None = None,
    by_block: bool = False,
    output_fn: OutputFn | None = None,
    tile: int | None = None,
    memory_limit: int | None = None,
    dtype: torch.dtype | None = None,
    transforms: Mapping[str, Transform] | None = None,
    sketch: Sketching | None = None,
    processes: int = 1,
) -> StorePlan:
    """What ``kernel_to_store`` will cost: tiles, routes, bytes on disk and in memory, operations, seconds; ``print`` it.

    Only the features of a few samples are made, to measure their cost.

    Args:
        model: the network f; it is left as it was.
        x: samples of the rows first, (n, ...): a tensor, or a tuple, list, dict or dataclass of tensors, flags and None.
        x2: samples of the columns, (m, ...), in the same form; None is x.
        outputs: "full" (n, c, m, c), "trace" (n, m) summed over outputs, or "diagonal" (n, m, c) each output with itself.
        params: a state dict to evaluate the model at, as ``tangent_features`` takes; None is the model's own values.
        wrt: the parameters θ: a name pattern, a parameter, or several of these; None is all that require a gradient.
        by_block: whether to store one kernel per block, by name; they add up to the whole.
        output_fn: picks a tensor (n, c) from what the model returns; None if the model returns one.
        tile: samples along a side of a tile; None is chosen by memory.
        memory_limit: bytes that each process may use; None is half of what is free, shared by the processes of a machine.
        dtype: as in ``kernel_to_store``.
        transforms: a transform for each block to adapt, such as ``Fit.transforms``; None is the plain kernel.
        sketch: contracts sketched features instead of exact ones; None is exact.
        processes: the number of processes that will share the tiles.

    Raises:
        TangentError: as ``kernel_to_store``, for example when the memory limit is too small.

    >>> import torch, adaptive_tangents as at
    >>> plan = at.plan_kernel(torch.nn.Linear(3, 2), torch.randn(1000, 3), outputs="full")
    >>> plan.layout.tile, plan.tiles, plan.captures
    (128, 36, 8)
    """
    call = "plan_kernel"
    check_outputs(call, outputs)
    made = stream(
        call, model, x, x2, outputs=outputs, params=params, wrt=wrt, by_block=by_block, output_fn=output_fn,
        memory_limit=_share(memory_limit, x, processes), dtype=dtype, transforms=transforms, sketch=sketch,
    )  # fmt: skip
    some = made.some()
    layout = lay_out(call, made.sizes(some), made.capture.limit, tile=_checked_tile(call, tile))
    return _plan(made, some, layout, processes, _seconds_a_sample(made, some.n, layout))


def _seconds_a_sample(made: Stream, count: int, layout: Layout) -> float:
    """Seconds of capturing per sample, measured on ``count`` samples, or on up to a tile if those take too little time."""
    most = max(count, min(layout.tile, made.n))
    while True:
        batch = take(made.x, slice(0, count))
        started = time.perf_counter()
        made.features(batch, layout.pass_samples)
        seconds = time.perf_counter() - started
        if seconds > _TELLING or count == most:
            return seconds / count
        count = min(4 * count, most)


def _plan(made: Stream, some: TangentFeatures, layout: Layout, processes: int, each: float) -> StorePlan:
    """The plan of a layout, if capturing takes ``each`` seconds per sample."""
    sizes, symmetric = made.sizes(some), made.x2 is None
    grid = _grid(made, some, layout)
    costs = tile_costs(grid.places, layout.tile, made.n, made.m, symmetric=symmetric)
    contraction = _tile_plan(made, some, layout)
    deal = _shares(made, some, layout, grid.places, processes)
    if passing_seconds(layout.tile * sizes.held) > each * layout.tile:
        deal = replace(deal, owners={})
    count = deal.captures(layout.cached, symmetric=symmetric)
    return StorePlan(
        made.outputs, grid.shape, grid.dtype, max(1, len(grid.blocks)), layout, len(costs), sizes.ranges(layout.tile), count,
        processes, contraction, int(contraction.operations * sum(costs.values())), _disk_bytes(grid, sizes),
        each * count * min(layout.tile, max(made.n, made.m)), contraction.seconds * sum(costs.values()), made.capture.limit,
    )  # fmt: skip


def _disk_bytes(store: KernelStore, sizes: Sizes) -> int:
    """The bytes of a store's tiles before compression."""
    pairs = sum((r.stop - r.start) * (q.stop - q.start) for r, q in map(store.slices, store.places))
    return int(max(1, len(store.blocks)) * pairs * sizes.entries * sizes.itemsize)


def _tile_plan(made: Stream, some: TangentFeatures, layout: Layout) -> KernelPlan:
    """How one full tile is contracted."""
    sizes, tile = made.sizes(some), layout.tile
    steps = tuple(
        plan_block(
            block, block, tile, tile, made.c, made.outputs,
            symmetric=False, budget=max(layout.working_bytes, sizes.itemsize), itemsize=sizes.itemsize,
        )
        for block in some.blocks.values()
    )  # fmt: skip
    return KernelPlan(steps, tile * tile * sizes.entries * sizes.itemsize, 2 * tile * sizes.held, made.capture.limit)


def _shares(made: Stream, some: TangentFeatures, layout: Layout, places: Sequence[Place], processes: int) -> Deal:
    """The tiles of every process, in the order it makes them, and who captures what."""
    costs = tile_costs(places, layout.tile, made.n, made.m, symmetric=made.x2 is None)
    # One forward pass and one backward pass per output, through the products with the blocks' weights.
    pass_operations = sum(2 * max(1, b.positions) * b.shape[0] * b.shape[1] for b in some.blocks.values()) * (
        1 + made.c
    )
    capture = layout.tile * pass_operations / max(1, _tile_plan(made, some, layout).operations)
    symmetric = made.x2 is None
    return dealt(
        places, costs, processes, layout.cached, symmetric=symmetric, capture=capture, passing=_PASSING * capture
    )


def _grid(made: Stream, some: TangentFeatures, layout: Layout) -> KernelStore:
    """The store of a layout as an object only, before it is on disk."""
    dtype = str(working_dtype(some.dtype)).removeprefix("torch.")
    blocks = list(some.blocks) if made.by_block else []
    meta = {"n": made.n, "m": made.m, "c": made.c, "outputs": made.outputs, "dtype": dtype, "blocks": blocks}
    return KernelStore(Path(), meta | {"symmetric": made.x2 is None, "tile": layout.tile})


def _identity(call: str, made: Stream, some: TangentFeatures, tile: int | None) -> dict[str, Any]:
    """What the kernel is made from, to store and to compare."""
    net, probe = made.capture.network, made.probed()
    check_entries(call, probe)
    given = {} if _checked_tile(call, tile) is None else {"tile": min(tile or 1, max(made.n, made.m))}
    return given | {
        "version": __version__,
        "n": made.n,
        "m": made.m,
        "c": made.c,
        "outputs": made.outputs,
        "dtype": str(working_dtype(some.dtype)).removeprefix("torch."),
        "features": str(some.dtype).removeprefix("torch."),
        "symmetric": made.x2 is None,
        "blocks": list(some.blocks) if made.by_block else [],
        "wrt": list(net.selected),
        "parameters": fingerprint([dict(net.parameters), dict(net.buffers)]),
        "data": batch_fingerprint(made.x),
        "data2": None if made.x2 is None else batch_fingerprint(made.x2),
        "transforms": None if made.transforms is None else fingerprint(made.transforms),
        "sketch": None if made.sketch is None else made.sketch.describe(),
        "probe": probe.tolist(),
    }


def _folder_for(call: str, path: Path) -> Path:
    """The folder of a store; made if needed, refused if it holds something else."""
    if path.exists() and not path.is_dir():
        raise TangentError(f"{call}: {path} is a file; give the path of a folder to make, such as K.zarr")
    if path.is_dir() and read_meta(path, call) is None:
        check_empty(call, path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _begin(
    call: str, path: Path, made: Stream, some: TangentFeatures, asked: Mapping[str, Any],
    *, resume: bool, progress: Progress | None,
) -> tuple[Mapping[str, Any], list[Place]]:  # fmt: skip
    """The record and the missing tiles of a store that can be made, or of an existing one of the same kernel."""
    meta = read_meta(path, call)
    if meta is None:
        layout = lay_out(call, made.sizes(some), made.capture.limit, tile=asked.get("tile"))
        working = {"pass_samples": layout.pass_samples, "working_bytes": layout.working_bytes}
        store = KernelStore(path, {**asked, "tile": layout.tile, **working, "complete": False})
        _check_room(call, store, _disk_bytes(store, made.sizes(some)))
        return store.meta, list(store.places)
    store = KernelStore(path, meta)
    if not resume:
        raise TangentError(
            f"{call}: there is a kernel store at {path} already, {'' if store.complete else 'in'}complete; continue it "
            "with resume=True (--resume), give another path, or delete it"
        )
    check_same(call, path, store.meta, asked)
    damaged = store.verify(progress)
    wanting = bool(damaged or store.missing())
    if meta["format"] < FORMAT and (wanting or not store.complete):
        raise TangentError(
            f"{call}: {path} is of format {meta['format']}, which this version reads and does not continue; make the "
            "kernel again in another folder"
        )
    store.tidy()
    if store.complete and wanting:
        store = store.marked(complete=False)
    store.discard(damaged)
    clear_claims(path)
    return store.meta, store.missing()


def _checked_tile(call: str, tile: int | None) -> int | None:
    if tile is not None and tile < 1:
        raise TangentError(f"{call}: tile is a positive number of samples, got {tile}")
    return tile


def _check_room(call: str, store: KernelStore, needed: int) -> None:
    free = shutil.disk_usage(store.path).free
    if free < _COMPRESSED * needed:
        less = format_bytes(needed * store.n * store.m // prod(store.shape))
        raise TangentError(
            f"{call}: the kernel takes up to {format_bytes(needed)} and the disk of {store.path} has {format_bytes(free)} "
            f"free; free more, give a path elsewhere, or store outputs='trace', which takes up to {less}"
        )


def _fill(
    call: str, crew: Team, made: Stream, some: TangentFeatures, store: KernelStore, missing: Sequence[Place],
    progress: Progress | None,
) -> None:  # fmt: skip
    """Make the missing tiles by all processes; ``store`` need not be on disk yet."""
    before = Layout(store.tile, 1, store.meta["pass_samples"], store.meta["working_bytes"], 0)
    layout = crew.settled(lambda: lay_out(call, made.sizes(some), made.capture.limit, fixed=before))
    layout = replace(layout, cached=crew.least(layout.cached))
    deal = crew.told(lambda: _shares(made, some, layout, missing, crew.size))
    with crew.group() if deal.owners else nullcontext() as group:
        needed = {key for place in deal.shares[crew.rank] for key in keys_of(place, symmetric=store.symmetric)}
        passing = Passing(
            group, store.path / FEATURES, crew.rank, deal, device=some.device, known=tensors_within(made.transforms),
            needed=needed if layout.cached >= len(deal.owners) else (),
        )  # fmt: skip
        crew.settled(lambda: make_tiles(call, crew, made, layout, store, deal, passing, progress))


def _finish(call: str, store: KernelStore) -> None:
    """Mark the store as complete; raises TangentError if it is not."""
    left = len(store.missing())
    if left:
        raise TangentError(
            f"{call}: {left} of {len(store.places)} tiles are missing from {store.path}, because a process ended early; "
            "make them with resume=True (--resume)"
        )
    clear_claims(store.path)
    store.marked(complete=True)


def _share(limit: int | None, x: Any, processes: int) -> int | None:
    """The memory limit of one process; by default the processes of a machine share what is free."""
    device = next((tensor.device for tensor in tensors(x)), torch.device("cpu"))
    return limit if limit is not None or device.type != "cpu" else max(1, limit_for(None, device) // processes)
