"""Tensor files (safetensors), each whole or absent, with metadata; and hashes of tensors and settings."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

ReadError = (OSError, SafetensorError)
_DRAFT = re.compile(r"\..*\.adaptive-tangents-[0-9a-f]{32}\.part", re.DOTALL)


def draft_beside(path: Path) -> Path:
    """A new name beside ``path`` that no other program uses, for a file until it is whole."""
    return path.with_name(f".{path.name[:40]}.adaptive-tangents-{uuid4().hex}.part")


def is_draft(path: Path) -> bool:
    """Whether a file is such a draft; one that is not being written was left by a process that was killed."""
    return _DRAFT.fullmatch(path.name) is not None and path.is_file() and not path.is_symlink()


def write_file(path: Path, write: Callable[[IO[bytes]], Any], *, replace: bool = True) -> None:
    """Write a file in one step, after its folder: whatever stops this, ``path`` holds all of it or what it held before.

    ``write`` is called with a binary file. Raises OSError where it cannot be written, and FileExistsError where it is there
    and ``replace`` is false.
    """
    draft = draft_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            write(file)
        if replace:
            os.replace(draft, path)
        else:
            os.link(draft, path)  # fails where another was quicker
    finally:
        draft.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes, *, replace: bool = True) -> None:
    """Write a file of these bytes by `write_file`; raises what it does."""
    write_file(path, lambda file: file.write(content), replace=replace)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, replace: bool = True
) -> None:
    """Write tensors by `write_file`; raises what it does."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        write_bytes(path, save(plain, metadata=dict(metadata)), replace=replace)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file; raises one of ``ReadError`` if it cannot be read."""
    _check_file(path)
    with _any_read_error(), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; raises one of ``ReadError`` if it cannot be read."""
    _check_file(path)
    with _any_read_error():
        found: dict[str, Tensor] = load_file(path)
    return found


def _check_file(path: Path) -> None:
    """Raise OSError unless there is a file; to open a pipe would wait for its writer."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise OSError("it is not a file")


@contextmanager
def _any_read_error() -> Iterator[None]:
    """Whatever safetensors or torch raise for a header that they did not expect, as OSError."""
    try:
        yield
    except ReadError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def fingerprint(value: Any) -> str:
    """A hash of tensors and numbers, in mappings (in any order), sequences and dataclasses.

    Names, dtypes and shapes count.

    >>> fingerprint({"a": torch.zeros(2)}) == fingerprint({"a": torch.zeros(3)})
    False
    """
    found = hashlib.sha256()
    for part in _parts(value):
        found.update(part)
    return found.hexdigest()


def _parts(value: Any) -> Iterable[bytes | memoryview]:
    """A value as bytes; different values give different bytes."""
    if isinstance(value, Tensor):
        plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        yield f"tensor {plain.dtype} {tuple(plain.shape)}".encode()
        yield plain.reshape(-1).view(torch.uint8).numpy().data
    elif dataclasses.is_dataclass(value):
        yield f"{type(value).__name__}(".encode()
        yield from _parts({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for key, held in sorted(value.items(), key=lambda item: repr(item[0])):
            yield f"{key!r}:".encode()
            yield from _parts(held)
    elif isinstance(value, list | tuple):
        yield f"sequence {len(value)}".encode()
        for held in value:
            yield from _parts(held)
    else:
        yield repr(value).encode()
