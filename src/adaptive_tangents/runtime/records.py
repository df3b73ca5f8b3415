"""Records on disk: dataclasses of tensors and numbers as one safetensors file, all but tensors as JSON in its header.

Only classes that a caller names are written or made again. Nothing is pickled.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.runtime.tensor_files import ReadError, fingerprint, read_metadata, read_tensors, write_tensors

FORMAT = 1
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, RecursionError)


class NotKept(TypeError):
    """A value that no file describes; the message says which, and where it is."""


class _Packer:
    """Values as JSON and tensors; what is held twice is written once, so that it is one object again when read."""

    def __init__(self, kinds: Iterable[type]) -> None:
        self._kinds = {kind.__name__: kind for kind in kinds}
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # ids are of objects that live
        self.tensors: dict[str, Tensor] = {}

    def packed(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, Mapping):
            pairs = [[self.packed(k, where), self.packed(held, f"{where}[{k!r}]")] for k, held in value.items()]
            return {"dict": pairs}
        if isinstance(value, tuple | list):
            return {"tuple": [self.packed(held, f"{where}[{k}]") for k, held in enumerate(value)]}
        if id(value) in self._seen:
            return {"same": self._seen[id(value)]}
        made = self._tensor(value) if isinstance(value, Tensor) else self._record(value, where)
        self._seen[id(value)] = len(self._alive)
        self._alive.append(value)
        return made

    def _tensor(self, value: Tensor) -> dict[str, Any]:
        if value.is_complex() or value.layout != torch.strided:
            raise NotKept(f"a tensor of {value.dtype}, {value.layout}")
        # Products of a transposed matrix may round otherwise than those of its copy: the order in memory is kept.
        order = sorted(range(value.ndim), key=lambda k: (-value.stride()[k], k))
        name = f"t{len(self.tensors)}"
        self.tensors[name] = value.detach().permute(order).clone(memory_format=torch.contiguous_format)
        return {"tensor": name, "order": order}

    def _record(self, value: Any, where: str) -> dict[str, Any]:
        kind = type(value)
        if self._kinds.get(kind.__name__) is not kind or not is_dataclass(value):
            raise NotKept(f"{where} is {value!r:.200}, of class {kind.__name__}")
        held = {f.name: self.packed(getattr(value, f.name), f"{where}.{f.name}") for f in fields(value)}
        return {"record": kind.__name__, "fields": held}


class _Unpacker:
    """The inverse of ``_Packer``."""

    def __init__(self, kinds: Iterable[type], tensors: Mapping[str, Tensor]) -> None:
        self._kinds = {kind.__name__: kind for kind in kinds}
        self._tensors = tensors
        self._made: list[Any] = []

    def unpacked(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "float" in value:
            return float(value["float"])
        if "dtype" in value:
            return _dtype(value["dtype"])
        if "dict" in value:
            return {self.unpacked(key): self.unpacked(held) for key, held in value["dict"]}
        if "tuple" in value:
            return tuple(self.unpacked(held) for held in value["tuple"])
        if "same" in value:
            return self._made[value["same"]]
        made = self._tensor(value) if "tensor" in value else self._record(value)
        self._made.append(made)
        return made

    def _tensor(self, value: Mapping[str, Any]) -> Tensor:
        order = value["order"]
        back = sorted(range(len(order)), key=order.__getitem__)
        return self._tensors[value["tensor"]].clone().permute(back)  # cloned: aligned in memory

    def _record(self, value: Mapping[str, Any]) -> Any:
        held = {name: self.unpacked(part) for name, part in value["fields"].items()}
        return self._kinds[value["record"]](**held)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found


def write_record(path: Path, what: str, record: Any, kinds: Iterable[type]) -> None:
    """Write a record as a file that says "adaptive-tangents ``what``".

    Raises NotKept if it holds something of another class than ``kinds``, and OSError if the file cannot be written.
    """
    packer = _Packer(kinds)
    tree = packer.packed(record, what)
    head = {"kind": f"adaptive-tangents {what}", "format": FORMAT, "record": tree}
    head["hash"] = fingerprint([json.dumps(tree), packer.tensors])
    write_tensors(path, packer.tensors, {what: json.dumps(head)})


def read_record(call: str, path: Path, what: str, kinds: Iterable[type], writer: str) -> Any:
    """The record of a file; raises TangentError unless it is whole and of this kind. ``writer`` is what writes such files."""
    wanted = f"give a file that {writer} wrote"
    try:
        found, tensors = read_metadata(path), read_tensors(path)
    except ReadError as error:
        raise TangentError(f"{call}: {path} cannot be read ({error}); {wanted}") from error
    try:
        head = json.loads(found[what])
        known, version = head["kind"] == f"adaptive-tangents {what}", head["format"]
    except _DAMAGE:
        known = False
    if not known:
        raise TangentError(f"{call}: {path} is no {what}; {wanted}")
    if version != FORMAT:
        raise TangentError(
            f"{call}: {path} is of format {version!r}, this version reads {FORMAT}; update, or save it again"
        )
    try:
        changed = fingerprint([json.dumps(head["record"]), tensors]) != head["hash"]
        record = None if changed else _Unpacker(kinds, tensors).unpacked(head["record"])
    except _DAMAGE as error:
        raise TangentError(f"{call}: {path} is damaged ({type(error).__name__}: {error}); {wanted}") from error
    if changed:
        raise TangentError(f"{call}: {path} is not as it was written; put back a copy of it")
    return record
