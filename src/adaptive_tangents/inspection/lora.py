"""Advice on adapters of low rank beside the results of an inspection."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

from adaptive_tangents.errors import TangentError
from adaptive_tangents.measures.lora_advice import LoraAdvice, lora_advice
from adaptive_tangents.runs.results import Arrays, Results
from adaptive_tangents.runtime.tensor_files import write_bytes

LORA_FILE = "lora.json"
_ALL_OURS = {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"}


def advised(results: Results, arrays: Arrays) -> LoraAdvice | None:
    """The advice of an inspection: ranks that hold 90% of each layer's change; None if adapters would save nothing, or are
    what was trained.

    >>> import numpy as np
    >>> results = {"blocks": {"layer.query": {"shape": [8, 8]}}}
    >>> advice = advised(results, {"singular_values.change.layer.query": np.array([1.0, 0.1])})
    >>> advice.rank_pattern
    {'layer.query': 1}
    """
    if any(".lora_" in name for name in results["blocks"]):
        return None
    try:
        found = lora_advice(SimpleNamespace(results=results, arrays=arrays))
    except TangentError:  # no layer with a matrix changed
        return None
    return found if found.adapted else None


def write_advice(results: Results, arrays: Arrays, directory: str | os.PathLike[str]) -> str | None:
    """Write `lora.json`, the arguments of ``peft.LoraConfig``, beside results; return the advice in a sentence.

    None, and no file, if there is no advice. An older advice is replaced.
    Raises TangentError if the file cannot be written, or if something else has written one of that name.

    >>> import tempfile
    >>> write_advice({"blocks": {}}, {}, tempfile.gettempdir()) is None
    True
    """
    advice = advised(results, arrays)
    if advice is None:
        return None
    path = Path(directory) / LORA_FILE
    if os.path.lexists(path) and not _ours(path):
        raise TangentError(
            f"inspect: {path} was not written by adaptive-tangents, so it is not replaced; give another folder, or move it "
            "away"
        )
    try:
        write_bytes(path, f"{advice.to_json()}\n".encode())
    except OSError as error:
        raise TangentError(f"inspect: {path} cannot be written ({error}); give another folder") from error
    return advice.sentence()


def _ours(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    try:
        held = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(held, dict) and held.keys() >= _ALL_OURS and held.keys() <= _ALL_OURS | {"modules_to_save"}
