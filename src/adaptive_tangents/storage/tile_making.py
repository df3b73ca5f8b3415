"""The tiles of a store: this process's own share, with features that it captures or gets, then what others have left."""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from adaptive_tangents.errors import TangentError, raised_as
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.kernels.schedule import Deal, FeatureCache, Key, Place, in_turn, keys_of
from adaptive_tangents.runtime.progress import Progress
from adaptive_tangents.storage.feature_stream import Stream, contracted, summed
from adaptive_tangents.storage.folders import CLAIMS, FEATURES
from adaptive_tangents.storage.locks import claim_tile, is_claimed
from adaptive_tangents.storage.passing import Passing
from adaptive_tangents.storage.planning import Layout
from adaptive_tangents.storage.processes import Team
from adaptive_tangents.storage.record import RECORD, read_meta
from adaptive_tangents.storage.store import KernelStore, create_store, open_kernel


def make_tiles(
    call: str, crew: Team, made: Stream, layout: Layout, planned: KernelStore, deal: Deal, passing: Passing,
    progress: Progress | None,
) -> None:  # fmt: skip
    """Make this process's own share of the tiles, then what the others have left."""
    others = (deal.shares[(crew.rank + k) % crew.size][::-1] for k in range(1, crew.size))
    order, owned, path = list(chain(deal.shares[crew.rank], *others)), deal.owned(crew.rank), planned.path

    def part(key: Key) -> TangentFeatures:
        feats = passing.take(key)
        if feats is None:
            started = time.monotonic()
            feats = made.part(key[0], planned.slices((key[1], key[1]))[key[0]], layout.pass_samples)
            passing.seconds = max(passing.seconds or 0.0, time.monotonic() - started)
        return feats

    def ready(place: Place) -> bool:
        keys = keys_of(place, symmetric=planned.symmetric)
        return all(key in held or passing.decided(key) for key in keys) or is_claimed(path / CLAIMS, place)

    held = FeatureCache(part, order, layout.cached, symmetric=planned.symmetric, kept=owned)
    with worded(call, path):
        begun = crew.begun(lambda: _create(call, planned, crew))
        for key in owned:
            held.one(key)
        if not begun():
            return
        store, already = open_kernel(path), len(planned.places) - len(order)
        for key in owned:
            passing.offer(key, held.one(key))
        for place in in_turn(order, ready, passing.wait):
            if not claim_tile(path / CLAIMS, place):
                held.skip(place)
                continue
            store.write(place, _tile(call, made, store, held, place, layout))
            if progress is not None and crew.leads:
                # Claimed tiles count as made.
                progress("tiles", min(1.0, (already + len(os.listdir(path / CLAIMS))) / len(store.places)))


def check_entries(call: str, kernel: Tensor) -> None:
    """Raise TangentError if a kernel has entries beyond its dtype."""
    if not bool(torch.isfinite(kernel).all()):
        raise TangentError(
            f"{call}: the kernel has entries that overflow {kernel.dtype}; use dtype=torch.float64 (--float64)"
        )


@contextmanager
def worded(call: str, path: Path) -> Iterator[None]:
    """Turn errors of the operating system into TangentError."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise TangentError(
                f"{call}: there is no room left for {path}; the finished tiles stay: free some room and continue with "
                "resume=True (--resume)"
            ) from error
        raise TangentError(
            f"{call}: {path} cannot be written ({error}); "
            + (
                "give another path"
                if not os.path.exists(path / RECORD)
                else "fix that and continue with resume=True (--resume)"
            )
        ) from error


def _create(call: str, store: KernelStore, crew: Team) -> None:
    """Put a store on disk, if it is not there, and the folders in which processes agree."""
    if read_meta(store.path, call) is None:
        create_store(call, store.path, store.meta)
    (store.path / CLAIMS).mkdir(exist_ok=True)
    if crew.size > 1:
        (store.path / FEATURES).mkdir(exist_ok=True)


def _tile(
    call: str, made: Stream, store: KernelStore, held: FeatureCache[TangentFeatures], place: Place, layout: Layout
) -> Iterator[tuple[str, Tensor]]:
    """The kernels of one tile: one per block, or their sum."""
    left, other = held.pair(place)
    right = None if other is left else other
    blocks = contracted(left, right, made.outputs, layout.working_bytes)
    with raised_as(call, "kernel"):
        for name, kernel in blocks if made.by_block else [("", summed(blocks))]:
            check_entries(call, kernel)
            yield name, kernel
