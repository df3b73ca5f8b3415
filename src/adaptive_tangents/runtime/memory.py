"""How much memory is free, how much a call may use, and the error when it would use more."""

import math
import re
import resource
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from adaptive_tangents.errors import TangentError

_PREFIXES = ("", "k", "m", "g", "t")
_HUGE = 4 << 20  # bytes; from this size on, NumPy asks the system for huge pages
_LARGEST_KEPT = (32 << 20) - 8192  # glibc's limit, less room for its own bookkeeping
_LINE = 64  # bytes; PyTorch aligns its own tensors so
_GROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 62  # version 1 of control groups says so with the largest number of whole pages
_GROUP_FILES = {  # the limit, the memory used, and the part of it that is cached files, in both versions of control groups
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes that can still be allocated on ``device``, within the limits of the process, a container and a Slurm job.

    >>> available_bytes() > 0
    True
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + int(reserved)
    candidates = [psutil.virtual_memory().available, _group_bytes(), _process_bytes()]
    return max(0, min(int(value) for value in candidates if value is not None))


def limit_for(requested: int | None, device: torch.device | str = "cpu") -> int:
    """The limit in force: the requested one, or half of what is free on ``device``."""
    if requested is None:
        return available_bytes(device) // 2
    if requested <= 0:
        raise TangentError(f"memory_limit: expected a positive number of bytes, got {requested}")
    return int(requested)


def require_memory(call: str, needed: int, limit: int, *, remedy: str) -> None:
    """Raise TangentError if ``needed`` bytes exceed ``limit``."""
    if needed > limit:
        raise TangentError(
            f"{call}: needs {format_bytes(needed)} of memory and the limit is {format_bytes(limit)}; "
            f"{remedy}, or raise memory_limit"
        )


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized tensor of ``like``'s device and dtype, in huge pages where that helps.

    The first write to huge pages takes a fifth of the time of ordinary new memory, which takes as long as many products.
    """
    dtype = dtype or like.dtype
    size = math.prod(shape) * dtype.itemsize
    if like.device.type != "cpu" or size < _HUGE or type(like) is not Tensor:
        return like.new_empty(shape, dtype=dtype)
    try:
        room = torch.from_numpy(np.empty(size + _LINE, np.uint8))
    except MemoryError:
        return like.new_empty(shape, dtype=dtype)  # fails with PyTorch's own message
    start = -room.data_ptr() % _LINE
    return room[start : start + size].view(dtype).view(shape)


@cache
def keep_freed() -> None:
    """Let the C library keep up to 64 MB of freed memory for reuse.

    glibc keeps twice the largest block of 32 MB or less that it has returned to the system. Networks allocate and free
    their tensors over and over; with new memory each time, that is a tenth of the time of a kernel.
    """
    with suppress(RuntimeError):
        torch.empty(_LARGEST_KEPT, dtype=torch.uint8, device="cpu")


def format_bytes(count: float) -> str:
    """A byte count in readable units.

    >>> format_bytes(2_500_000)
    '2.5 MB'
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def parse_bytes(call: str, text: str) -> int:
    """A byte count from text, with kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (of 1024).

    Raises TangentError if the text is no byte count.

    >>> parse_bytes("kernel", "2.5 MB")
    2500000
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(?:([kmgt]?)(i?)b)?\s*", text, re.IGNORECASE)
    count = (
        int(float(found[1]) * (1024 if found[3] else 1000) ** _PREFIXES.index((found[2] or "").lower())) if found else 0
    )
    if count <= 0:
        raise TangentError(f"{call}: a memory limit is a number of bytes such as 4GB or 500MB, got {text!r}")
    return count


def _group_bytes(groups: Path = _GROUPS, own: Path = Path("/proc/self/cgroup")) -> int | None:
    """The least room in this process's control groups: those of a container, of a Slurm job and of its steps."""
    try:
        text = _text(own)
    except OSError:
        text = ""
    left = [room for group, names in _groups(text, groups) if (room := _room(group, *names)) is not None]
    return min(left, default=None)


@cache
def _groups(text: str, groups: Path) -> list[tuple[Path, tuple[str, str, str]]]:
    """The folders of a process's control groups, with the names of their files."""
    found = []
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            mount = groups / controllers  # version 2 has one tree, version 1 one for each controller
            folder = mount / path.lstrip("/")
            inside = [folder, *(parent for parent in folder.parents if parent.is_relative_to(mount))]
            found += [(group, _GROUP_FILES[controllers]) for group in inside]
    return found


def _room(group: Path, limit: str, used: str, cached: str) -> int | None:
    """Bytes that a group still allows; its cached files count as free, since the system would drop them."""
    try:
        most = int(_text(group / limit))  # first: without a limit there is nothing else to read
        if most >= _UNLIMITED:
            return None
        files = re.search(rf"^{cached} (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
        return most - int(_text(group / used)) + (int(files[1]) if files else 0)
    except (OSError, ValueError):
        return None


def _text(path: Path) -> str:
    """A small file of the system, read in a third of the time that ``read_text`` takes: every kernel asks for these."""
    with open(path, "rb", buffering=0) as file:
        return file.read().decode()


def _process_bytes() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft - psutil.Process().memory_info().vms
