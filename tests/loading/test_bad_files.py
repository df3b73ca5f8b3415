"""Broken, foreign and malicious files: every reader takes them or refuses them in one sentence, within its bound."""

import gzip
import io
import json
import os
import random
import shutil
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import adaptive_tangents as at
from adaptive_tangents import loading
from adaptive_tangents.commands.report import PAGES
from adaptive_tangents.datasets.images import load_digits, load_images
from adaptive_tangents.reporting.report import build_report
from adaptive_tangents.runs.results import load_results, write_results
from adaptive_tangents.runs.units import StoredUnits
from adaptive_tangents.runtime import array_files
from stored import LIMIT, data, network

CONFIG = {"experiment": "demo", "seed": 1}


@dataclass(frozen=True)
class Kind:
    """A file or folder that is read: how to make one, the file in it that is spoiled, and what reads it."""

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    file: str = ""


def idx(array: np.ndarray) -> bytes:
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype("u1").tobytes()


def digits(folder: Path, pack: Callable[[bytes], bytes] = bytes, end: str = "") -> None:
    folder.mkdir()
    for stem in ("train", "t10k"):
        (folder / f"{stem}-images-idx3-ubyte{end}").write_bytes(pack(idx(np.arange(4 * 784).reshape(4, 28, 28) % 250)))
        (folder / f"{stem}-labels-idx1-ubyte{end}").write_bytes(pack(idx(np.arange(4))))


