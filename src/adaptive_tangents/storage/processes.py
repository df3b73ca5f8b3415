"""Several processes on one task, through torch.distributed; a single process uses the same interface."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from adaptive_tangents.errors import TangentError

_Result = TypeVar("_Result")
_PATIENCE = timedelta(days=1)  # a process waits for the others' last tile, however long that takes
_PAUSE = 0.02  # seconds between two checks of which processes have joined


@dataclass(frozen=True)
class Team:
    """The processes of a task: this one's ``rank`` out of ``size``, and the number ``beside`` on this machine."""

    rank: int = 0
    size: int = 1
    beside: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that does what is done only once."""
        return self.rank == 0

    def settled(self, function: Callable[[], _Result]) -> _Result:
        """The result of ``function`` here, after all processes have run it; if one raises TangentError, all do."""
        result: list[_Result] = []
        problem = ""
        try:
            result.append(function())
        except TangentError as error:
            if self.size == 1:
                raise
            problem = str(error)
        if self.size > 1:
            self._raise_first(problem)
        return result[0]

    def told(self, function: Callable[[], _Result]) -> _Result:
        """The result of ``function``, which the leading process runs, on all of them; if it raises TangentError, all do."""
        result = [self.settled(lambda: function() if self.leads else None)]
        if self.size > 1:
            dist.broadcast_object_list(result, src=0)
        found: Any = result[0]
        return cast(_Result, found)

    def least(self, number: int) -> int:
        """The least of a number that each process has."""
        return min(self._all_sizes(number)) if self.size > 1 else number

    def begun(self, function: Callable[[], None]) -> Callable[[], bool]:
        """The leading process runs ``function`` at once, while the others go on.

        What is returned waits for the end of it, and says whether it ended without an error.
        """
        if self.size == 1:
            function()
            return lambda: True
        word = self._tensor([0])
        if not self.leads:
            work = dist.broadcast(word, 0, async_op=True)
            return lambda: bool(work.wait()) and bool(word.item())
        try:
            function()
            word.fill_(1)
        finally:
            dist.broadcast(word, 0)
        return lambda: True

    @contextmanager
    def group(self) -> Iterator[Any]:
        """A group of the same processes, for messages of which some may never be received."""
        made = dist.new_group(backend="gloo")
        try:
            yield made
        finally:
            dist.destroy_process_group(made)

    def _raise_first(self, problem: str) -> None:
        """Raise the problem of the first process that has one, on all processes."""
        sizes = self._all_sizes(len(problem.encode()))
        source = next((rank for rank, size in enumerate(sizes) if size), None)
        if source is not None:
            text = self._tensor(list(problem.encode()) if source == self.rank else [0] * sizes[source])
            dist.broadcast(text, source)
            raise TangentError(bytes(text.tolist()).decode())

    def _all_sizes(self, own: int) -> list[int]:
        sizes = [self._tensor([0]) for _ in range(self.size)]
        dist.all_gather(sizes, self._tensor([own]))
        return [int(size) for size in sizes]

    def _tensor(self, values: list[int]) -> Tensor:
        device = "cuda" if dist.get_backend() == dist.Backend.NCCL else "cpu"
        return torch.tensor(values, dtype=torch.int64, device=device)


@contextmanager
def team() -> Iterator[Team]:
    """The processes that torchrun started, in the existing process group or a new one; without torchrun, this process.

    >>> with team() as crew:
    ...     crew.size
    1
    """
    named = {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ) and int(os.environ.get("WORLD_SIZE", "1")) > 1
    own = named and dist.is_available() and not dist.is_initialized()
    if own:
        # Imported here, since not every build of torch has them.
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
        store = PrefixStore("adaptive-tangents", store)
        store = PrefixStore(_agreed(store, rank, size), store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        if dist.is_available() and dist.is_initialized():
            beside = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
            yield Team(dist.get_rank(), dist.get_world_size(), beside)
        else:
            yield Team()
    finally:
        if own:
            dist.destroy_process_group()


def _agreed(store: Any, rank: int, size: int) -> str:
    """A name for this start of all processes.

    torchrun's store outlives restarts, so without it processes would find the addresses of dead ones.
    """
    own = uuid4().hex
    if rank:
        store.set(f"come/{rank}", own)
        name: str = store.get(f"answer/{own}").decode()  # waits
        store.set(f"{name}/{rank}", "")
        return name
    answered: dict[int, str] = {}
    started = time.monotonic()
    while not store.check([f"{own}/{other}" for other in range(1, size)]):
        if time.monotonic() - started > _PATIENCE.total_seconds():
            raise TangentError(f"torch.distributed: not all of {size} processes have joined within {_PATIENCE}")
        for other in range(1, size):
            # This may be a process of an earlier start; its successor will still join.
            if store.check([f"come/{other}"]) and (who := store.get(f"come/{other}").decode()) != answered.get(other):
                answered[other] = who
                store.set(f"answer/{who}", own)
        time.sleep(_PAUSE)
    return own
