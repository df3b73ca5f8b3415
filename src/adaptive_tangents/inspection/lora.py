"""Advice on adapters of low rank beside the results of an inspection."""

import os
from pathlib import Path
from types import SimpleNamespace

from adaptive_tangents.errors import TangentError
from adaptive_tangents.measures.lora_advice import LoraAdvice, lora_advice
from adaptive_tangents.runs.own_files import LORA_FILE, check_replaceable
from adaptive_tangents.runs.results import Arrays, Results
from adaptive_tangents.runtime.tensor_files import write_bytes


def advised(results: Results, arrays: Arrays) -> LoraAdvice | None:
    """The advice of an inspection: ranks that hold 90 % of each layer's change; None if adapters would save nothing, or are
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

    None, and no file, if there is no advice. An older advice is replaced or removed.
    Raises TangentError if the file cannot be written, or if something else has written one of that name.

    >>> import tempfile
    >>> write_advice({"blocks": {}}, {}, tempfile.gettempdir()) is None
    True
    """
    advice, path = advised(results, arrays), Path(directory) / LORA_FILE
    if advice is None and not os.path.lexists(path):
        return None
    check_replaceable("inspect", path)
    if advice is None:
        path.unlink()
        return None
    try:
        write_bytes(path, f"{advice.to_json()}\n".encode())
    except OSError as error:
        raise TangentError(f"inspect: {path} cannot be written ({error}); give another folder") from error
    return advice.sentence()