def colors(folder: Path) -> None:
    folder.mkdir()
    for name in (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"):
        (folder / name).write_bytes(bytes(3073))


def sketch(folder: Path) -> None:
    torch.manual_seed(0)
    at.sketching.save_sketch(folder, at.sketch_features(nn.Linear(40, 30), torch.randn(5, 40), at.Sketch(32)))


def run(folder: Path) -> None:
    units = StoredUnits(folder, CONFIG)
    units.put("one", {"x": torch.zeros(3)})
    units.settle()


def read_store(path: Path) -> None:
    store = at.open_kernel(path)
    store.verify()
    if store.complete:
        store.read()


def made_store(path: Path) -> None:
    at.kernel_to_store(network(), data(5), path, outputs="trace", tile=3, memory_limit=LIMIT)


def checkpoint(path: Path) -> object:
    return loading.load_checkpoint(path, network())


KINDS = {
    "an npz file": Kind(lambda p: np.savez(p, x=np.ones((4, 6)), y=np.arange(4)), loading.load_data),
    "a packed npz file": Kind(lambda p: np.savez_compressed(p, x=np.ones((4, 6))), loading.load_data),
    "a checkpoint .pt": Kind(lambda p: torch.save(network().state_dict(), p), checkpoint),
    "an old checkpoint .pt": Kind(
        lambda p: torch.save(network().state_dict(), p, _use_new_zipfile_serialization=False), checkpoint
    ),
    "a checkpoint .safetensors": Kind(lambda p: save_file(network().state_dict(), p), checkpoint),
    "the record of a store": Kind(made_store, read_store, "zarr.json"),
    "a tile of a store": Kind(made_store, read_store, "kernel/c/0/1"),
    "a part of a sketch": Kind(sketch, at.sketching.load_sketch, "sketch-00000.safetensors"),
    "results": Kind(
        lambda p: write_results({"experiment": "demo"}, {"x": np.ones(3)}, p), load_results, "results.json"
    ),
    "arrays": Kind(lambda p: write_results({"experiment": "demo"}, {"x": np.ones(3)}, p), load_results, "arrays.npz"),
    "settings": Kind(run, lambda p: StoredUnits(p, CONFIG, resume=True), "settings.json"),
    "a part of a run": Kind(run, lambda p: StoredUnits(p, CONFIG, resume=True), "checkpoints/one.safetensors"),
    "digits": Kind(digits, lambda p: load_digits("mnist", data_dir=p), "train-images-idx3-ubyte"),
    "packed digits": Kind(
        lambda p: digits(p, gzip.compress, ".gz"),
        lambda p: load_digits("mnist", data_dir=p),
        "t10k-labels-idx1-ubyte.gz",
    ),
    "images": Kind(colors, lambda p: load_images("cifar10", data_dir=p), "data_batch_3.bin"),
}
NAMES = {"a checkpoint .safetensors": "a.safetensors", "an npz file": "a.npz", "a packed npz file": "a.npz"}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    for number, (name, kind) in enumerate(KINDS.items()):
        (folder / str(number)).mkdir()
        kind.make(folder / str(number) / NAMES.get(name, "a"))
    return folder


def copied(originals: Path, kind: str, to: Path) -> tuple[Path, Path]:
    """A fresh copy of a kind, and the file in it that is to be spoiled."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(originals / str(list(KINDS).index(kind)), to)
    path = to / NAMES.get(kind, "a")
    return path, path / KINDS[kind].file if KINDS[kind].file else path


def taken_or_refused(read: Callable[[Path], object], path: Path) -> bool:
    """Whether it is read; if not, the refusal is one line of words."""
    words = ""
    try:
        read(path)
    except at.TangentError as error:
        words = str(error)
    assert "\n" not in words
    return not words


def damaged(content: bytes, draw: random.Random) -> bytes:
    first = draw.randrange(len(content))
    last = min(len(content), first + draw.choice((1, 4, 60)))
    return draw.choice(
        (
            content[:first],
            content[:first] + bytes([content[first] ^ 1 << draw.randrange(8)]) + content[first + 1 :],
            content[:first] + draw.randbytes(last - first) + content[last:],
            content[:first] + draw.randbytes(5) + content[first:],
            content[:first] + content[last:],
            content[:first] + b"\xff" * (last - first) + content[last:],
            content + draw.randbytes(9),
        )
    )


@every_kind
def test_damaged_files_are_read_or_refused_in_words(kind: str, originals: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    assert taken_or_refused(KINDS[kind].read, copied(originals, kind, tmp_path / "c")[0])
    refused = 0
    for _ in range(25):
        path, file = copied(originals, kind, tmp_path / "c")
        file.write_bytes(damaged(file.read_bytes(), draw))
        refused += not taken_or_refused(KINDS[kind].read, path)
    assert refused > 0


JUNK = {
    "nothing": b"", "zeros": bytes(100), "an open brace": b"{", "a list": b"[]", "null": b"null", "a number": b"3",
    "text": b'"x"', "an empty mapping": b"{}", "deep lists": b"[" * 200_000, "deep mappings": b'{"a":' * 50_000,
    "UTF-16": b"\xff\xfe", "a gzip stub": b"\x1f\x8b", "a zip stub": b"PK\x03\x04", "an empty zip": b"PK\x05\x06" + bytes(18),
    "an npy stub": b"\x93NUMPY", "a pickle": b"\x80\x04N.", "noise": random.Random(1).randbytes(300),
}  # fmt: skip


@every_kind
def test_other_contents_are_refused_in_words(kind: str, originals: Path, tmp_path: Path) -> None:
    path, file = copied(originals, kind, tmp_path / "c")
    for what, content in JUNK.items():
        file.write_bytes(content)
        taken = taken_or_refused(KINDS[kind].read, path)
        assert taken == ((kind, what) == ("arrays", "an empty zip")), what


def place_folder(file: Path) -> None:
    file.mkdir()


def place_full_folder(file: Path) -> None:
    file.mkdir()
    (file / "thesis.tex").write_text("years of work")


@every_kind
@pytest.mark.parametrize(
    "place",
    [
        place_folder,
        place_full_folder,
        lambda f: f.symlink_to(f),
        lambda f: f.symlink_to("nowhere"),
        os.mkfifo,
        lambda f: None,
    ],
    ids=["folder", "full folder", "circle", "dangling", "pipe", "gone"],
)
def test_what_is_no_file_is_refused_in_words(
    kind: str, place: Callable[[Path], object], originals: Path, tmp_path: Path
) -> None:
    path, file = copied(originals, kind, tmp_path / "c")
    file.unlink() if file.is_file() else shutil.rmtree(file)
    place(file)
    gone = kind in ("settings", "a part of a run") and not os.path.lexists(file)
    assert taken_or_refused(KINDS[kind].read, path) == gone


@every_kind
def test_paths_that_cannot_be_are_refused_in_words(kind: str, originals: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / ("n" * 300), tmp_path / "file" / "below"):
        if KINDS[kind].read.__name__ == "<lambda>" and kind in ("settings", "a part of a run"):
            continue  # these are made where there are none
        assert not taken_or_refused(KINDS[kind].read, path)


ODD = (
    "[red]x[red]",
    "[]",
    "a\nb",
    "-x",
    "--help",
    "ü 核",
    "$x^$",
    "\udcff",
    "{{x}}",
    "%s",
    "*?[",
    "\x1b[31m",
    "n" * 200,
)


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_files_have_any_name(name: str, tmp_path: Path) -> None:
    for kind in ("an npz file", "a checkpoint .pt", "a checkpoint .safetensors"):
        end = {"an npz file": ".npz", "a checkpoint .safetensors": ".safetensors"}.get(kind, ".pt")
        KINDS[kind].make(tmp_path / f"a{end}")
        os.rename(tmp_path / f"a{end}", tmp_path / f"{name}{end}")
        # safetensors opens only paths that are text
        assert taken_or_refused(KINDS[kind].read, tmp_path / f"{name}{end}") or (name, end) == (
            "\udcff",
            ".safetensors",
        )
    for kind in ("a part of a sketch", "results", "a part of a run"):
        KINDS[kind].make(tmp_path / name / kind)
        assert taken_or_refused(KINDS[kind].read, tmp_path / name / kind) or name == "\udcff"


# what files may unpack to


@pytest.fixture
def at_most() -> Iterator[Callable[[int], None]]:
    tracemalloc.start()  # NumPy and zlib count what they allocate

    def check(most: int) -> None:
        assert tracemalloc.get_traced_memory()[1] < most

    yield check
    tracemalloc.stop()


def bomb(member: str, head: bytes, size: int = 50_000_000) -> bytes:
    """A zip file of some 50 kB with a member of this many zeros."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(member, "w", force_zip64=True) as out,
    ):
        out.write(head)
        for _ in range(size // 10_000_000):
            out.write(bytes(10_000_000))
    return file.getvalue()


@pytest.fixture(scope="module")
def packed() -> bytes:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (50_000_000,)})
    return bomb("x.npy", head.getvalue())


