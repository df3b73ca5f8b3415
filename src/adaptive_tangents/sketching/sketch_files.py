"""Sketched features on disk: a folder of parts, each whole or absent, that later samples are appended to.

Every part says which sketch it is of, of which blocks and at which parameters, how many samples come before it, and the
hash of its numbers. Parts are never written to again, so a run that is killed loses its own samples only.
"""

import json
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
    r"""Write sketched features into a new folder, φ̂ of n samples as one file; the projections follow from their seed.

    Raises TangentError where the folder holds a sketch already, the parameters that the features are of are not known, or
    nothing can be written.

    >>> import tempfile, torch, adaptive_tangents as at
    >>> model, sketch = torch.nn.Linear(40, 30), at.Sketch(256)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     at.save_sketch(folder, at.sketch_features(model, torch.randn(5, 40), sketch))
    ...     at.append_sketch(folder, at.sketch_features(model, torch.randn(3, 40), sketch))
    ...     at.load_sketch(folder).n
    8
    """
    folder = Path(path)
    if list(_parts(folder)):
        raise TangentError(f"save_sketch: {folder} holds a sketch already; use append_sketch, or another folder")
    _write("save_sketch", folder, feats, 0, 0)


def append_sketch(path: str | Path, feats: SketchedFeatures) -> None:
    """Write the features of more samples after those a folder holds.

    Raises TangentError where the folder holds no sketch, or one of another dim, seed, model or parameters, where another
    process appended at the same time, and as ``load_sketch`` does for parts that are missing.
    """
    folder = Path(path)
    heads = _heads("append_sketch", folder)
    theirs, mine = heads[-1], _head("append_sketch", feats, 0)
    differing = [key for key in theirs if key not in ("before", "samples", "hash") and theirs[key] != mine[key]]
    if differing:
        what = "; ".join(f"{_NAMES[key]} {_short(theirs[key])} there and {_short(mine[key])} here" for key in differing)
        raise TangentError(f"append_sketch: {folder} holds another sketch: {what}; use the same, or another folder")
    _write("append_sketch", folder, feats, len(heads), theirs["before"] + theirs["samples"])


def load_sketch(path: str | Path) -> SketchedFeatures:
    """The features of all samples that a folder holds, in the order they were added.

    Raises TangentError where there are none, a part is missing, cannot be read or was changed, or is of a later format.
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
    return sorted(folder.glob(_PART.replace("{:05d}", "*")))


def _head(call: str, feats: SketchedFeatures, before: int) -> dict[str, Any]:
    """All that identifies features and their place, as JSON gives it back."""
    if feats.fingerprint is None:
        raise TangentError(
            f"{call}: the parameters that these features are of are not known; make them with sketch_features, or give "
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
            raise TangentError(f"{call}: block {name!r} was moved by a joint transform; save the features before it")
        tensors[name] = block.dense.values
    head = _head(call, feats, before) | {"hash": fingerprint(tensors)}
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
    """What every part says of itself, checked to be one sequence."""
    found: list[dict[str, Any]] = []
    before = 0
    for number, path in enumerate(_parts(folder)):
        try:
            head = json.loads(read_metadata(path)["head"])
        except (*ReadError, KeyError, ValueError) as error:
            raise TangentError(
                f"{call}: {path} cannot be read ({error}); delete it and the parts after it, and append their samples again"
            ) from error
        if head["format"] != _FORMAT:
            raise TangentError(f"{call}: {path} is of format {head['format']}, this version reads {_FORMAT}; update")
        if head["before"] != before or path.name != _PART.format(number):
            raise TangentError(
                f"{call}: {folder} lacks a part: {path.name} comes after {head['before']} samples and {before} are there; "
                "put the missing file back, or make the sketch again"
            )
        found.append(head)
        before += head["samples"]
    if not found:
        raise TangentError(f"{call}: {folder} holds no sketch; make one with save_sketch")
    return found


def _read(path: Path, head: Mapping[str, Any]) -> SketchedFeatures:
    try:
        tensors = read_tensors(path)
    except ReadError as error:
        raise TangentError(f"load_sketch: {path} cannot be read ({error}); put back a copy of it") from error
    if fingerprint(tensors) != head["hash"]:
        raise TangentError(f"load_sketch: {path} is not as it was written; put back a copy of it")
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
