"""Samples and labels from files, in the form that a network takes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adaptive_tangents.capture.batches import Batch, mapped, take, tensors
from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading.words import INSPECT, check_file, continuous, listed_names, text_of, told
from adaptive_tangents.runtime.array_files import NotAnArray, UnpacksToTooMuch, read_arrays

_LABELS, _NAMES = "y", "classes"
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Data:
    """A batch x of n samples, their labels or targets y (n,) or (n, k), the class names, and raw texts, each if given."""

    x: Batch
    y: Tensor | None = None
    classes: tuple[str, ...] | None = None
    texts: tuple[str, ...] | None = None

    @property
    def n(self) -> int:
        """Number of samples."""
        return tensors(self.x)[0].shape[0]

    @property
    def labels(self) -> Tensor | None:
        """``y`` if it holds class numbers (n,), else None."""
        return self.y if self.y is not None and self.y.ndim == 1 and not self.y.is_floating_point() else None

    def take(self, index: Tensor) -> "Data":
        """Some of the samples."""
        texts = None if self.texts is None else tuple(self.texts[k] for k in index.tolist())
        return replace(self, x=take(self.x, index), y=None if self.y is None else self.y[index], texts=texts)


def load_data(path: Path, call: str = INSPECT) -> Data:
    """Samples of an `.npz` file: `x` (or x0, x1, … for several arguments, or other names for keywords), `y`, `classes`.

    Integers stay integers (token indices, labels); floating arrays keep their dtype. Raises TangentError if the file is
    missing or no npz, its inputs hold objects, text or values that are not finite, or its arrays differ in length.
    """
    check_file(path, "data file", f"save one with numpy.savez({path.name!r}, x=…, y=…)", call)
    try:
        arrays = read_arrays(path)
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
    names = arrays.pop(_NAMES, None)
    if names is not None and (names.ndim != 1 or names.dtype.kind not in "US"):
        raise TangentError(
            f"{call}: 'classes' in {path} must be a list of names, got {names.dtype} of shape {names.shape}"
        )
    y = arrays.pop(_LABELS, None)
    if not arrays:
        raise TangentError(f"{call}: {path} holds no inputs; save them as x, or as x0, x1, …, or by argument name")
    converted = {name: _tensor(name, array, path, call) for name, array in arrays.items()}
    targets = None if y is None else _tensor(_LABELS, y, path, call)
    counts = {name: len(t) for name, t in converted.items()} | ({} if targets is None else {_LABELS: len(targets)})
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
    words = None if names is None else tuple(text_of(name) for name in names.tolist())
    return Data(_batch(converted, path, call), targets, words)


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


def fit_data(data: Data, model: nn.Module, call: str = INSPECT) -> Data:
    """The data in the model's precision and on its device: floats are converted, integers become indices.

    Raises TangentError if x holds integers but the network has no embedding, so that they are probably pixels.
    """
    parameters = [p for p in model.parameters() if continuous(p)]
    if not parameters:
        raise TangentError(f"{call}: the model has no parameters; give the factory of a network")
    dtype, device = parameters[0].dtype.to_real(), parameters[0].device
    embeds = any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in model.modules())
    if not embeds and not any(continuous(t) for t in tensors(data.x)):
        first = tensors(data.x)[0]
        raise TangentError(
            f"{call}: x holds integers ({first.dtype}, {int(first.min())} to {int(first.max())}) and the network has no "
            "embedding for them; convert x to float and normalize it as in training, e.g. (x / 255 - mean) / deviation"
        )

    def fitted(value: Tensor) -> Tensor:
        if value.is_complex():
            return value.to(device=device, dtype=dtype.to_complex())
        return value.to(device=device, dtype=dtype if value.is_floating_point() else torch.int64)

    x = mapped(data.x, fitted)
    return replace(data, x=x, y=None if data.y is None else fitted(data.y))