def test_npz_files_and_checkpoints_unpack_to_a_bounded_size(
    packed: bytes, tmp_path: Path, at_most: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_files, "UNPACKED", 20_000_000)
    for name, read in (("a.npz", loading.load_data), ("a.pt", checkpoint)):
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(
            at.TangentError, match=r"a\.(npz|pt) unpacks to 50 MB, and at most 20 MB are read from a packed file"
        ):
            read(tmp_path / name)
    write_results({"experiment": "demo"}, {}, tmp_path / "run")
    (tmp_path / "run" / "arrays.npz").write_bytes(packed)
    with pytest.raises(at.TangentError, match=r"^report: .*arrays\.npz unpacks to 50 MB, .*; run the experiment again"):
        load_results(tmp_path / "run")
    at_most(5_000_000)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (struct.pack(">BBBBIII", 0, 0, 8, 3, 4, 28, 28), "has trailing bytes: its header says 3152 bytes"),
        (
            struct.pack(">BBBBIII", 0, 0, 8, 3, 2**31, 28, 28),
            "unpacks to 1.68 TB, and at most 1 GB are read from a packed",
        ),
        (b"", "begins with 0x00000000, not an IDX magic number|has the IDX dtype code 0x00"),
    ],
    ids=["too long", "as long as it says", "zeros"],
)
def test_packed_digits_unpack_to_a_bounded_size(
    head: bytes, words: str, tmp_path: Path, at_most: Callable[[int], None]
) -> None:
    digits(tmp_path / "d", gzip.compress, ".gz")
    file = io.BytesIO()
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as out:
        out.write(head)
        for _ in range(50):
            out.write(bytes(1_000_000))
    (tmp_path / "d" / "train-images-idx3-ubyte.gz").write_bytes(file.getvalue())
    with pytest.raises(at.TangentError, match=words):
        load_digits("mnist", data_dir=tmp_path / "d")
    at_most(5_000_000)


def test_the_bound_is_1_gb_or_100_times_the_packed_size() -> None:
    assert [array_files.largest_unpacked(size) for size in (0, 10**7, 10**9)] == [10**9, 10**9, 10**11]


# members and tensors of other kinds


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def with_shape(shape: bytes) -> bytes:
    content = npy(np.ones((4, 6)))
    return content[:10] + content[10:].replace(b"(4, 6), }" + b" " * (len(shape) - 6), shape + b", }", 1)


MEMBERS = {
    "text": ("x.npy", b"no array"), "nothing": ("x.npy", b""), "an empty readme": ("README", b""),
    "an array without its end": ("x", npy(np.ones(4))[:40]), "objects": ("x.npy", npy(np.array([{}, 1]), allow_pickle=True)),
    "named fields": ("x.npy", npy(np.zeros(4, "i4,f4"))), "complex numbers": ("x.npy", npy(np.ones(4) + 1j)),
    "dates": ("x.npy", npy(np.zeros(4, "M8[s]"))), "long doubles": ("x.npy", npy(np.zeros(4, np.longdouble))),
    "large integers": ("x.npy", npy(np.full(4, 2**64 - 1, np.uint64))),
    "more than it holds": ("x.npy", with_shape(b"(9, 9999999)")),
    "a negative shape": ("x.npy", with_shape(b"(-4, 6)")), "a shape in words": ("x.npy", with_shape(b"('four',)")),
    "an endless shape": ("x.npy", with_shape(b"(9**9**9,)")),
}  # fmt: skip


@pytest.mark.parametrize("what", MEMBERS)
def test_members_that_are_no_arrays_of_numbers_are_refused(what: str, tmp_path: Path) -> None:
    name, content = MEMBERS[what]
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr(name, content)
    with pytest.raises(at.TangentError, match=r"^inspect: .*a\.npz.*; ") as refused:
        loading.load_data(tmp_path / "a.npz")
    assert "\n" not in str(refused.value)


