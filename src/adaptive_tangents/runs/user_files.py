"""Load models from factories, and checkpoints and data from files, for `inspect` and `kernel`. Pickles are never loaded."""

import glob
import importlib
import importlib.util
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from adaptive_tangents.capture.batches import Batch, arguments, mapped, take, tensors
from adaptive_tangents.capture.lease import Loan, on_loan
from adaptive_tangents.capture.recording import recorded_if_needed
from adaptive_tangents.errors import TangentError
from adaptive_tangents.runtime.array_files import NotAnArray, UnpacksToTooMuch, check_unpacked, read_arrays

NESTED = ("state_dict", "model", "model_state_dict")  # keys under which training scripts keep the state dict
WRAPPERS = ("module.", "_orig_mod.")  # prefixes that DataParallel and torch.compile put before every name
_LABELS, _NAMES = "y", "classes"
_LARGEST = 2**63 - 1
_INSPECT = "inspect"  # the command that errors name by default


@dataclass(frozen=True)
class Data:
    """A batch x of n samples, their labels or targets y (n,) or (n, k), and the class names, each if given."""

    x: Batch
    y: Tensor | None = None
    classes: tuple[str, ...] | None = None

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
        return replace(self, x=take(self.x, index), y=None if self.y is None else self.y[index])


def load_model(spec: str, call: str = _INSPECT) -> nn.Module:
    """The network made by a factory, `package.module:factory` or `path/to/file.py:factory`, in evaluation mode.

    Raises TangentError if the module cannot be imported or lacks the function, or if that returns no `nn.Module`.

    >>> load_model("torch.nn:Identity")
    Identity()
    """
    source, separator, name = spec.rpartition(":")
    if not separator or not source or not name:
        raise TangentError(
            f"{call}: --model is package.module:factory or path/to/file.py:factory, got {spec!r}; name the function that "
            "makes the network after a colon"
        )
    module = _module(source, call)
    factory = getattr(module, name, None)
    if factory is None:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise TangentError(
            f"{call}: {source} has no {name!r}; it holds {_listed(public) or 'no functions'}; name one that makes "
            "the network"
        )
    if not callable(factory) or isinstance(factory, nn.Module):
        raise TangentError(
            f"{call}: {spec} is a {type(factory).__name__}, not a function; name a function without arguments that "
            "returns the network"
        )
    try:
        model = factory()
    except (Exception, SystemExit) as error:
        raise TangentError(
            f"{call}: {spec} raised {_told(error)}; it is called without arguments; write a function that fills them in"
        ) from error
    if not isinstance(model, nn.Module):
        raise TangentError(f"{call}: {spec} returned {type(model).__name__}, not a torch.nn.Module; return the network")
    return model.eval()


