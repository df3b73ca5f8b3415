"""State dicts from files and folders. Pickles are never loaded."""

import glob
import json
import os
import pickle
import re
import zipfile
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from adaptive_tangents.capture.state_names import NESTED, fitted, misfit, own_state, unwrapped
from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading.words import INSPECT, check_file, continuous, listed_names, told
from adaptive_tangents.runtime.array_files import UnpacksToTooMuch, check_unpacked

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The files of weights in a folder; each may be split, with an index beside it."""
_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_STEP = re.compile(r"checkpoint-(\d+)")


def find_checkpoints(pattern: str, call: str = INSPECT) -> list[Path]:
    """Checkpoints that match a pattern, or those in a folder, in natural order: step_9.pt before step_10.pt.

    In a folder these are its folders `checkpoint-N`, as a Trainer writes them, else its files of weights. Raises
    TangentError if there are fewer than two.
    """
    folder = Path(pattern)
    inside = _inside(folder) if os.path.isdir(folder) else None
    found = sorted(
        (Path(name) for name in glob.glob(pattern, recursive=True)) if inside is None else inside, key=_natural
    )
    if len(found) < 2:
        count = f"{len(found)} {'checkpoint' if inside is not None else 'file'}{'' if len(found) == 1 else 's'}"
        what = (
            f"holds {count} (folders checkpoint-N, or files of weights)" if inside is not None else f"matches {count}"
        )
        raise TangentError(
            f"{call}: --checkpoints {pattern!r} {what}; at least two are needed, start and end (quote the pattern, so that "
            "the shell leaves it alone)"
        )
    return found


def is_series(folder: Path) -> bool:
    """Whether a folder holds folders `checkpoint-N`."""
    return any(_STEP.fullmatch(path.name) for path in _listed(folder))


def _inside(folder: Path) -> list[Path]:
    found = [path for path in _listed(folder) if _STEP.fullmatch(path.name) and os.path.isdir(path)]
    if found:
        return found
    if weights_in(folder) is not None:
        return [folder]
    return [path for path in _listed(folder) if path.suffix in _FILES and os.path.isfile(path)]


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if os.path.isdir(folder) else []


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Sort key: digits compare as numbers, the rest as text."""
    return [
        (part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", str(path)) if part
    ]


def weights_in(folder: Path) -> Path | None:
    """The file of weights in a folder, or the index of the files that it is split into."""
    for name in WEIGHTS:
        for path in (folder / name, folder / f"{name}.index.json"):
            if os.path.isfile(path):
                return path
    return None


def load_checkpoint(path: Path, model: nn.Module, call: str = INSPECT) -> dict[str, Tensor]:
    """The state dict in a file or a folder of weights, on the model's device, with the model's names and shapes.

    Accepts `.safetensors`, torch files, Lightning's `.ckpt`, and folders with `model.safetensors` or `pytorch_model.bin`, in
    one file or several. Drops or adds a prefix that all names share. Raises TangentError if the file cannot be read without
    pickle or holds no state dict, or if tensors are missing, unexpected or of the wrong shape.
    """
    device = next((t.device for t in model.state_dict().values() if isinstance(t, Tensor)), torch.device("cpu"))
    return fit_state(read_state(path, device, call), model, str(path), call)


def read_state(path: Path, device: torch.device, call: str) -> object:
    """What a file holds, or the tensors of a folder of weights."""
    if not os.path.isdir(path):
        return _read(path, device, call)
    found = weights_in(path)
    if found is None:
        raise no_weights(path, call)
    if not found.name.endswith(".index.json"):
        return _read(found, device, call)
    state: dict[str, Tensor] = {}
    for part in _parts(found, call):
        inner = unwrapped(_read(part, device, call))
        if inner is None:
            raise TangentError(f"{call}: {part} holds no tensors by name; save the checkpoint again")
        state |= inner[0]
    return state


def no_weights(folder: Path, call: str) -> TangentError:
    """The error for a folder that is no checkpoint, with what it holds."""
    held = listed_names(path.name for path in _listed(folder)) or "nothing"
    advice = f"; give it as --checkpoints {folder}" if is_series(folder) else ""
    return TangentError(
        f"{call}: {folder} is no checkpoint: it holds neither config.json with weights, nor adapter_config.json, nor "
        f"{' or '.join(WEIGHTS)}; it holds {held}{advice or '; give the folder that save_pretrained or a Trainer wrote'}"
    )


def _parts(index: Path, call: str) -> list[Path]:
    """The files that an index names, all within its folder."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        parts = [index.parent / str(name) for name in sorted(names)]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise TangentError(f"{call}: {index} cannot be read ({told(error)}); save the checkpoint again") from error
    for part in parts:
        if part.parent != index.parent:
            raise TangentError(f"{call}: {index} names {part}, outside its folder; save the checkpoint again")
        if not os.path.isfile(part):
            raise TangentError(
                f"{call}: {part}, which {index.name} names, is missing; copy all files of the checkpoint"
            )
    return parts


def fit_state(
    content: object, model: nn.Module, source: str, call: str, *, may_miss: Container[str] | None = None
) -> dict[str, Tensor]:
    """The state dict in what was read from a source, by the model's names, in its precision and on its device.

    Of names in ``may_miss`` the model's own values stand; with these, tensors without a place are left out. Raises
    TangentError if there is no state dict, or if it does not fit the model.
    """
    found = unwrapped(content)
    if found is None:
        held = (
            f"keys {listed_names(map(str, content))}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        )
        raise TangentError(
            f"{call}: {source} holds {held}, not a state dict of tensors, nor one under {' or '.join(map(repr, NESTED))}; "
            "save model.state_dict()"
        )
    source += f", under {found[1]!r}," if found[1] else ""
    wanted = own_state(model)
    state = fitted(call, found[0], model, source)
    for name in {name for name, _ in model.named_buffers()} - set(wanted):
        state.pop(name, None)  # kept by old versions of a library, made anew by later ones
    odd = [name for name, value in state.items() if name in wanted and not _plain(value, wanted[name])]
    if odd:
        raise TangentError(
            f"{call}: {source} holds sparse, quantized, complex or other unusual tensors in {listed_names(odd)}; save "
            "dense ones, of the network's kind"
        )
    # Integer counters change no output; a safetensors checkpoint may share or drop them.
    missing = [name for name in wanted if name not in state and continuous(wanted[name])]
    unexpected = [name for name in state if name not in wanted]
    if may_miss is not None:
        missing, unexpected = [name for name in missing if name not in may_miss], []
    problems = misfit(state, wanted, missing, unexpected, "unexpected")
    if problems:
        advice = "give the factory that made this checkpoint"
        heads = new_heads(missing, wanted)
        if may_miss is not None:
            advice = "give the base that the adapter was trained on, with these tensors"
        elif heads and not any(name in state and state[name].shape != value.shape for name, value in wanted.items()):
            problems = f"missing {listed_names(missing)}"
            advice = (
                f"it is the base model, and the new head ({listed_names(heads)}) was made when training began, so the "
                "network before the first step is not stored; save it before training, trainer.save_model('checkpoint-0'), "
                "or give the first checkpoint of the run as the start"
            )
        raise TangentError(f"{call}: {source} does not fit the model: {problems}; {advice}")
    state = {name: state.get(name, value).to(value.device, value.dtype) for name, value in wanted.items()}
    bad = [name for name, value in state.items() if continuous(value) and not bool(torch.isfinite(value).all())]
    if bad:
        raise TangentError(
            f"{call}: {source} holds values that are not finite in {listed_names(bad)}; use an earlier checkpoint"
        )
    return state


def new_heads(missing: Sequence[str], wanted: Mapping[str, Tensor]) -> list[str]:
    """The modules that a state lacks as a whole, if these are all that it lacks, and the smaller part of the network."""
    kept = {name for name in wanted if continuous(wanted[name])} - set(missing)
    heads: set[str] = set()
    for name in missing:
        parts = name.split(".")
        tops = [".".join(parts[:k]) for k in range(1, len(parts))]
        whole = next((top for top in tops if not any(other.startswith(f"{top}.") for other in kept)), None)
        if whole is None:
            return []
        heads.add(whole)
    share = sum(wanted[name].numel() for name in missing) / max(1, sum(value.numel() for value in wanted.values()))
    return sorted(heads) if share <= 0.5 else []


def _read(path: Path, device: torch.device, call: str) -> object:
    check_file(path, "checkpoint", "check the name", call)
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=str(device))
        if zipfile.is_zipfile(path):
            check_unpacked(path)
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        held = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise TangentError(
            f"{call}: {path} is not a checkpoint of tensors alone{f' (it holds {held[1]})' if held else ''}, and pickles are "
            "never loaded; save model.state_dict() alone, with torch.save or as .safetensors; of a file that you trust, "
            f"torch.save(torch.load({path.name!r}, weights_only=False)['state_dict'], 'weights.pt') keeps the tensors (of a "
            "whole module, .state_dict() in place of ['state_dict'])"
        ) from error
    except UnpacksToTooMuch as error:
        raise TangentError(f"{call}: {path} {error}; save the checkpoint again, as torch.save writes it") from error
    except Exception as error:  # a broken file can make its reader raise anything
        raise TangentError(f"{call}: {path} cannot be read ({told(error)}); save the checkpoint again") from error


def _plain(value: Tensor, like: Tensor) -> bool:
    """Whether a tensor is an ordinary one that can stand for ``like``."""
    unusual = value.layout is not torch.strided or value.is_quantized or value.is_meta or value.is_nested
    return not unusual and value.is_complex() == like.is_complex()
