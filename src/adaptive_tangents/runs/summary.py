"""A summary of all experiments: every claim with its verdict, read from their result folders."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adaptive_tangents.errors import TangentError
from adaptive_tangents.runs.results import load_results, write_results

NAME = "all"
# The parts of an experiment's results that the table of claims needs.
KEPT = ("command", "config", "versions", "device", "threads", "cores", "wall_seconds", "claims")


def summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """An experiment's claims, settings, machine and total seconds: small enough to keep permanently.

    Raises TangentError if one of these is missing.
    """
    missing = [key for key in KEPT if key not in results]
    if missing:
        raise TangentError(f"overview: results lack {', '.join(missing)}; run the experiment again")
    kept = {key: results[key] for key in KEPT}
    return kept | {"wall_seconds": {"total": results["wall_seconds"]["total"]}}


def collect(directory: str | os.PathLike[str], names: Iterable[str], *, command: str) -> Path:
    """Write ``directory``/results.json with the claims of all experiments in ``directory``/NAME; return the folder.

    Raises TangentError if a folder's results cannot be read, or if no experiment has a folder.
    """
    directory = Path(directory)
    found = {name: summary(load_results(directory / name)[0]) for name in names if (directory / name).is_dir()}
    if not found:
        raise TangentError(
            f"overview: no experiment's folder in {directory}; run adaptive-tangents reproduce all first"
        )
    return write_results({"experiment": NAME, "command": command, "runs": found}, {}, directory)
