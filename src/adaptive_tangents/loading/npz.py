"""Samples of an `.npz` file: arrays of numbers, never pickled objects."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive_tangents.capture.batches import Batch
from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading.samples import Samples
from adaptive_tangents.loading.words import check_file, listed_names, text_of, told
from adaptive_tangents.runtime.array_files import NotAnArray, UnpacksToTooMuch, read_arrays

_LABELS, _NAMES = "y", "classes"
_LARGEST = 2**63 - 1


def read_npz(path: Path, call: str) -> Samples:
    """Samples: `x` (or x0, x1, … for several arguments, or other names for keywords), `y`, `classes`.

    Integers stay integers (token indices, labels); floating arrays keep their dtype. Raises TangentError if the file is
    missing or no npz, its inputs hold objects, text or values that are not finite, or its arrays differ in length.
    """
    check_file(path, "data file", f"save one with numpy.savez({path.name!r}, x=…, y=…)", call)
    arrays = _arrays(path, call)
    names = arrays.pop(_NAMES, None)
    if names is not None and (names.ndim != 1 or names.dtype.kind not in "US"):
        raise TangentError(
            f"{call}: 'classes' in {path} must be a list of names, got {names.dtype} of shape {names.shape}"
        )
    y = arrays.pop(_LABELS, None)
    if not arrays:
        raise TangentError(f"{call}: {path} holds no inputs; save them as x, or as x0, x1, …, or by argument name")
    converted = {name: _tensor(name, array, path, call) for name, array in arrays.items()}
    words = None if names is None else tuple(text_of(name) for name in names.tolist())
    named = None
    if y is not None and y.dtype.kind in "US" and y.ndim == 1:
        named, y = tuple(text_of(name) for name in y.tolist()), None
    targets = None if y is None else _tensor(_LABELS, y, path, call)
    labels = targets if named is None else named
    counts = {name: len(t) for name, t in converted.items()} | ({} if labels is None else {_LABELS: len(labels)})
    if len(set(counts.values())) > 1:
        raise TangentError(
            f"{call}: the arrays of {path} hold different numbers of samples: "
            f"{', '.join(f'{name} {count}' for name, count in counts.items())}; give the same number for each"
        )
    if not next(iter(counts.values())):
        raise TangentError(f"{call}: {path} holds no samples")
    if targets is not None:
        targets = targets[:, 0] if targets.ndim == 2 and targets.shape[1] == 1 else targets
        if targets.ndim > 2:
            raise TangentError(
                f"{call}: y in {path} has shape {tuple(targets.shape)}; give labels (n,) or targets (n, k)"
            )
    return Samples(str(path), x=_batch(converted, path, call), y=targets, labels=named, classes=words, column=_LABELS)


def _arrays(path: Path, call: str) -> dict[str, NDArray[np.generic]]:
    try:
        return read_arrays(path)
    except NotAnArray as error:
        if "single array" in str(error):
            raise TangentError(f"{call}: {path} is a single array; save it with numpy.savez, as x and y") from error
        if "pickled" in str(error):
            raise TangentError(
                f"{call}: {path} holds pickled objects (e.g. arrays of lists of different lengths), which are never loaded; "
                "save arrays of numbers"
            ) from error
        raise TangentError(f"{call}: {path} holds more than arrays: {error}; save arrays of numbers") from error
    except UnpacksToTooMuch as error:
        raise TangentError(f"{call}: {path} {error}; save it with numpy.savez, which does not pack") from error
    except (OSError, ValueError) as error:
        raise TangentError(f"{call}: {path} is not an npz file ({told(error)}); save it with numpy.savez") from error


def _tensor(name: str, array: NDArray[np.generic], path: Path, call: str) -> Tensor:
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        raise TangentError(
            f"{call}: {name!r} in {path} holds {array.dtype}, which PyTorch lacks; convert it to float64"
        )
    if array.dtype.kind not in "fiub":
        raise TangentError(
            f"{call}: {name!r} in {path} holds {array.dtype}, not numbers; give text as token indices and classes as "
            "integers"
        )
    if array.ndim == 0:
        raise TangentError(f"{call}: {name!r} in {path} is a single number; its first dimension must be the samples")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(np.argwhere(~np.isfinite(array))[0, 0])
        raise TangentError(f"{call}: {name!r} in {path} is not finite at sample {bad}; remove or correct it")
    if array.dtype.kind == "u" and array.size and int(array.max()) > _LARGEST:
        raise TangentError(f"{call}: {name!r} in {path} holds {array.max()}, more than an int64; give smaller numbers")
    wide = array.astype(np.int64) if array.dtype.kind in "ub" and array.dtype != np.uint8 else array
    native: NDArray[np.generic] = np.ascontiguousarray(wide.astype(wide.dtype.newbyteorder("=")))
    return torch.from_numpy(native)


def _batch(arrays: Mapping[str, Tensor], path: Path, call: str) -> Batch:
    if list(arrays) == ["x"]:
        return arrays["x"]
    numbered = [f"x{k}" for k in range(len(arrays))]
    if set(arrays) == set(numbered):
        return tuple(arrays[name] for name in numbered)
    if "x" in arrays:
        raise TangentError(
            f"{call}: {path} holds x beside {listed_names(name for name in arrays if name != 'x')}; give x alone, x0, x1, … "
            "for several arguments, or every input under its argument's name"
        )
    return dict(arrays)