def _module(source: str, call: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        path = Path(source).resolve()
        if not os.path.isfile(path):
            raise TangentError(f"{call}: there is no file {source}; --model is path/to/file.py:factory")
        found = importlib.util.spec_from_file_location(path.stem, path)
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.path.insert(0, str(path.parent))  # the script's neighbors must be importable, as when it runs
        found.loader.exec_module(module)
        return module
    except TangentError:
        raise
    except (Exception, SystemExit) as error:
        raise TangentError(
            f"{call}: importing {source} failed with {_told(error)}; run {call} where it can be imported, "
            "or give path/to/file.py:factory"
        ) from error


def find_checkpoints(pattern: str, call: str = _INSPECT) -> list[Path]:
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


def load_checkpoint(path: Path, model: nn.Module, call: str = _INSPECT) -> dict[str, Tensor]:
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
    missing = [name for name in wanted if name not in found and _continuous(wanted[name])]
    unexpected = [name for name in found if name not in wanted]
    odd = [name for name, value in found.items() if name in wanted and not _plain(value, wanted[name])]
    if odd:
        raise TangentError(
            f"{call}: {path}{where} holds sparse, quantized, complex or other unusual tensors in {_listed(odd)}; save "
            "dense ones, of the network's kind"
        )
    wrong = [
        f"{name} {tuple(found[name].shape)} for {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    if missing or unexpected or wrong:
        parts = (("missing", missing), ("unexpected", unexpected), ("of another shape:", wrong))
        problems = "; ".join(f"{what} {_listed(names)}" for what, names in parts if names)
        raise TangentError(
            f"{call}: {path}{where} does not fit the model: {problems}; give the factory that made this checkpoint"
        )
    state = {name: found.get(name, value).to(value.dtype) for name, value in wanted.items()}
    bad = [name for name, value in state.items() if _continuous(value) and not bool(torch.isfinite(value).all())]
    if bad:
        raise TangentError(
            f"{call}: {path} holds values that are not finite in {_listed(bad)}; use an earlier checkpoint"
        )
    return state


def _continuous(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _read(path: Path, device: torch.device, call: str) -> object:
    _check_file(path, "checkpoint", "check the name", call)
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
        raise TangentError(f"{call}: {path} cannot be read ({_told(error)}); save the checkpoint again") from error


def _state(content: object, path: Path, call: str) -> tuple[dict[str, Tensor], str]:
    """The state dict in a checkpoint, and a phrase naming the key it was under."""
    if isinstance(content, Mapping):
        if _is_state(content):
            return dict(content), ""
        for key in NESTED:
            inner = content.get(key)
            if _is_state(inner):
                return dict(inner), f", under {key!r},"
    held = f"keys {_listed(map(str, content))}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
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


def load_data(path: Path, call: str = _INSPECT) -> Data:
    """Samples of an `.npz` file: `x` (or x0, x1, … for several arguments, or other names for keywords), `y`, `classes`.

    Integers stay integers (token indices, labels); floating arrays keep their dtype. Raises TangentError if the file is
    missing or no npz, its inputs hold objects, text or values that are not finite, or its arrays differ in length.
    """
    _check_file(path, "data file", f"save one with numpy.savez({path.name!r}, x=…, y=…)", call)
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
        raise TangentError(f"{call}: {path} is not an npz file ({_told(error)}); save it with numpy.savez") from error
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
    words = None if names is None else tuple(_text(name) for name in names.tolist())
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
            f"{call}: {path} holds x beside {_listed(name for name in arrays if name != 'x')}; give x alone, x0, x1, … for "
            "several arguments, or every input under its argument's name"
        )
    return dict(arrays)


def fit_data(data: Data, model: nn.Module, call: str = _INSPECT) -> Data:
    """The data in the model's precision and on its device: floats are converted, integers become indices.

    Raises TangentError if x holds integers but the network has no embedding, so that they are probably pixels.
    """
    parameters = [p for p in model.parameters() if _continuous(p)]
    if not parameters:
        raise TangentError(f"{call}: the model has no parameters; give the factory of a network")
    dtype, device = parameters[0].dtype.to_real(), parameters[0].device
    embeds = any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in model.modules())
    if not embeds and not any(_continuous(t) for t in tensors(data.x)):
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
    return Data(x, None if data.y is None else fitted(data.y), data.classes)


def check_runs(model: nn.Module, data: Data, path: Path, call: str = _INSPECT) -> None:
    """Run the network on two samples. Raises TangentError if that fails, with their shapes and the network's message."""
    x = take(data.x, slice(0, 2))
    keywords = arguments(model, x)[1]

    def run(recorded: bool) -> None:
        given, named = arguments(model, take(x, None))
        model(*given, **named)

    def runs(loan: Loan) -> None:
        with torch.no_grad():
            recorded_if_needed(run)

    try:
        on_loan(model, runs)
    except TangentError:
        raise
    except Exception as error:
        shapes = [f"{tuple(t.shape[1:])} {str(t.dtype).removeprefix('torch.')}" for t in tensors(x)]
        named = [f"{name} {shape}" for name, shape in zip(keywords, shapes, strict=True)] if keywords else shapes
        raise TangentError(
            f"{call}: the network cannot take the samples of {path}, each {' and '.join(named)} "
            f"({_told(error)}); save them in the shape that it was trained on, with "
            "channels first, (1, 28, 28) for gray images, or write a factory whose network takes these"
        ) from error


def _check_file(path: Path, what: str, remedy: str, call: str) -> None:
    """Raise TangentError unless the path is that of a file."""
    if os.path.isdir(path):
        raise TangentError(f"{call}: {path} is a folder, not a {what}; give the path of a file")
    if not os.path.isfile(path):
        raise TangentError(f"{call}: there is no {what} {path}; {remedy}")


def _text(name: str | bytes) -> str:
    return name.decode(errors="backslashreplace") if isinstance(name, bytes) else name


def _told(error: BaseException) -> str:
    """An error of another program in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


def _listed(names: Iterable[str], most: int = 6) -> str:
    words = [name if name.isprintable() else ascii(name) for name in names]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")
