"""Features of ranges of samples, passed from the process that captured them to those that need them.

The owner of a range posts its sends through torch.distributed, point to point, and announces them by a file beside the
store. They wait without a copy until the other process receives. Features that do not come are captured again, so nothing
waits for a process that is gone.
"""

import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.kernels.schedule import Deal, Key
from adaptive_tangents.storage.folders import announce, announced
from adaptive_tangents.storage.packing import message_room, packed, unpacked

_A_SECOND = 5e8  # bytes received per second, with a margin: processes of one machine pass 2.5e9
_PATIENCE = 10.0  # seconds for announced features, and as many times what receiving or capturing them takes
_UNKNOWN = 60.0  # seconds to wait for an announcement, if this process has captured nothing
_PAUSE = 0.002  # seconds between two looks for announcements


class Passing:
    """The features that this process passes on, and those that it gets.

    ``needed`` are the ranges to receive as soon as they are announced; others are received when they are taken.
    ``seconds`` is what capturing a range took here, None before any was captured. ``received`` counts what came.
    """

    def __init__(
        self, group: Any, folder: Path, rank: int, deal: Deal, *,
        needed: Collection[Key], device: torch.device, known: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self.group, self.folder, self.rank, self.deal = group, folder, rank, deal
        self.needed, self.device, self.known = frozenset(needed), device, known
        self.seconds: float | None = None
        self.received, self._waited, self._tag = 0, 0.0, 0
        self._since: float | None = None
        self._sent: list[Any] = []
        self._read: set[str] = set()
        self._announced: dict[Key, list[list[int]]] = {}
        self._coming: dict[Key, tuple[list[Tensor], list[Any]]] = {}
        self._requested: Counter[Key] = Counter()

    def offer(self, key: Key, feats: TangentFeatures) -> None:
        """Let every other process have the features of a range that this one owns."""
        messages, places = packed(feats, self.known)
        for peer in range(len(self.deal.shares)):
            with suppress(RuntimeError):  # it is gone
                for k in range(self.deal.copies * len(messages) if peer != self.rank else 0):
                    self._sent.append(dist.isend(messages[k % len(messages)], peer, self.group, self._tag + k))
        announce(self.folder, key, [[self._tag, len(m), place] for m, place in zip(messages, places, strict=True)])
        self._tag += self.deal.copies * len(messages)

    def decided(self, key: Key) -> bool:
        """Whether it is known how this process gets the features: they are announced, or it must capture them."""
        if key not in self._announced and self.deal.owners.get(key, self.rank) != self.rank:
            self._look()
            return key in self._announced
        return True

    def wait(self) -> bool:
        """Wait a little for announcements; false after as long as capturing takes."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if now - self._since > (_UNKNOWN if self.seconds is None else self.seconds):
            self._since = None
            return False
        time.sleep(_PAUSE)
        return True

    def take(self, key: Key) -> TangentFeatures | None:
        """The features of a range that another process owns; None if they do not come, or not sooner than captured."""
        if key not in self._coming:
            self._request(key)
        if key not in self._coming:
            return None
        messages, works = self._coming.pop(key)
        started = time.monotonic()
        taking = max(passing_seconds(sum(map(len, messages))), self.seconds or 0.0)
        end = started + _PATIENCE + _PATIENCE * taking
        try:
            for work in works:
                work.wait(timedelta(seconds=max(0.001, end - time.monotonic())))
            feats = unpacked(messages, self.device, self.known)
        except RuntimeError:
            return None
        self.received += 1
        self._waited += time.monotonic() - started
        return feats

    def _look(self) -> None:
        """Read new announcements, and begin to receive what is needed."""
        for entry in self.folder.iterdir():
            if entry.name not in self._read and (found := announced(entry)) is not None:
                self._read.add(entry.name)
                key, self._announced[key] = found
                self._since = None
                if key in self.needed and self.deal.owners.get(key, self.rank) != self.rank:
                    self._request(key)

    def _request(self, key: Key) -> None:
        """Begin to receive the features of a range, if that is quicker than to capture them."""
        announced = self._announced.get(key, [])
        seconds = max(passing_seconds(sum(size for _, size, _ in announced)), self._waited / max(1, self.received))
        slower = self.seconds is not None and seconds > self.seconds
        if not announced or slower or self._requested[key] == self.deal.copies:
            return
        messages = [message_room(size, place, torch.device("cpu")) for _, size, place in announced]
        first = announced[0][0] + self._requested[key] * len(messages)
        self._requested[key] += 1
        with suppress(RuntimeError):  # its owner is gone
            owner = self.deal.owners[key]
            works = [dist.irecv(message, owner, self.group, first + k) for k, message in enumerate(messages)]
            self._coming[key] = messages, works


def passing_seconds(size: int) -> float:
    """Expected seconds to receive ``size`` bytes, before any were received."""
    return size / _A_SECOND
