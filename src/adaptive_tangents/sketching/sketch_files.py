"""Sketched features on disk: a folder of parts, each whole or absent, to which later samples are appended.

Every part records its sketch, its blocks and parameters, the number of samples before it, and the hash of its numbers.
Parts are never changed, so a run that is killed loses only its own samples.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.blocks import Block, Slot, stack_blocks
from adaptive_tangents.features.summands import Dense
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.runtime.tensor_files import ReadError, fingerprint, read_metadata, read_tensors, write_tensors
from adaptive_tangents.sketching.sketches import Sketch, SketchedFeatures

_FORMAT = 1
_PART = "sketch-{:05d}.safetensors"


def save_sketch(path: str | Path, feats: SketchedFeatures) -> None:
    r"""Write sketched features of n samples into a new folder, as one file.

    The projections are not stored: they follow from the sketch's seed.

    Args:
        path: the folder; it is made if needed.
        feats: the features to write.

    Raises:
        TangentError: when the folder holds a sketch already, the features have no fingerprint of their parameters, or
            nothing can be written.

    >>> import tempfile, torch, adaptive_tangents as at
    >>> model, sketch = torch.nn.Linear(40, 30), at.Sketch(256)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     at.sketching.save_sketch(folder, at.sketch_features(model, torch.randn(5, 40), sketch))
    ...     at.sketching.append_sketch(folder, at.sketch_features(model, torch.randn(3, 40), sketch))
    ...     at.sketching.load_sketch(folder).n
    8
    """
    folder = Path(path)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise TangentError(f"save_sketch: {folder} is a file; give the path of a folder")
    if list(_parts(folder)):
        raise TangentError(f"save_sketch: {folder} holds a sketch already; use append_sketch, or another folder")
    _write("save_sketch", folder, feats, 0, 0)


def append_sketch(path: str | Path, feats: SketchedFeatures) -> None:
    """Write the features of more samples after those that a folder holds.

    Args:
        path: the folder of the sketch.
        feats: the features to append, of the same sketch, model and parameters.

    Raises:
        TangentError: when the folder holds no sketch or another one, a part is missing, or another process appended at
            the same time.
    """
    folder = Path(path)
    heads = _heads("append_sketch", folder)
    theirs, mine = heads[-1], _head("append_sketch", feats, 0)
    differing = [key for key in _NAMES if theirs[key] != mine[key]]
    if differing:
        what = "; ".join(f"{_NAMES[key]} {_short(theirs[key])} there and {_short(mine[key])} here" for key in differing)
        raise TangentError(f"append_sketch: {folder} holds another sketch: {what}; use the same, or another folder")
    _write("append_sketch", folder, feats, len(heads), theirs["before"] + theirs["samples"])


def load_sketch(path: str | Path) -> SketchedFeatures:
    """The features of all samples that a folder holds, in the order in which they were added.

    Args:
        path: the folder of the sketch.

    Raises:
        TangentError: when there is no sketch, or a part is missing, cannot be read, was changed, or has a later format.
    """
    folder = Path(path)
    heads = _heads("load_sketch", folder)
    made = [_read(file, head) for file, head in zip(_parts(folder), heads, strict=True)]
    blocks = {name: stack_blocks([part.blocks[name] for part in made]) for name in made[0].blocks}
    n = sum(part.n for part in made)
    return made[0].of(TangentFeatures(n, made[0].c, blocks, made[0].parameters))


_NAMES = {
    "format": "format", "sketch": "sketch", "shapes": "shapes of blocks", "parameters": "parameters of blocks",
    "slots": "places of parameters", "fingerprint": "parameters with hash", "outputs": "outputs", "dtype": "dtype",
}  # fmt: skip


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 200 else f"{text[:200]}…"


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob(_PART.replace("{:05d}", "*"))) if os.path.isdir(folder) else []


def _head(call: str, feats: SketchedFeatures, before: int) -> dict[str, Any]:
    """What identifies features and their place, as plain JSON values."""
    if feats.fingerprint is None:
        raise TangentError(
            f"{call}: the features do not say which parameters they belong to; make them with sketch_features, or give "
            "sketch.apply a fingerprint"
        )
    head = {
        "format": _FORMAT, "sketch": feats.sketch.describe(), "shapes": feats.shapes, "parameters": feats.parameters,
        "slots": {name: [asdict(slot) for slot in block.slots] for name, block in feats.blocks.items()},
        "fingerprint": feats.fingerprint, "outputs": feats.c, "dtype": str(feats.dtype), "before": before,
        "samples": feats.n,
    }  # fmt: skip
    found: dict[str, Any] = json.loads(json.dumps(head))
    return found


def _write(call: str, folder: Path, feats: SketchedFeatures, number: int, before: int) -> None:
    tensors = {}
    for name, block in feats.blocks.items():
        if len(block.summands) > 1 or block.dense is None:
            raise TangentError(f"{call}: block {name!r} has a joint transform; save the features before the transform")
        tensors[name] = block.dense.values
    head = _head(call, feats, before) | {"hash": fingerprint(tensors)}
    head["record"] = fingerprint(head)
    path = folder / _PART.format(number)
    try:
        write_tensors(path, tensors, {"head": json.dumps(head)}, replace=False)
    except FileExistsError as error:
        raise TangentError(f"{call}: {path} was written by another process in the meantime; try again") from error
    except OSError as error:
        raise TangentError(
            f"{call}: {path} cannot be written ({error}); nothing was added, use another folder"
        ) from error


def _heads(call: str, folder: Path) -> list[dict[str, Any]]:
    """The records of all parts, checked to be one sequence."""
    found: list[dict[str, Any]] = []
    before = 0
    for number, path in enumerate(_parts(folder)):
        try:
            head = json.loads(read_metadata(path)["head"])
            later = head["format"] != _FORMAT
            changed = not later and _changed(head)
        except (*ReadError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise TangentError(
                f"{call}: {path} cannot be read ({error}); delete it and the parts after it, and append their samples again"
            ) from error
        if changed:
            raise TangentError(f"{call}: the record of {path} is not as it was written; put back a copy of it")
        if later:
            raise TangentError(f"{call}: {path} is of format {head['format']}, this version reads {_FORMAT}; update")
        if head["before"] != before or path.name != _PART.format(number):
            raise TangentError(
                f"{call}: {folder} lacks a part: {path.name} comes after {head['before']} samples and {before} are there; "
                "put the missing file back, or make the sketch again"
            )
        if found and any(head[key] != found[0][key] for key in _NAMES):
            raise TangentError(
                f"{call}: {path} belongs to another sketch than the parts before it; put back the right file"
            )
        found.append(head)
        before += head["samples"]
    if not found:
        raise TangentError(f"{call}: {folder} holds no sketch; make one with save_sketch")
    return found


def _changed(head: dict[str, Any]) -> bool:
    """Whether a part's record was changed by hand; those of earlier versions have no hash, and only their form is checked."""
    if "record" in head:
        return bool(fingerprint({key: value for key, value in head.items() if key != "record"}) != head["record"])
    counts = all(type(head[key]) is int and head[key] >= 0 for key in ("before", "samples", "outputs"))
    return not counts or not all(key in head for key in (*_NAMES, "hash"))


