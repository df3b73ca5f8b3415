"""Features as messages between processes, and back: the same numbers in the same layout of memory.

Descriptions are pickled, as torch.distributed does with objects: processes of one group run each other's code anyway. No file
is read this way.
"""

import io
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.runtime.memory import empty

_ALIGNED = 64  # bytes: sums may be rounded differently for memory that begins elsewhere relative to this


def packed(feats: TangentFeatures, known: Sequence[Tensor] = ()) -> tuple[list[Tensor], list[int]]:
    """A description of the features and the memory that their tensors lie in, and where each begins in units of 64 bytes.

    The memory is not copied. Tensors in the memory of those ``known`` to the receiver are only named. The result is empty if
    features are more than plain tensors, and cannot be passed.
    """
    tensors: list[Tensor] = []
    structure = _pickled(feats, tensors)
    if structure is None:
        return [], []
    named = {tensor.untyped_storage().data_ptr(): -1 - k for k, tensor in enumerate(known) if tensor.numel()}
    ends: dict[int, tuple[int, int, Tensor]] = {}
    for tensor in tensors:
        base = tensor.untyped_storage().data_ptr()
        if tensor.numel() and base not in named:
            start = int(tensor.storage_offset()) * tensor.itemsize
            spread = sum((int(size) - 1) * int(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            low, high, _ = ends.get(base, (start, start, tensor))
            ends[base] = (min(low, start), max(high, start + (spread + 1) * tensor.itemsize), tensor)
    memory: list[Tensor] = []
    starts: dict[int, int] = {}
    skips: list[int] = []
    for base, (low, high, tensor) in ends.items():
        low = max(0, low - (base + low) % _ALIGNED)
        named[base], starts[base] = len(memory), low
        skips.append((base + low) % _ALIGNED)
        whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        memory.append(whole.set_(tensor.untyped_storage(), low, (high - low,), (1,)).cpu())
    table = []
    for tensor in tensors:
        base = tensor.untyped_storage().data_ptr() if tensor.numel() else 0
        offset = tensor.storage_offset() * tensor.itemsize - starts.get(base, 0)
        table.append((named.get(base), offset, tensor.dtype, tuple(tensor.shape), tensor.stride()))
    if any(skip % 16 for skip in skips):
        return [], []
    description = torch.from_numpy(np.frombuffer(bytearray(pickle.dumps((structure, table))), np.uint8))
    return [description, *memory], [0, *skips]


def unpacked(messages: Sequence[Tensor], device: torch.device, known: Sequence[Tensor] = ()) -> TangentFeatures:
    """The features of messages that `packed` made and that lie in memory from `message_room`."""
    structure, table = pickle.loads(messages[0].numpy().tobytes())
    memory = [message if device.type == "cpu" else _moved(message, device) for message in messages[1:]]
    tensors: list[Tensor] = []
    for place, offset, dtype, shape, stride in table:
        if place is None:
            tensors.append(torch.empty_strided(shape, stride, dtype=dtype, device=device))
            continue
        within = known[-1 - place] if place < 0 else memory[place]
        start = offset + (0 if place < 0 else within.storage_offset())
        tensor = torch.empty(0, dtype=dtype, device=device)
        tensors.append(tensor.set_(within.untyped_storage(), start // dtype.itemsize, shape, stride))

    class Reading(pickle.Unpickler):
        def persistent_load(self, number: int) -> Tensor:
            return tensors[number]

    feats: TangentFeatures = Reading(io.BytesIO(structure)).load()
    return feats


def message_room(size: int, skip: int, device: torch.device) -> Tensor:
    """Memory for a message that begins as far from a multiple of 64 bytes as the sender's."""
    whole = empty((size + _ALIGNED,), torch.empty(0, dtype=torch.uint8, device=device))
    first = (skip - whole.data_ptr()) % _ALIGNED
    return whole.narrow(0, first, size)


def tensors_within(value: object) -> list[Tensor]:
    """All tensors of an object, in an order that depends on its structure alone."""
    tensors: list[Tensor] = []
    return [] if _pickled(value, tensors) is None else tensors


def _moved(message: Tensor, device: torch.device) -> Tensor:
    return message_room(len(message), message.data_ptr() % _ALIGNED, device).copy_(message)


def _pickled(value: object, tensors: list[Tensor]) -> bytes | None:
    """Everything but the tensors, which are collected; None if that is impossible."""

    class Writing(pickle.Pickler):
        def persistent_id(self, part: Any) -> int | None:
            if not isinstance(part, Tensor):
                return None
            if type(part) is not Tensor or part.layout != torch.strided or part.is_conj() or part.is_neg():
                raise pickle.PicklingError
            tensors.append(part)
            return len(tensors) - 1

    out = io.BytesIO()
    try:
        Writing(out).dump(value)
    except (pickle.PicklingError, TypeError, AttributeError):
        return None
    return out.getvalue()
