"""Checks before a long command starts."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading import load_data
from adaptive_tangents.runs.own_files import check_ours


def check_folder(call: str, out: Path, figures: Iterable[str] = (), tables: Iterable[str] = ()) -> None:
    """Raise TangentError if results cannot be written to a folder, or would replace something else there."""
    at = next((place for place in (out, *out.parents) if os.path.lexists(place)), Path())
    if not os.path.isdir(at):
        raise TangentError(f"{call}: --out must be a folder, but {at} is a file; give another path")
    if not os.access(at, os.W_OK | os.X_OK):
        raise TangentError(f"{call}: --out {out} cannot be written, because {at} may not be changed; give another path")
    check_ours(call, out, figures, tables)


def check_device(call: str, device: str) -> None:
    """Raise TangentError if the device cannot be used."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TangentError(f"{call}: device {device!r} cannot be used here; use --device cpu") from error


def check_exists(call: str, data: Path) -> None:
    """Raise TangentError if there are no data, before a network is made for them."""
    if not os.path.exists(data):
        load_data(data, call)
