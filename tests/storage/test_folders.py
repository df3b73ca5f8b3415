"""What is not the library's own in the folder of a store stays as it is; a damaged store is refused and keeps its tiles."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

import adaptive_tangents as at
from adaptive_tangents.runtime.tensor_files import draft_beside
from adaptive_tangents.storage import locks
from adaptive_tangents.storage.folders import PART
from stored import LIMIT, data, files, network

pytestmark = pytest.mark.xdist_group("folders of stores")

OUTPUTS = ("full", "trace", "diagonal")


def store(path: Path, **options: Any) -> at.storage.KernelStore:
    given = {"outputs": "trace", "tile": 4, "memory_limit": LIMIT} | options
    return at.kernel_to_store(network(), given.pop("x", data()), path, **given)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for outputs in OUTPUTS:
        store(folder / outputs, outputs=outputs)
    store(folder / "blocks", by_block=True)
    return folder


# folders that hold something else


def old_lock(path: Path) -> None:
    """A lock of a process that is dead, as a killed writer leaves it."""
    with locks.writer_lock("call", path):
        text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | {"process": 2**22 + 1}))


FOREIGN: dict[str, Callable[[Path], object]] = {
    "a text": lambda f: (f / "thesis.tex").write_text("years of work"),
    "a folder": lambda f: (f / "data").mkdir(),
    "another's lock": lambda f: (f / ".lock").write_text("poetry"),
    "another's lock in JSON": lambda f: (f / ".lock").write_text('{"version": 4}'),
    "an empty lock": lambda f: (f / ".lock").touch(),
    "a lock that is a folder": lambda f: (f / ".lock").mkdir(),
    "a folder called kernel": lambda f: ((f / "kernel").mkdir(), (f / "kernel" / "main.c").write_text("int main;")),
    "a folder called blocks": lambda f: ((f / "blocks" / "c").mkdir(parents=True), (f / "blocks" / "c" / "0").touch()),
    "another's group": lambda f: zarr.open_group(f, mode="w"),
    "another's array": lambda f: zarr.create_array(f / "kernel", shape=(2,), dtype="f4")[:],
    "a record that is no JSON": lambda f: (f / "zarr.json").write_text("{"),
    "a record nested too deep": lambda f: (f / "zarr.json").write_text("[" * 100_000),
    "a link": lambda f: (f / "kernel").symlink_to(f.parent),
    "a name like a draft": lambda f: (f / ".K.adaptive-tangents-notes.part").write_text("notes"),
    "another's claims": lambda f: ((f / ".claims").mkdir(), (f / ".claims" / "1-1").write_text("a patent")),
}


@pytest.mark.parametrize("lock", [False, True], ids=["", "with a dead writer's lock"])
@pytest.mark.parametrize("what", FOREIGN)
def test_a_folder_with_anything_else_is_refused_and_left_as_it_is(what: str, lock: bool, tmp_path: Path) -> None:
    path = tmp_path / "K.zarr"
    path.mkdir()
    if lock and ".lock" not in what and "lock" not in what:
        old_lock(path / ".lock")
    FOREIGN[what](path)
    before = [(str(p), p.is_dir() or p.read_bytes()) for p in sorted(path.rglob("*"))]
    for resume in (False, True):
        with pytest.raises(at.TangentError, match=r"^kernel_to_store: .*K\.zarr"):
            store(path, resume=resume)
        assert [(str(p), p.is_dir() or p.read_bytes()) for p in sorted(path.rglob("*"))] == before


def test_what_a_user_puts_into_a_store_stays_there_when_it_is_resumed(made: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(made / "trace", tmp_path / "K.zarr"))
    (path / "kernel" / "c" / "0" / "1").unlink()
    (path / ".claims").mkdir()
    kept = ["notes.txt", "data.partial", "kernel/old.partial", ".claims/mine", ".claims/0-0", "kernel/c/0/1.bak"]
    for name in kept:
        (path / name).write_text("mine")
    assert store(path, resume=True).complete
    assert all((path / name).read_text() == "mine" for name in kept)
    assert files(path) == files(made / "trace") | dict.fromkeys(kept, b"mine")


def test_another_programs_lock_in_a_store_is_refused_and_kept(made: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(made / "trace", tmp_path / "K.zarr"))
    (path / ".lock").write_text("someone else's")
    with pytest.raises(
        at.TangentError, match=r"\.lock is not a lock that a writer of stores made, so it is left as it is; "
    ):
        store(path, resume=True)
    assert (path / ".lock").read_text() == "someone else's"


def test_a_lock_that_another_took_over_is_not_removed_at_the_end(tmp_path: Path) -> None:
    other = json.dumps({"host": "elsewhere", "process": 1})
    with locks.writer_lock("call", tmp_path / "lock"):
        (tmp_path / "lock").write_text(other)
    assert (tmp_path / "lock").read_text() == other


def test_what_a_writer_leaves_that_was_killed_at_once_does_not_stand_in_the_way(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "K.zarr"
    (path / "blocks" / "0").mkdir(parents=True)
    part = json.dumps(json.loads((made / "blocks" / "blocks" / "0" / "zarr.json").read_text()))
    for folder in (path / "blocks", path / "blocks" / "0"):
        (folder / "zarr.json").write_text(part)
    old_lock(path / ".lock")
    draft_beside(path / "x").write_bytes(b"half")
    assert files(store(path).path) == files(made / "trace")


# damaged stores


def changed(path: Path, **changes: Any) -> None:
    content = json.loads((path / "zarr.json").read_text())
    content["attributes"]["adaptive_tangents"] |= changes
    (path / "zarr.json").write_text(json.dumps(content))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: (p / "zarr.json").write_text(""),
    "cut": lambda p: (p / "zarr.json").write_bytes((p / "zarr.json").read_bytes()[:-30]),
    "not UTF-8": lambda p: (p / "zarr.json").write_bytes(b"\xff\xfe\x00"),
    "a list": lambda p: (p / "zarr.json").write_text("[1]"),
    "attributes a list": lambda p: (p / "zarr.json").write_text('{"attributes": [1]}'),
    "nested": lambda p: (p / "zarr.json").write_text("[" * 100_000),
    "missing": lambda p: (p / "zarr.json").unlink(),
    "a folder": lambda p: ((p / "zarr.json").unlink(), (p / "zarr.json").mkdir()),
} | {
    f"{key} {value!r}": lambda p, key=key, value=value: changed(p, **{key: value})
    for key, values in {
        "n": (10, 0, -1, "11", None, 10**12, True, 11.0, []), "tile": (3, 0, 10**9, {}), "c": (2, "x"), "m": (12, None),
        "outputs": ("diagonal", "traces", None, [], {}), "dtype": ("float32", "float61", "tensor", None, []),
        "symmetric": (False, "yes", None), "blocks": (["0"], None, "abc", [1], {"a": 1}), "complete": ("no", None, 1),
        "parameters": ("another",), "probe": (None, ["x"], {}), "format": (None, "2", [2], {}, True, -1),
        "checksum": ("", None, []),
    }.items()
    for value in values
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_edited_record_is_refused_in_words_and_the_tiles_are_kept(
    damage: str, made: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(made / "trace", tmp_path / "K.zarr"))
    DAMAGES[damage](path)
    before = files(path)
    for call in (at.open_kernel, store, lambda path: store(path, resume=True)):
        with pytest.raises(
            at.TangentError, match=r"^(open_kernel|kernel_to_store): .*; .*(copy|again|path)"
        ) as refused:
            call(path)
        assert "\n" not in str(refused.value)
    assert files(path) == before


@pytest.mark.parametrize("outputs", [*OUTPUTS, "blocks"])
def test_whole_chunks_in_each_others_place_are_noticed(outputs: str, made: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(made / outputs, tmp_path / "K.zarr"))
    opened, by_block = at.open_kernel(path), outputs == "blocks"
    name, other = opened.blocks if by_block else ("", "")
    pairs = [((0, 0), (1, 1)), ((0, 1), (1, 2)), ((0, 0), (0, 1))]
    for (one, two), (first, second) in itertools.product(pairs, {(name, name), (name, other)}):
        left, right = opened._file(one, first), opened._file(two, second)
        contents = left.read_bytes(), right.read_bytes()
        left.write_bytes(contents[1])
        right.write_bytes(contents[0])
        assert opened.verify() == sorted({one, two})
        with pytest.raises(
            at.TangentError, match=r"^read: the tile of rows .* is damaged \(it is another tile's chunk\); make"
        ):
            opened.read(block=first or None)
        left.write_bytes(contents[0])
        right.write_bytes(contents[1])
    assert opened.verify() == []


def test_a_chunk_of_another_store_is_noticed_and_made_again(made: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(made / "trace", tmp_path / "K.zarr"))
    other = store(tmp_path / "other.zarr", x=data(seed=3))
    shutil.copy(other.path / "kernel" / "c" / "0" / "1", path / "kernel" / "c" / "0" / "1")
    assert at.open_kernel(path).verify() == [(0, 1)]
    assert files(store(path, resume=True).path) == files(made / "trace")


def test_no_chunk_unpacks_to_more_than_a_tile(made: Path, tmp_path: Path) -> None:
    from numcodecs import zstd

    from adaptive_tangents.storage import chunks

    path = Path(shutil.copytree(made / "trace", tmp_path / "K.zarr"))
    opened = at.open_kernel(path)
    mark = opened._seal((0, 0), "")
    assert mark is not None
    body = zstd.compress(bytes(10**6), 1) + chunks._SEAL.pack(chunks._SKIPPED, 16, mark)
    opened._file((0, 0), "").write_bytes(body + chunks._CHECKSUM.pack(chunks._crc(body)))
    with pytest.raises(at.TangentError, match=r"is damaged \(it holds 1000000 bytes and a tile has 128\)"):
        opened.read()


# stores of format 1


def of_format_1(path: Path, outputs: str, changes: dict[str, Any] | None = None) -> tuple[Path, torch.Tensor]:
    """A store as version 0.1.0 wrote it: by Zarr alone, without checksum of the record and without marks of the tiles."""
    new = store(path.with_name("new.zarr"), outputs=outputs)
    meta = {key: value for key, value in new.meta.items() if key != "checksum"} | {"format": 1} | (changes or {})
    whole = new.read()
    array = zarr.create_array(
        path / "kernel", shape=whole.shape, chunks=new._chunk, dtype="float64", fill_value=float("nan"),
        compressors=[ZstdCodec(level=1), Crc32cCodec()], config={"write_empty_chunks": True},
    )  # fmt: skip
    for rows, columns, piece in new.tiles():
        array[(rows, slice(None), columns) if outputs == "full" else (rows, columns)] = piece.numpy()
    zarr.open_group(path, mode="a").attrs.put({"adaptive_tangents": meta})
    return path, whole


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_a_store_of_format_1_is_read_as_before(outputs: str, tmp_path: Path) -> None:
    path, whole = of_format_1(tmp_path / "K.zarr", outputs)
    opened = at.open_kernel(path)
    assert torch.equal(opened.read(), whole)
    assert opened.verify() == []
    assert store(path, outputs=outputs, resume=True).complete
    chunk = opened._file((1, 1), "")
    content = chunk.read_bytes()
    chunk.write_bytes(content[:9] + bytes([content[9] ^ 1]) + content[10:])
    assert opened.verify() == [(1, 1)]
    before = files(path)
    with pytest.raises(
        at.TangentError, match=r"is of format 1, which this version reads and does not continue; make the "
    ):
        store(path, outputs=outputs, resume=True)
    assert files(path) == before


@pytest.mark.parametrize(
    "change", [{"n": 10, "m": 10}, {"tile": 3}, {"c": 2}, {"outputs": "trace"}, {"dtype": "float32"}]
)
def test_an_edited_record_of_format_1_is_refused_where_it_contradicts_the_arrays(
    change: dict[str, Any], tmp_path: Path
) -> None:
    path, _ = of_format_1(tmp_path / "K.zarr", "full", change)
    with pytest.raises(
        at.TangentError, match=r"^open_kernel: the record .* is not as it was written \(its sizes do not fit"
    ):
        at.open_kernel(path)


def test_any_zarr_reader_reads_the_marked_tiles(made: Path) -> None:
    for outputs in OUTPUTS:
        opened = at.open_kernel(made / outputs)
        array = zarr.open_group(made / outputs, mode="r")["kernel"]
        assert array.attrs.asdict() == PART
        for rows, columns, piece in opened.tiles():
            where = (rows, slice(None), columns) if outputs == "full" else (rows, columns)
            assert np.array_equal(array[where], piece.numpy())


@pytest.mark.parametrize(
    "name", ["K[1].zarr", "-K.zarr", "K\nL.zarr", "ñ 核.zarr", "\udcff.zarr", "*?.zarr", "[red]K[red]"]
)
def test_stores_have_any_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    assert store(path).complete
    assert at.open_kernel(path).verify() == []
    assert sorted(os.listdir(tmp_path)) == [name]


@pytest.mark.parametrize(
    "path", ["n" * 300, "a\0b", "file/K.zarr", "file"], ids=["too long", "null", "under a file", "a file"]
)
def test_impossible_paths_are_refused_in_words(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for call in (at.open_kernel, store):
        with pytest.raises(at.TangentError, match=r"^(open_kernel|kernel_to_store): .*; .*(path|make|copy)"):
            call(tmp_path / path)
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]
