"""Checks before a long command starts."""

import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import torch

from adaptive_tangents.commands.console import errors
from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading import load_data
from adaptive_tangents.runs.own_files import RESULTS_FILE, check_ours


def check_folder(call: str, out: Path, figures: Iterable[str] = (), tables: Iterable[str] = ()) -> None:
    """Raise TangentError if results cannot be written to a folder, or would replace something else there."""
    at = next((place for place in (out, *out.parents) if os.path.lexists(place)), Path())
    if not os.path.isdir(at):
        raise TangentError(f"{call}: --out must be a folder, but {at} is a file; give another path")
    if not os.access(at, os.W_OK | os.X_OK):
        raise TangentError(f"{call}: --out {out} cannot be written, because {at} may not be changed; give another path")
    check_ours(call, out, figures, tables)


def tell_earlier(out: Path, *, parts: str | None = None, resumed: bool = False) -> None:
    """Say in a line, before work starts, what of an earlier run stands in a folder and will be replaced.

    ``parts`` is the folder within it of what a run finished, which a run that is ``resumed`` takes.
    """
    held = [each for each in (parts,) if each and any((out / each).glob("*.safetensors"))]
    if os.path.lexists(out / RESULTS_FILE):
        made = datetime.fromtimestamp((out / RESULTS_FILE).stat().st_mtime).strftime("%Y-%m-%d %H:%M")
        what = f"{out} holds a result of {made}, which this run will replace; --out FOLDER keeps it"
    elif held and not resumed:
        what = f"{out} holds parts of an interrupted run, which this one will replace"
    else:
        return
    if held and not resumed:
        what += f"; --resume takes what is finished in {out / held[0]}"
    errors.print(what.replace("\n", "\\n"), soft_wrap=True, highlight=False, markup=False)


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