def _read(path: Path, head: Mapping[str, Any]) -> SketchedFeatures:
    try:
        tensors = read_tensors(path)
    except ReadError as error:
        raise TangentError(f"load_sketch: {path} cannot be read ({error}); put back a copy of it") from error
    if fingerprint(tensors) != head["hash"]:
        raise TangentError(f"load_sketch: {path} is not as it was written; put back a copy of it")
    try:
        return _features(head, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise TangentError(
            f"load_sketch: the record of {path} does not fit its numbers ({type(error).__name__}: {error}); put back a "
            "copy of it"
        ) from error


def _features(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SketchedFeatures:
    given = {key: head["sketch"][key] for key in ("dim", "seed", "repetitions", "shares")}
    blocks = {name: _block(name, tensors[name], slots) for name, slots in head["slots"].items()}
    return SketchedFeatures(
        head["samples"], head["outputs"], blocks, {name: tuple(shape) for name, shape in head["parameters"].items()},
        sketch=Sketch(**given), shapes={name: (o, i) for name, (o, i) in head["shapes"].items()},
        fingerprint=head["fingerprint"],
    )  # fmt: skip


def _block(name: str, values: Tensor, slots: list[dict[str, Any]]) -> Block:
    _, _, o, i = values.shape
    made = tuple(Slot(**{**slot, "shape": tuple(slot["shape"])}) for slot in slots)
    return Block(name, (o, i), made, dense=Dense(values))
