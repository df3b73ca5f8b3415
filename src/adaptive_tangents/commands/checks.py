"""Checks before a long command starts."""

from pathlib import Path

import torch

from adaptive_tangents.errors import TangentError


def check_folder(call: str, out: Path) -> None:
    """Raise TangentError if a file is where the result folder would be."""
    at = next((place for place in (out, *out.parents) if place.exists()), out)
    if at.exists() and not at.is_dir():
        raise TangentError(f"{call}: --out must be a folder, but {at} is a file; give another path")


def check_device(call: str, device: str) -> None:
    """Raise TangentError if the device cannot be used."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TangentError(f"{call}: device {device!r} cannot be used here; use --device cpu") from error
