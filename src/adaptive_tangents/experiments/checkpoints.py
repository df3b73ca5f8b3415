"""Checkpoints of a run on disk: safetensors, each file whole or absent, tied to the settings that made it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from adaptive_tangents.errors import TangentError

FOLDER = "checkpoints"


def write_checkpoint(directory: Path, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """Write one checkpoint into ``directory``/checkpoints, replacing an older one in one step.

    Raises TangentError where the folder cannot be written.
    """
    path = directory / FOLDER / f"{name}.safetensors"
    draft = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        draft.write_bytes(save(plain, metadata={"config": _text(config)}))
        os.replace(draft, path)
    except (OSError, SafetensorError) as error:
        draft.unlink(missing_ok=True)
        raise TangentError(
            f"checkpoint: {path} cannot be written ({error}); choose another folder with --out"
        ) from error
    return path


def read_checkpoints(directory: Path, config: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """All checkpoints of an earlier run with the same settings, by name.

    Raises TangentError where one was made with other settings, or cannot be read.
    """
    found = {}
    for path in sorted((directory / FOLDER).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                made_with = (file.metadata() or {}).get("config")
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise TangentError(
                f"resume: {path} cannot be read ({error}); delete it, and its training is repeated"
            ) from error
        if made_with != _text(config):
            raise TangentError(
                f"resume: {path} was made with other settings; run with the same ones, without --resume, or into another "
                "folder with --out"
            )
        found[path.name.removesuffix(".safetensors")] = tensors
    return found


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(dict(config), sort_keys=True)