def test_class_names_in_bytes_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((2, 3)), classes=np.array([b"cat", b"d\xf6g"]))
    assert loading.load_data(tmp_path / "a.npz").classes == ("cat", "d\\xf6g")


TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "sparse": lambda state: {k: v.to_sparse() for k, v in state.items()},
    "complex": lambda state: {k: v.to(torch.complex64) for k, v in state.items()},
    "nested": lambda state: {k: torch.nested.nested_tensor([v.flatten()]) for k, v in state.items()},
    "quantized": lambda state: {k: torch.quantize_per_tensor(v.float(), 0.1, 0, torch.qint8) for k, v in state.items()},
    "numbered": lambda state: dict(enumerate(state.values())),
    "nothing": lambda state: None,
    "a network": lambda state: network(),
}


@pytest.mark.filterwarnings("ignore")  # torch warns of nested and quantized tensors
@pytest.mark.parametrize("what", TENSORS)
def test_tensors_of_other_kinds_are_refused(what: str, tmp_path: Path) -> None:
    torch.save(TENSORS[what](network().state_dict()), tmp_path / "a.pt")
    with pytest.raises(at.TangentError, match=r"^inspect: .*a\.pt.*; "):
        checkpoint(tmp_path / "a.pt")


def test_a_factory_that_ends_the_process_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("import sys\ndef make(): sys.exit()\n")
    with pytest.raises(at.TangentError, match=r"raised SystemExit: no reason given; it is called without arguments"):
        loading.load_model(f"{tmp_path}/f.py:make")
    (tmp_path / "f.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(at.TangentError, match=r"importing .*f\.py failed with SystemExit: 0; run"):
        loading.load_model(f"{tmp_path}/f.py:make")


# records edited by hand


def edited(path: Path, change: dict[str, Any]) -> None:
    """Change the record of a part of a sketch."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"]["head"] = json.dumps(json.loads(header["__metadata__"]["head"]) | change)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


@pytest.mark.parametrize(
    "change",
    [
        {"samples": 4},
        {"outputs": 1},
        {"fingerprint": "x"},
        {"slots": {}},
        {"shapes": None},
        {"sketch": 3},
        {"before": -1},
    ],
    ids=str,
)
def test_a_sketch_whose_record_was_edited_is_refused(change: dict[str, Any], originals: Path, tmp_path: Path) -> None:
    path, file = copied(originals, "a part of a sketch", tmp_path / "c")
    edited(file, change)
    with pytest.raises(
        at.TangentError, match=r"^load_sketch: the record of .* is not as it was written; put back a copy"
    ):
        at.sketching.load_sketch(path)


def test_parts_of_different_sketches_are_never_joined(originals: Path, tmp_path: Path) -> None:
    path, _ = copied(originals, "a part of a sketch", tmp_path / "c")
    model = nn.Linear(40, 30)
    for folder, parts in (("other", (5, 3)),):
        at.sketching.save_sketch(
            tmp_path / folder, at.sketch_features(model, torch.randn(parts[0], 40), at.Sketch(32, seed=9))
        )
        at.sketching.append_sketch(
            tmp_path / folder, at.sketch_features(model, torch.randn(parts[1], 40), at.Sketch(32, seed=9))
        )
    shutil.copy(tmp_path / "other" / "sketch-00001.safetensors", path)
    with pytest.raises(
        at.TangentError, match=r"sketch-00001\.safetensors belongs to another sketch than the parts before"
    ):
        at.sketching.load_sketch(path)


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [None], True])
@pytest.mark.parametrize("key", ["claims", "config", "metrics", "versions", "runs", "experiment"])
def test_results_edited_by_hand_are_refused_in_words(key: str, value: object, tmp_path: Path) -> None:
    claim = {
        "claim": "c",
        "holds": True,
        "verdict": "holds",
        "evidence": "e",
        "refuted_by": "r",
        "published": "",
        "why": "",
    }
    results = {
        "experiment": "all", "command": "x", "versions": {"adaptive_tangents": "0"},
        "runs": {"penalties": {"claims": {"one": claim}, "wall_seconds": {"total": 1.0}, "config": {}, "command": "x",
                               "versions": {}, "device": "cpu", "threads": 1, "cores": 1}},
    }  # fmt: skip
    write_results(results, {}, tmp_path)
    text = json.loads((tmp_path / "results.json").read_text())
    target = text["runs"]["penalties"] if key in ("claims", "config", "versions") else text
    target[key] = value
    (tmp_path / "results.json").write_text(json.dumps(text))
    taken_or_refused(lambda path: build_report(path, PAGES), tmp_path)
