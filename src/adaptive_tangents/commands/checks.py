"""What commands check before hours are spent."""

from pathlib import Path

import torch

from adaptive_tangents.errors import TangentError


def check_folder(call: str, out: Path) -> None:
    """Raise TangentError where a file is in the way of the folder for results."""
    at = next((place for place in (out, *out.parents) if place.exists()), out)
    if at.exists() and not at.is_dir():
        raise TangentError(f"{call}: --out is a folder, and {at} is a file; give another path")


def check_device(call: str, device: str) -> None:
    """Raise TangentError for a device that is not there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TangentError(f"{call}: device {device!r} cannot be used here; use --device cpu") from error
