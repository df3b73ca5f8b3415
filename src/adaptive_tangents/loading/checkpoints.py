"""State dicts from files. Pickles are never loaded."""

import glob
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading.words import INSPECT, check_file, continuous, listed_names, told
from adaptive_tangents.runtime.array_files import UnpacksToTooMuch, check_unpacked

NESTED = ("state_dict", "model", "model_state_dict")  # keys under which training scripts keep the state dict
WRAPPERS = ("module.", "_orig_mod.")  # prefixes that DataParallel and torch.compile put before every name


def find_checkpoints(pattern: str, call: str = INSPECT) -> list[Path]:
    """Files that match a pattern, in natural order: step_9.pt before step_10.pt.

    Raises TangentError if fewer than two match.
    """
    found = sorted((Path(name) for name in glob.glob(pattern, recursive=True)), key=_natural)
    if len(found) < 2:
        raise TangentError(
            f"{call}: --checkpoints {pattern!r} matches {len(found)} {'file' if len(found) == 1 else 'files'}; at least two "
            "are needed, start and end (quote the pattern, so that the shell leaves it alone)"
        )
    return found


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Sort key: digits compare as numbers, the rest as text."""
    return [
        (part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", str(path)) if part
    ]


def load_checkpoint(path: Path, model: nn.Module, call: str = INSPECT) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` or torch file, on the model's device, with the model's names and shapes.

    Accepts a bare state dict, or one under "state_dict", "model" or "model_state_dict", and drops the prefix
    "module." or "_orig_mod." if every name has it. Raises TangentError if the file cannot be read without pickle or holds
    no state dict, or if tensors are missing, unexpected or of the wrong shape.
    """
    wanted = model.state_dict()
    device = next((t.device for t in wanted.values()), torch.device("cpu"))
    found, where = _state(_read(path, device, call), path, call)
    for wrapper in WRAPPERS * 2:  # either may wrap the other
        if found and all(name.startswith(wrapper) for name in found):
            found = {name.removeprefix(wrapper): value for name, value in found.items()}
    # Integer counters change no output; a safetensors checkpoint may share or drop them.
    missing = [name for name in wanted if name not in found and continuous(wanted[name])]
    unexpected = [name for name in found if name not in wanted]
    odd = [name for name, value in found.items() if name in wanted and not _plain(value, wanted[name])]
    if odd:
        raise TangentError(
            f"{call}: {path}{where} holds sparse, quantized, complex or other unusual tensors in {listed_names(odd)}; save "
            "dense ones, of the network's kind"
        )
    wrong = [
        f"{name} {tuple(found[name].shape)} for {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    if missing or unexpected or wrong:
        parts = (("missing", missing), ("unexpected", unexpected), ("of another shape:", wrong))
        problems = "; ".join(f"{what} {listed_names(names)}" for what, names in parts if names)
        raise TangentError(
            f"{call}: {path}{where} does not fit the model: {problems}; give the factory that made this checkpoint"
        )
    state = {name: found.get(name, value).to(value.dtype) for name, value in wanted.items()}
    bad = [name for name, value in state.items() if continuous(value) and not bool(torch.isfinite(value).all())]
    if bad:
        raise TangentError(
            f"{call}: {path} holds values that are not finite in {listed_names(bad)}; use an earlier checkpoint"
        )
    return state


def _read(path: Path, device: torch.device, call: str) -> object:
    check_file(path, "checkpoint", "check the name", call)
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=str(device))
        if zipfile.is_zipfile(path):
            check_unpacked(path)
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise TangentError(
            f"{call}: {path} is not a checkpoint of tensors alone, and pickles are never loaded; save "
            "model.state_dict() alone, with torch.save or as .safetensors"
        ) from error
    except UnpacksToTooMuch as error:
        raise TangentError(f"{call}: {path} {error}; save the checkpoint again, as torch.save writes it") from error
    except Exception as error:  # a broken file can make its reader raise anything
        raise TangentError(f"{call}: {path} cannot be read ({told(error)}); save the checkpoint again") from error


def _state(content: object, path: Path, call: str) -> tuple[dict[str, Tensor], str]:
    """The state dict in a checkpoint, and a phrase naming the key it was under."""
    if isinstance(content, Mapping):
        if _is_state(content):
            return dict(content), ""
        for key in NESTED:
            inner = content.get(key)
            if _is_state(inner):
                return dict(inner), f", under {key!r},"
    held = f"keys {listed_names(map(str, content))}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise TangentError(
        f"{call}: {path} holds {held}, not a state dict of tensors, nor one under {' or '.join(map(repr, NESTED))}; save "
        "model.state_dict()"
    )


def _plain(value: Tensor, like: Tensor) -> bool:
    """Whether a tensor is an ordinary one that can stand for ``like``."""
    unusual = value.layout is not torch.strided or value.is_quantized or value.is_meta or value.is_nested
    return not unusual and value.is_complex() == like.is_complex()


def _is_state(content: object) -> TypeGuard[Mapping[str, Tensor]]:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    )
