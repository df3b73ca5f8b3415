"""A stored kernel equals the kernel, tile by tile, and records its sources and whether it is complete."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

import adaptive_tangents as at
import reference
from prepared import OUTPUTS, prepare, slots
from registry import by_name
from stored import LIMIT, data, files, network


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("name", ["Tanh", "attention"])
def test_a_stored_kernel_is_that_of_the_dense_features(name: str, outputs: str, tmp_path: Path) -> None:
    p = prepare(by_name[name])
    for x2, phi2 in ((None, p.phi), (p.other_x, p.other_phi)):
        store = at.kernel_to_store(p.model, p.x, tmp_path / f"{x2 is None}.zarr", x2=x2, outputs=outputs, tile=2)
        assert p.agrees(store.read(), reference.kernel(p.phi, phi2, outputs))
        assert (store.n, store.m, store.c, store.outputs) == (p.feats.n, len(phi2), p.feats.c, outputs)
        assert (store.symmetric, store.complete, store.missing(), store.verify()) == (x2 is None, True, [], [])
        whole, seen = store.read(), torch.zeros(store.n, store.m)
        for rows, columns, piece in store.tiles():
            assert torch.equal(piece, whole[(rows, slice(None), columns) if outputs == "full" else (rows, columns)])
            seen[rows, columns] += 1
            if x2 is None and rows != columns:
                seen[columns, rows] += 1
        assert bool((seen == 1).all())


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_stored_kernels_by_block_are_those_of_their_parameters(outputs: str, tmp_path: Path) -> None:
    p = prepare(by_name["two layers with one weight"])
    store = at.kernel_to_store(p.model, p.x, tmp_path / "K.zarr", outputs=outputs, by_block=True, tile=2)
    assert store.blocks == tuple(p.feats.blocks)
    for name in store.blocks:
        part = reference.restricted(p.phi, p.feats.parameters, slots(p.feats.blocks[name]))
        assert p.agrees(store.read(block=name), reference.kernel(part, part, outputs))
        assert sum(piece.numel() for *_, piece in store.tiles(name)) > 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> at.storage.KernelStore:
    path = tmp_path_factory.mktemp("made") / "K.zarr"
    return at.kernel_to_store(network(), data(), path, outputs="full", tile=4, memory_limit=LIMIT)


@pytest.fixture
def copied(made: at.storage.KernelStore, tmp_path: Path) -> at.storage.KernelStore:
    shutil.copytree(made.path, tmp_path / "K.zarr")
    return at.open_kernel(tmp_path / "K.zarr")


def chunk(store: at.storage.KernelStore, i: int, j: int) -> Path:
    return store.path / "kernel" / "c" / str(i) / "0" / str(j) / "0"


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (slice(None), slice(3, 5)),
        (slice(1, 9, 3), slice(8, 2)),
        (torch.tensor([10, 0, 7, 7]), None),
        (torch.tensor([-1]), torch.tensor([3, 9, 2])),
        (slice(0, 0), None),
    ],
    ids=str,
)
def test_any_part_that_is_read_is_that_part_of_the_whole(
    made: at.storage.KernelStore, rows: object, columns: object
) -> None:
    whole = at.tangent_kernel(network(), data(), tile=4)
    expected = whole[slice(None) if rows is None else rows][:, :, slice(None) if columns is None else columns]
    found = made.read(rows, columns)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_what_is_read_is_exactly_symmetric_and_only_the_triangle_is_stored(made: at.storage.KernelStore) -> None:
    whole = made.read()
    assert torch.equal(whole, whole.permute(2, 3, 0, 1))
    assert sum(part.isdigit() for file in files(made.path) for part in file.split("/")[-1:]) == 3 * 4 // 2
    assert made.places == ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))


def test_a_store_is_plain_zarr_that_says_what_it_was_made_from(made: at.storage.KernelStore) -> None:
    group = zarr.open_group(made.path, mode="r")
    about = group.attrs["adaptive_tangents"]
    assert (about["version"], about["format"], about["outputs"]) == (at.__version__, 2, "full")
    assert (about["dtype"], about["n"], about["m"], about["c"], about["tile"]) == ("float64", 11, 11, 3, 4)
    assert (about["transforms"], about["sketch"], about["complete"]) == (None, None, True)
    assert len({about["parameters"], about["data"]}) == 2
    array = group["kernel"]
    assert array.chunks == (4, 3, 4, 3)
    assert np.array_equal(array[:4, :, 8:], made.read(slice(0, 4), slice(8, 11)).numpy())
    assert {path.name for path in made.path.iterdir()} == {"zarr.json", "kernel"}


def test_a_tile_of_zeros_is_a_tile(tmp_path: Path) -> None:
    model = network()
    torch.nn.init.zeros_(model[-1].weight)
    store = at.kernel_to_store(model, data(), tmp_path / "K.zarr", outputs="trace", by_block=True, tile=4)
    assert store.missing() == []
    assert float(store.read(block="0").abs().max()) == 0


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_one_sample_is_a_kernel_too(outputs: str, tmp_path: Path) -> None:
    model, x = network(), data(1)
    store = at.kernel_to_store(model, x, tmp_path / "K.zarr", outputs=outputs)
    assert store.tile == 1
    torch.testing.assert_close(store.read(), at.tangent_kernel(model, x, outputs=outputs))


def test_no_samples_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(at.TangentError, match=r"^kernel_to_store: x holds no samples$"):
        at.kernel_to_store(network(), data(0), tmp_path / "K.zarr")
    with pytest.raises(at.TangentError, match=r"^kernel_to_store: x holds no samples$"):
        at.kernel_to_store(network(), data(), tmp_path / "K.zarr", x2=data(0))
    assert list(tmp_path.iterdir()) == []


def test_a_store_shows_itself_in_a_line(made: at.storage.KernelStore, copied: at.storage.KernelStore) -> None:
    assert repr(made) == f"KernelStore({made.path}: 11 × 3 × 11 × 3, full, float64, complete)"
    chunk(copied, 0, 1).unlink()
    cut = copied.marked(complete=False)
    assert repr(cut).endswith("full, float64, 1 of 6 tiles missing)")


def test_an_incomplete_store_opens_and_is_not_read(copied: at.storage.KernelStore) -> None:
    chunk(copied, 1, 2).unlink()
    copied.marked(complete=False)
    store = at.open_kernel(copied.path)
    assert (store.complete, store.missing()) == (False, [(1, 2)])
    words = r"lacks 1 of its 6 tiles; finish it first: kernel_to_store with resume=True, or .* with --resume"
    with pytest.raises(at.TangentError, match=f"^read: .*{words}"):
        store.read()
    with pytest.raises(at.TangentError, match=f"^tiles: .*{words}"):
        next(store.tiles())


def test_a_chunk_that_went_missing_is_an_error_that_names_the_tile(copied: at.storage.KernelStore) -> None:
    chunk(copied, 0, 2).unlink()
    words = "the tile of rows 0 to 3 and columns 8 to 10 is missing from .*; make it again: .*resume=True"
    with pytest.raises(at.TangentError, match=f"^read: {words}"):
        copied.read(slice(8, 11), slice(0, 1))
    assert copied.read(slice(4, 8)).shape == (4, 3, 11, 3)
    with pytest.raises(at.TangentError, match=f"^tiles: {words}"):
        list(copied.tiles())


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [flipped, lambda c: c[:-7], lambda c: b"", lambda c: c[:2]], ids=["bit", "cut", "empty", "stump"]
)
def test_a_damaged_chunk_is_found_and_never_read(
    damage: Callable[[bytes], bytes], copied: at.storage.KernelStore
) -> None:
    path = chunk(copied, 1, 1)
    path.write_bytes(damage(path.read_bytes()))
    assert copied.verify() == [(1, 1)]
    with pytest.raises(at.TangentError, match=r"^read: the tile of rows 4 to 7 and columns 4 to 7 of .* is damaged \("):
        copied.read()


def test_reading_keeps_to_the_memory_limit(made: at.storage.KernelStore) -> None:
    store = at.open_kernel(made.path, memory_limit=4_000)
    assert store.read(slice(0, 1)).shape == (1, 3, 11, 3)
    message = r"^read: needs 15 kB of memory and the limit is 4 kB; read fewer rows or columns, or go through tiles\(\)"
    with pytest.raises(at.TangentError, match=message):
        store.read()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": torch.tensor([11])}, "^read: indices of samples are 0 to 10, got others"),
        (
            {"block": "0"},
            "^read: .* holds one kernel, of all blocks, and block '0' was asked for; name a block that it holds",
        ),
    ],
)
def test_what_is_not_there_is_refused_by_name(
    made: at.storage.KernelStore, options: dict[str, object], message: str
) -> None:
    with pytest.raises(at.TangentError, match=message):
        made.read(**options)


def test_of_kernels_by_block_one_must_be_named(tmp_path: Path) -> None:
    store = at.kernel_to_store(network(), data(), tmp_path / "K.zarr", outputs="trace", by_block=True)
    for block, asked in ((None, "no block was named"), ("1", "block '1' was asked for")):
        with pytest.raises(at.TangentError, match=f"^read: .* holds kernels of the blocks 0, 2, and {asked}; name"):
            store.read(block=block)


def test_only_a_store_of_this_format_is_opened(copied: at.storage.KernelStore, tmp_path: Path) -> None:
    about = copied.path / "zarr.json"
    content = json.loads(about.read_text())
    content["attributes"]["adaptive_tangents"] |= {"format": 7, "version": "9.1"}
    about.write_text(json.dumps(content))
    message = "is of format 7, and this version reads formats 1 and 2; read it with adaptive-tangents 9.1"
    with pytest.raises(at.TangentError, match=f"^open_kernel: .* {message}"):
        at.open_kernel(copied.path)
    zarr.open_group(tmp_path / "other.zarr", mode="w")
    (tmp_path / "text").write_text("no store")
    for name in ("other.zarr", "text", "nothing"):
        with pytest.raises(at.TangentError, match=f"^open_kernel: there is no kernel store at .*{name}; make one with"):
            at.open_kernel(tmp_path / name)
