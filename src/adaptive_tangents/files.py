"""Tensors on disk: safetensors, each file whole or absent, with metadata that is checked; hashes of what they belong to."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

ReadError = (OSError, SafetensorError)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, replace: bool = True
) -> None:
    """Write a file in one step, after its folder: whatever stops this, ``path`` holds all of it or what it held before.

    Raises OSError where it cannot be written, and FileExistsError where it is there and ``replace`` is false.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        draft.write_bytes(save(plain, metadata=dict(metadata)))
        if replace:
            os.replace(draft, path)
        else:
            os.link(draft, path)  # fails where another was quicker
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        draft.unlink(missing_ok=True)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file; raises one of ``ReadError``."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; raises one of ``ReadError``."""
    found: dict[str, Tensor] = load_file(path)
    return found


def hashed(tensors: Mapping[str, Tensor], *words: str) -> str:
    """SHA-256 of names, shapes, dtypes and values, and of words.

    >>> hashed({"a": torch.zeros(2)}) == hashed({"a": torch.zeros(2)}), hashed({}, "a", "b") == hashed({}, "ab")
    (True, False)
    """
    found = hashlib.sha256()
    for word in words:
        found.update(f"{len(word)} {word};".encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{len(name)} {name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
