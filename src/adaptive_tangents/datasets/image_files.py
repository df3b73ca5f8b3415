"""Read and check image files: MNIST's IDX files and CIFAR-10's binary version, with as many images as they hold."""

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.runtime.array_files import UNPACKED
from adaptive_tangents.runtime.memory import format_bytes

DIGIT_REMEDIES = 'give data_dir, a folder with the four IDX files, or use "mnist5k", which needs no network'
_IDX_STEMS = ("train-images", "train-labels", "t10k-images", "t10k-labels")
_IDX_FOLDERS = (".", "MNIST/raw", "MNIST", "mnist/raw", "mnist", "raw")
_UNSIGNED_BYTE = 0x08
_CIFAR_TRAIN, _CIFAR_TEST = tuple(f"data_batch_{k}.bin" for k in range(1, 6)), ("test_batch.bin",)
_CIFAR_FOLDERS = ("cifar-10-batches-bin", ".")
_CIFAR_RECORD = 1 + 3 * 32 * 32
# Images and labels. The counts are left free: two pairs in one signature may differ.
Pair = tuple[UInt8[Tensor, "_n *_pixels"], Int64[Tensor, " _n"]]


def read_digits(data_dir: Path) -> tuple[Pair, Pair]:
    """Train and test digits of the four IDX files in a folder or below it, as many as they hold.

    Raises TangentError when a file is missing, malformed or inconsistent with another.
    """
    train_images, train_labels, test_images, test_labels = _find_idx_files(data_dir)
    return _read_pair(train_images, train_labels), _read_pair(test_images, test_labels)


def read_cifar10(data_dir: Path) -> tuple[Pair, Pair]:
    """Train and test images of CIFAR-10's binary version in a folder, as many as its files hold; uint8 (n, 3, 32, 32).

    A record is a label and 3,072 pixels: red, green, blue, each row by row.
    Raises TangentError when a file is missing, ends within a record, or has a label above 9.
    Source: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009, and its data set's page.
    """
    folder = find_cifar10(data_dir)
    if folder is None:
        raise TangentError(
            f"load_images: no CIFAR-10 files such as {_CIFAR_TRAIN[0]} in {str(data_dir)!r} or its {_CIFAR_FOLDERS[0]}; "
            "give data_dir, a folder with the binary version"
        )
    missing = [name for name in (*_CIFAR_TRAIN, *_CIFAR_TEST) if not os.path.isfile(folder / name)]
    if missing:
        raise TangentError(
            f"load_images: {str(folder)!r} holds some of the CIFAR-10 files but not {', '.join(missing)}; "
            f"add {'it' if len(missing) == 1 else 'them'}"
        )
    train, test = ([_read_records(folder / name) for name in names] for names in (_CIFAR_TRAIN, _CIFAR_TEST))
    return _joined(train), _joined(test)


def find_cifar10(data_dir: Path) -> Path | None:
    """The folder with any of CIFAR-10's files, if there is one."""
    for below in _CIFAR_FOLDERS:
        if any(os.path.isfile(data_dir / below / name) for name in (*_CIFAR_TRAIN, *_CIFAR_TEST)):
            return data_dir / below
    return None


def _read_records(path: Path) -> Pair:
    """The images of one file, and their labels."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TangentError(f"load_images: {path.name} cannot be read ({error.strerror}); check the file") from error
    if len(content) == 0 or len(content) % _CIFAR_RECORD:
        raise TangentError(
            f"load_images: {path.name} has {len(content)} bytes, not a whole number of records of {_CIFAR_RECORD}; "
            f"{_again(path)}"
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, _CIFAR_RECORD)
    wrong = np.flatnonzero(records[:, 0] > 9)
    if len(wrong):
        raise TangentError(
            f"load_images: label {wrong[0]} of {path.name} is {records[wrong[0], 0]}, not a class from 0 to 9; {_again(path)}"
        )
    images = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy())
    return images, torch.from_numpy(records[:, 0].astype(np.int64))


def _joined(pairs: list[Pair]) -> Pair:
    return torch.cat([images for images, _ in pairs]), torch.cat([labels for _, labels in pairs])


def _find_idx_files(data_dir: Path) -> list[Path]:
    """The four files, all from the first folder that has any; a plain file is preferred to its gzipped twin."""
    if not os.path.isdir(data_dir):
        raise TangentError(f"load_digits: data_dir {str(data_dir)!r} is not a folder; {DIGIT_REMEDIES}")
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
        f"{', '.join(_IDX_FOLDERS[1:])}; {DIGIT_REMEDIES}"
    )


def _find_idx_file(folder: Path, stem: str) -> Path | None:
    """One file under any of its usual names; None if there is none."""
    dimensions = 3 if stem.endswith("images") else 1
    names = (f"{stem}{sep}idx{dimensions}-ubyte{end}" for end in ("", ".gz") for sep in ("-", "."))
    return next((folder / name for name in names if os.path.isfile(folder / name)), None)


def _read_pair(image_file: Path, label_file: Path) -> tuple[UInt8[Tensor, "n 28 28"], Int64[Tensor, " n"]]:
    """Images and labels, with counts checked against each other."""
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
    header = 4 + 4 * dimensions
    content, packed = _read_bytes(path, header)
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
    if len(content) < header:
        raise TangentError(f"load_digits: {path.name} ends inside its header; {_again(path)}")
    shape = tuple(int(size) for size in np.frombuffer(content, dtype=">u4", count=dimensions, offset=4))
    expected = header + math.prod(shape)
    if packed and expected > UNPACKED:
        raise TangentError(
            f"load_digits: {path.name} unpacks to {format_bytes(expected)}, and at most {format_bytes(UNPACKED)} are read "
            "from a packed file; unpack it with gunzip"
        )
    if packed:
        content, _ = _read_bytes(path, expected + 1)
    if len(content) != expected:
        problem = "is cut short" if len(content) < expected else "has trailing bytes"
        raise TangentError(
            f"load_digits: {path.name} {problem}: its header says {expected} bytes, the content has {len(content)}"
            f"{' or more' if packed and len(content) > expected else ''}; {_again(path)}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _read_bytes(path: Path, most: int) -> tuple[bytes, bool]:
    """A file's content, and whether it is gzipped, whatever its name: then at most so many unpacked bytes of it."""
    try:
        with path.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                file.seek(0)
                return gzip.GzipFile(fileobj=file).read(most), True
        return path.read_bytes(), False
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TangentError(
            f"load_digits: {path.name} is not a whole gzip file ({type(error).__name__}: {error}); {_again(path)}"
        ) from error
    except OSError as error:
        raise TangentError(f"load_digits: {path.name} cannot be read ({error.strerror}); check the file") from error


def _again(path: Path) -> str:
    """The remedy for a damaged file."""
    return f"download {path.name} again"
