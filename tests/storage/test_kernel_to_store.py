"""Making a stored kernel: the same bits by any route, few captures, and never a store with wrong metadata."""

import contextlib
import errno
import importlib
import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
import clean_process
import reference
from adaptive_tangents.capture.capture import Capture
from adaptive_tangents.features.transforms import Sides
from adaptive_tangents.kernels.schedule import Deal
from adaptive_tangents.runtime.tensor_files import draft_beside, is_draft
from adaptive_tangents.storage import locks, tile_making
from adaptive_tangents.storage.feature_stream import Stream
from adaptive_tangents.storage.planning import duration
from adaptive_tangents.storage.store import KernelStore
from cases import Forward
from stored import LIMIT, data, files, network

storing = importlib.import_module(
    "adaptive_tangents.storage.kernel_to_store"
)  # the function of that name hides the module


def store(path: Path, **options: Any) -> at.storage.KernelStore:
    given = {"outputs": "trace", "tile": 3, "memory_limit": LIMIT} | options
    return at.kernel_to_store(given.pop("model", network()), given.pop("x", data()), path, **given)


class Stopped(Exception):
    """An interruption."""


@contextlib.contextmanager
def stopping(after: int, error: BaseException | None = None) -> Iterator[list[tuple[int, int]]]:
    """Stop after some tiles are written; yields the tiles written."""
    written: list[tuple[int, int]] = []
    write = KernelStore.write

    def limited(self: KernelStore, place: tuple[int, int], kernels: Any) -> None:
        if len(written) == after:
            raise error or Stopped
        written.append(place)
        write(self, place, kernels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelStore, "write", limited)
        yield written


# the same bits


@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_neither_order_nor_room_nor_interruptions_change_a_bit(outputs: str, tmp_path: Path, monkeypatch: Any) -> None:
    x, x2 = data(10).float(), data(5, seed=1).float()
    for other in (None, x2):
        options = {"model": network().float(), "x": x, "x2": other, "outputs": outputs}
        expected = files(store(tmp_path / f"{other is None}.zarr", **options).path)
        cut = tmp_path / f"cut-{other is None}.zarr"
        for after in (0, 2, 3):
            with stopping(after), pytest.raises(Stopped):
                store(cut, **options, resume=True)
            assert not at.open_kernel(cut).complete
        store(cut, **options, resume=True)
        assert files(cut) == expected
        with monkeypatch.context() as patch:
            patch.setattr(storing, "_shares", lambda made, some, layout, places, ranks: Deal([list(places)[::-1]]))
            assert files(store(tmp_path / f"back-{other is None}.zarr", **options).path) == expected
        with monkeypatch.context() as patch:
            patch.setattr(storing, "lay_out", narrow(storing.lay_out))
            assert files(store(tmp_path / f"narrow-{other is None}.zarr", **options).path) == expected


def narrow(lay_out: Any) -> Any:
    """Limit layouts to two ranges of samples."""
    from dataclasses import replace

    return lambda *arguments, **options: replace(lay_out(*arguments, **options), cached=2)


def test_results_of_other_tiles_are_within_rounding(tmp_path: Path) -> None:
    model, x = network().float(), data(10).float()
    exact = at.tangent_kernel(network(), data(10), outputs="trace")
    scale = exact.diagonal().sqrt().outer(exact.diagonal().sqrt())
    for tile in (1, 4, 7, 10):
        made = store(tmp_path / f"{tile}.zarr", model=model, x=x, tile=tile).read().double()
        # The longest inner product has 3·8 + 9 terms; features themselves are off by a few roundings.
        assert float(((made - exact).abs() / scale).max()) < 40 * torch.finfo(torch.float32).eps


def test_blocks_are_added_in_float64(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(6, 6), nn.Tanh())))
    x = data(9).float()
    whole = store(tmp_path / "K.zarr", model=model, x=x)
    parts = store(tmp_path / "blocks.zarr", model=model, x=x, by_block=True)
    kernels = [parts.read(block=name) for name in parts.blocks]
    assert torch.equal(whole.read(), sum(kernel.double() for kernel in kernels).float())
    assert not torch.equal(whole.read(), sum(kernels))


# dtypes, transforms, sketches


def test_float64_is_that_of_the_model_in_float64(tmp_path: Path) -> None:
    model, x = network().float(), data().float()
    state = {name: value + 0.5 for name, value in model.state_dict().items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = store(tmp_path / "K.zarr", model=model, x=x, x2=x[:5], params=state, wrt="2.*", dtype=torch.float64)
    model64 = network()
    model64.load_state_dict(state)
    expected = at.tangent_kernel(model64, x.double(), x[:5].double(), outputs="trace", wrt="2.*", tile=3)
    assert made.dtype == torch.float64
    torch.testing.assert_close(made.read(), expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_features_kept_in_bfloat16_err_by_their_rounding(tmp_path: Path) -> None:
    model, x = network().float(), data(20).float()
    exact = store(tmp_path / "K.zarr", model=model, x=x).read()
    made = store(tmp_path / "B.zarr", model=model, x=x, dtype=torch.bfloat16)
    assert (made.dtype, made.meta["features"]) == (torch.float32, "bfloat16")
    scale = exact.diagonal().sqrt().outer(exact.diagonal().sqrt())
    error = ((made.read() - exact).abs() / scale).max()
    # Four factors, each rounded by at most 2⁻⁸ of itself.
    assert 1e-5 < float(error) < 1.01 * 4 * 2**-8


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    message = "^kernel_to_store: dtype is torch.float64, torch.float32, torch.bfloat16 or None, got torch.int32"
    with pytest.raises(at.TangentError, match=message):
        store(tmp_path / "K.zarr", dtype=torch.int32)
    stubborn = Forward(lambda m, x: m.fc(x), fc=nn.Linear(6, 2))
    stubborn.lock = threading.Lock()
    with pytest.raises(at.TangentError, match=r"copied in order to evaluate it in torch.float32 .*; pass it in that"):
        store(tmp_path / "K.zarr", model=stubborn, dtype=torch.float32)


def test_the_kernel_of_a_fit_is_stored_with_its_transforms(tmp_path: Path) -> None:
    model, x = network(), data()
    feats = at.tangent_features(model, x)
    fit = at.fit(feats, torch.sin(5 * data(11, seed=2)[:, :3]), structure=at.TwoSided(at.Quadratic(0.1)))
    made = store(tmp_path / "K.zarr", transforms=fit.transforms)
    torch.testing.assert_close(made.read(), fit.transform(feats).kernel(outputs="trace"), rtol=1e-10, atol=1e-12)
    assert made.meta["transforms"] is not None
    with pytest.raises(at.TangentError, match=r"was made with other transforms; resume it with"):
        store(made.path, resume=True)


@dataclass(frozen=True)
class Doubled:
    """A stand-in for a sketch: features times two."""

    by: float = 2.0

    def apply(self, feats: at.TangentFeatures) -> at.TangentFeatures:
        return feats.transformed({name: Sides(scale=self.by) for name in feats.blocks})

    def describe(self) -> dict[str, Any]:
        return {"by": self.by}


def test_a_sketch_is_applied_and_named_in_the_store(tmp_path: Path) -> None:
    made = store(tmp_path / "K.zarr", sketch=Doubled())
    assert torch.equal(made.read(), 4 * store(tmp_path / "exact.zarr").read())
    assert made.meta["sketch"] == {"by": 2.0}
    with pytest.raises(at.TangentError, match=r"with another sketch \(\{'by': 2.0\}, now \{'by': 3.0\}\)"):
        store(made.path, sketch=Doubled(3.0), resume=True)


# captures


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    features = Capture.features

    def counted(self: Capture, x: Any, chunk: int | None = None) -> at.TangentFeatures:
        sizes.append(len(x))
        return features(self, x, chunk)

    monkeypatch.setattr(Capture, "features", counted)
    return sizes


def test_every_sample_is_captured_once_where_features_are_held(captured: list[int], tmp_path: Path) -> None:
    x = data(18)
    store(tmp_path / "K.zarr", x=x)
    assert sum(captured[2:]) == 18  # the first two are probes
    captured.clear()
    store(tmp_path / "two.zarr", x=x, x2=data(9, seed=1))
    assert sum(captured[2:]) == 27
    captured.clear()
    at.tangent_kernel(network(), x, tile=3)
    assert sum(captured) == 18


@pytest.mark.parametrize("tile", [12, 5])
def test_two_batches_of_as_many_samples_are_two_batches(tile: int, tmp_path: Path) -> None:
    x, x2 = data(12), data(12, seed=1)
    made = store(tmp_path / "K.zarr", x=x, x2=x2, tile=tile, outputs="full")
    expected = at.tangent_features(network(), x).kernel(at.tangent_features(network(), x2))
    torch.testing.assert_close(made.read(), expected, rtol=1e-9, atol=1e-12)


def test_where_they_are_not_held_captures_are_as_planned(captured: list[int], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 2)).double()
    x = data(40)
    limit = 290_000
    plan = at.plan_kernel(model, x, outputs="trace", tile=4, memory_limit=limit)
    assert 2 < plan.layout.cached < plan.ranges == 10
    assert 10 < plan.captures < 55
    captured.clear()
    store(tmp_path / "K.zarr", model=model, x=x, tile=4, memory_limit=limit)
    assert sum(captured[2:]) == 4 * plan.captures


# the plan


def test_a_plan_says_what_is_then_done(tmp_path: Path) -> None:
    model, x, x2 = network(), data(50), data(30, seed=1)
    plan = at.plan_kernel(model, x, x2=x2, outputs="full", by_block=True, tile=8, memory_limit=LIMIT, processes=2)
    assert (plan.tiles, plan.ranges, plan.kernels, plan.shape) == (28, 11, 2, (50, 3, 30, 3))
    made = store(tmp_path / "K.zarr", x=x, x2=x2, outputs="full", by_block=True, tile=8)
    assert len(made.places) == plan.tiles
    stored = sum(len(content) for name, content in files(made.path).items() if "/c/" in name)
    assert 0.3 * plan.disk_bytes < stored < 1.1 * plan.disk_bytes  # half of a last layer's entries are zero
    assert 0 < plan.seconds < 60
    assert plan.bytes <= LIMIT
    text = str(plan)
    for words in (
        "2 kernels of 50 × 3 × 30 × 3 (full, float64)",
        "28 tiles of 8 samples a side",
        "2 processes",
        "about",
    ):
        assert words in text
    assert all(name in text for name in made.blocks)
    assert {block.route for block in plan.contraction.blocks} <= {"gram", "nested", "materialize"}


def test_a_plan_for_several_processes_counts_a_capture_of_each_range_where_passing_is_cheaper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seconds, captures in ((0.0, 10), (float("inf"), 18)):
        monkeypatch.setattr(storing, "passing_seconds", lambda size, seconds=seconds: seconds)
        plan = at.plan_kernel(network(), data(40), outputs="trace", tile=4, memory_limit=LIMIT, processes=2)
        assert (plan.ranges, plan.captures) == (10, captures)


def test_a_plan_times_more_samples_up_to_a_tile_where_few_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    features = Stream.features

    def counted(self: Stream, x: torch.Tensor, *given: int) -> at.TangentFeatures:
        counts.append(len(x))
        return features(self, x, *given)

    monkeypatch.setattr(Stream, "features", counted)
    monkeypatch.setattr(storing, "_TELLING", float("inf"))
    at.plan_kernel(network(), data(300), outputs="trace", tile=100, memory_limit=LIMIT)
    assert counts == [16, 16, 64, 100]
    counts.clear()
    monkeypatch.setattr(storing, "_TELLING", 0.0)
    at.plan_kernel(network(), data(300), outputs="trace", tile=100, memory_limit=LIMIT)
    assert counts == [16, 16]


def test_tiles_are_chosen_for_many_and_for_the_memory() -> None:
    x = data(3000)
    wide = at.plan_kernel(network(), x, outputs="trace")
    assert (wide.layout.tile, wide.tiles, wide.layout.cached) == (375, 36, 8)
    tight = at.plan_kernel(network(), x, outputs="trace", memory_limit=1_500_000)
    assert tight.layout.tile < 375
    assert tight.bytes <= 1_500_000
    with pytest.raises(
        at.TangentError, match=r"^plan_kernel: needs .* and the limit is 800 bytes; use fewer outputs or param"
    ):
        at.plan_kernel(network(), x, outputs="trace", memory_limit=800)
    with pytest.raises(
        at.TangentError, match=r"^plan_kernel: needs .* the limit is 1 MB; use a smaller tile, outputs='tr"
    ):
        at.plan_kernel(network(), x, outputs="trace", tile=3000, memory_limit=1_000_000)
    for options in ({"memory_limit": 4_000}, {"tile": 5}):
        with pytest.raises(
            at.TangentError, match=r"would make \d+ ranges of samples, and .*; use a larger tile, a larger"
        ):
            at.plan_kernel(network(), x, outputs="trace", **options)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25 s"), (100, "1e+02 s"), (150, "2 min"), (7260, "2 h 1 min"), (90000, "25 h 0 min")],
)
def test_times_are_written_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.slow
@clean_process.in_one_group
def test_a_limit_of_the_process_is_kept_where_not_even_the_kernel_fits(tmp_path: Path) -> None:
    script = """
import resource, sys, torch, zarr, adaptive_tangents as at
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(10, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
x = torch.randn(6000, 10)
at.tangent_kernel(model, x[:9], outputs="trace")  # torch imports much at its first derivative
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, resource.RLIM_INFINITY))
try:
    at.tangent_kernel(model, x, outputs="trace")
except at.TangentError as error:
    print(error)
store = at.kernel_to_store(model, x, sys.argv[1], outputs="trace")
some = torch.tensor([0, 3000, 5999])
print(store.complete, torch.allclose(store.read(some, some), at.tangent_kernel(model, x[some], outputs="trace"), rtol=1e-4))
"""
    run = clean_process.run(script, str(tmp_path / "K.zarr"))
    assert run.returncode == 0, run.stderr
    refused, made = run.stdout.strip().splitlines()
    assert refused.startswith("tangent_kernel: needs 144 MB of memory and the limit is")
    assert made == "True True"


# stores of something else


def changed(model: nn.Module) -> nn.Module:
    model[0].bias.data[0] += 1e-9
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": changed(network())},
            "at other parameters; resume it with its original arguments, or give another path",
        ),
        ({"x": data() + 1e-12}, "of other data x;"),
        (
            {"x": data(12)},
            r"of other data x, of another number of samples \(11, now 12\), of another number of samples x2",
        ),
        ({"x2": data()}, r"of other data x2, with or without x2;"),
        ({"outputs": "diagonal"}, r"with other outputs \(full, now diagonal\)"),
        ({"wrt": "2.*"}, r"for other parameters \(wrt\)"),
        ({"by_block": True}, "with the other choice of by_block, or of other blocks"),
        ({"tile": 4}, r"in tiles of another size \(3, now 4\)"),
        ({"dtype": torch.bfloat16}, r"in another dtype \(float64, now float32\), from features in another dtype"),
        (
            {"dtype": torch.float32},
            r"in another dtype \(float64, now float32\), from features in another dtype \(float64",
        ),
        ({"sketch": Doubled()}, r"with another sketch \(None, now \{'by': 2.0\}\)"),
    ],
)
def test_a_store_of_something_else_is_not_resumed(begun: Path, options: dict[str, Any], message: str) -> None:
    before = files(begun)
    with pytest.raises(at.TangentError, match=f"^kernel_to_store: .*K.zarr was made .*{message}"):
        store(begun, **{"outputs": "full"} | options, resume=True)
    assert files(begun) == before


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("begun") / "K.zarr"
    with stopping(4), pytest.raises(Stopped):
        store(path, outputs="full")
    shutil.rmtree(path / ".claims")
    return path


def test_a_store_of_another_version_or_network_is_not_resumed(begun: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(storing, "__version__", "9.9")
    with pytest.raises(at.TangentError, match=rf"was made by another version \({at.__version__}, now 9.9\)"):
        store(begun, outputs="full", resume=True)
    monkeypatch.undo()
    # Another function with the same parameters and data; no hash can tell them apart.
    relu = network()
    relu[1] = nn.ReLU()
    message = "was made with another network: parameters and data are the same, but the kernel of a few samples is"
    with pytest.raises(at.TangentError, match=message):
        store(begun, model=relu, outputs="full", resume=True)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "outputs in another order": lambda out: out.flip(1),
    "an output of the other sign": lambda out: out * torch.tensor([1, -1, 1][: out.shape[1]]).to(out),
    "outputs rotated": lambda out: out @ torch.linalg.qr(torch.randn(2 * [out.shape[1]], dtype=out.dtype))[0],
}


@pytest.mark.parametrize("outputs", ["full", "diagonal"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_store_of_other_outputs_with_the_same_trace_is_not_resumed(change: str, outputs: str, tmp_path: Path) -> None:
    path = store(tmp_path / "K.zarr", outputs=outputs).path
    before = files(path)
    if change != "an output of the other sign" or outputs == "full":
        with pytest.raises(at.TangentError, match="was made with another network"):
            store(path, outputs=outputs, output_fn=CHANGES[change], resume=True)
    assert store(path, outputs=outputs, resume=True).complete
    assert files(path) == before


def test_a_store_that_is_there_is_not_overwritten(begun: Path, tmp_path: Path) -> None:
    with pytest.raises(
        at.TangentError, match=r"there is a kernel store at .* already, incomplete; continue it with resume"
    ):
        store(begun, outputs="full")
    done = store(tmp_path / "done.zarr").path
    with pytest.raises(at.TangentError, match="already, complete; continue it with resume=True"):
        store(done)
    before = files(done)
    assert store(done, resume=True).complete
    assert files(done) == before


@pytest.mark.parametrize("damage", [b"", b"no chunk at all"])
def test_resume_makes_damaged_and_missing_tiles_of_a_complete_store_again(damage: bytes, tmp_path: Path) -> None:
    path = store(tmp_path / "K.zarr").path
    before = files(path)
    (path / "kernel" / "c" / "0" / "2").unlink()
    (path / "kernel" / "c" / "1" / "1").write_bytes(damage)
    (path / "kernel" / "c" / "1" / draft_beside(path).name).write_bytes(b"what a killed writer left")
    with stopping(9) as written:
        store(path, resume=True)
    assert sorted(written) == [(0, 2), (1, 1)]
    assert files(path) == before


def test_a_folder_or_file_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("more of it")
    with pytest.raises(
        at.TangentError, match=r"^kernel_to_store: .*folder is a folder that holds something else; give a"
    ):
        store(tmp_path / "folder", resume=True)
    with pytest.raises(at.TangentError, match=r"^kernel_to_store: .*file is a file; give the path of a folder"):
        store(tmp_path / "file")
    with pytest.raises(at.TangentError, match=r"^kernel_to_store: .*file/K.zarr cannot be written .*give another path"):
        store(tmp_path / "file" / "K.zarr")
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")} == {"folder", "folder/thesis.tex", "file"}


@pytest.mark.parametrize("tile", [0, -1])
def test_a_tile_is_a_positive_number_of_samples(tile: int, tmp_path: Path) -> None:
    with pytest.raises(at.TangentError, match=f"^kernel_to_store: tile is a positive number of samples, got {tile}$"):
        store(tmp_path / "K.zarr", tile=tile)
    assert list(tmp_path.iterdir()) == []


# refusals of the system


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[bool]:
    """A disk of the given size, if one can be mounted."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_loses_nothing_and_leaves_no_store_that_looks_complete(tmp_path: Path, monkeypatch: Any) -> None:
    x = data(60)
    options = {"x": x, "outputs": "full", "tile": 12}
    expected = files(store(tmp_path / "expected.zarr", **options).path)
    words = "^kernel_to_store: there is no room left for .*; the finished tiles stay: free some room and continue with"
    with small_disk(tmp_path / "disk", 120_000) as mounted:
        path = tmp_path / "disk" / "K.zarr"
        monkeypatch.setattr(storing, "_check_room", lambda *_: None)
        if mounted:
            with pytest.raises(at.TangentError, match=words):
                store(path, **options)
        else:
            with (
                stopping(4, OSError(errno.ENOSPC, "No space left on device")),
                pytest.raises(at.TangentError, match=words),
            ):
                store(path, **options)
        left = at.open_kernel(path)
        assert not left.complete
        assert 0 < len(left.missing()) < len(left.places)
        assert left.verify() == []
        assert not [entry for entry in path.rglob("*") if is_draft(entry)]
        shutil.copytree(path, tmp_path / "moved.zarr")
    assert files(store(tmp_path / "moved.zarr", **options, resume=True).path) == expected


def test_a_kernel_that_cannot_fit_on_the_disk_is_refused_before_work(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(storing.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 600, 400))
    message = (
        r"^kernel_to_store: the kernel takes up to 5.47 kB and the disk of .* has 400 bytes free; free more, "
        r"give a path elsewhere, or store outputs='trace', which takes up to 608 bytes$"
    )
    with pytest.raises(at.TangentError, match=message):
        store(tmp_path / "K.zarr", outputs="full")


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    error = OSError(errno.EROFS, "Read-only file system")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(error))
        with pytest.raises(
            at.TangentError, match=r"K.zarr cannot be written \(.*Read-only file system\); give another"
        ):
            store(tmp_path / "K.zarr")
    with (
        stopping(3, error),
        pytest.raises(at.TangentError, match=r"cannot be written .*fix that and continue with resume"),
    ):
        store(tmp_path / "K.zarr")
    assert store(tmp_path / "K.zarr", resume=True).complete


def test_a_store_that_could_not_be_begun_leaves_no_trace(tmp_path: Path, monkeypatch: Any) -> None:
    from adaptive_tangents.storage import store as stores

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stores, "write_meta", full)
        with pytest.raises(at.TangentError, match="there is no room left"):
            store(tmp_path / "K.zarr")
    assert list((tmp_path / "K.zarr").iterdir()) == []
    assert store(tmp_path / "K.zarr").complete


def test_a_kernel_beyond_its_dtype_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 1, bias=False)
    x = torch.full((3, 2), 1e25)
    with pytest.raises(at.TangentError, match=r"^kernel_to_store: .* too large for float32, .* dtype=torch.float64"):
        store(tmp_path / "K.zarr", model=model, x=x)
    assert list(tmp_path.iterdir()) == []
    assert store(tmp_path / "wide.zarr", model=model, x=x, dtype=torch.float64).complete


def test_a_tile_that_a_dead_process_had_claimed_keeps_the_store_incomplete(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "K.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(tile_making, "claim_tile", lambda folder, place: place != (1, 2))
        message = r"^kernel_to_store: 1 of 10 tiles are missing from .*, because a process ended early; make them with"
        with pytest.raises(at.TangentError, match=message):
            store(path)
    assert (at.open_kernel(path).complete, at.open_kernel(path).missing()) == (False, [(1, 2)])
    assert files(store(path, resume=True).path) == files(store(tmp_path / "whole.zarr").path)


# two writers


def holder(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    path = tmp_path / "K.zarr"
    refusals: list[str] = []
    write = KernelStore.write

    def second(self: KernelStore, place: tuple[int, int], kernels: Any) -> None:
        with pytest.raises(at.TangentError) as refused:
            store(path, resume=True)
        refusals.append(str(refused.value))
        write(self, place, kernels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelStore, "write", second)
        assert store(path).complete
    assert len(set(refusals)) == 1
    assert refusals[0].startswith(f"kernel_to_store: {path} is being written by process {os.getpid()} on ")
    assert refusals[0].endswith(f"; wait for it or end it (if it no longer exists, delete {path / '.lock'})")
    assert files(path) == files(store(tmp_path / "alone.zarr").path)


@pytest.mark.parametrize("change", [{"process": 2**22 + 1}, {"started": "1"}], ids=["dead", "number taken again"])
def test_the_lock_of_a_dead_process_is_taken_over(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.writer_lock("call", path):
        left = path.read_text()
    assert not path.exists()
    path.write_text(json.dumps(json.loads(left) | change))
    with locks.writer_lock("call", path):
        assert holder(path)["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_holder_on_another_machine_is_dead_without_signs_of_life(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(locks, "_BEAT", 0.05)
    monkeypatch.setattr(locks, "_WATCHED", 0.3)
    path = tmp_path / "lock"
    far = {"host": "elsewhere", "process": 1, "started": "1"}
    stop = threading.Event()

    def beating() -> None:
        beats = itertools.count()
        while not stop.wait(0.02):
            (tmp_path / "draft").write_text(json.dumps(far | {"beats": next(beats)}))
            os.replace(tmp_path / "draft", path)

    path.write_text(json.dumps(far))
    other = threading.Thread(target=beating)
    other.start()
    message = r"^call: .* is being written by process 1 on elsewhere; wait for it or end it"
    with pytest.raises(at.TangentError, match=message), locks.writer_lock("call", path):
        pass
    stop.set()
    other.join()
    path.write_text(json.dumps({"host": "elsewhere", "process": 1, "started": "1", "beats": 3}))
    with locks.writer_lock("call", path):
        assert holder(path)["process"] == os.getpid()


def test_a_lock_that_was_taken_over_is_not_beaten_back(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(locks, "_BEAT", 0.02)
    path = tmp_path / "lock"
    with locks.writer_lock("call", path):
        path.write_text(json.dumps({"host": "elsewhere", "process": 1}))
        time.sleep(0.2)
        assert holder(path)["host"] == "elsewhere"


def test_a_claim_is_given_once(tmp_path: Path) -> None:
    assert locks.claim_tile(tmp_path, (0, 1))
    assert not locks.claim_tile(tmp_path, (0, 1))
    assert locks.claim_tile(tmp_path, (1, 0))


def test_an_interruption_keeps_what_is_made(tmp_path: Path) -> None:
    path = tmp_path / "K.zarr"
    with stopping(4, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        store(path)
    left = at.open_kernel(path)
    assert (left.complete, len(left.places) - len(left.missing())) == (False, 4)
    assert not (path / ".lock").exists()
    seen: list[tuple[str, float]] = []
    assert store(path, resume=True, progress=lambda stage, part: seen.append((stage, part))).complete
    assert [stage for stage, _ in seen if stage == "tiles"] == ["tiles"] * 6
    assert seen[-1] == ("tiles", 1.0)
    assert ("verifying", 1.0) in seen


def test_a_stored_adapted_kernel_agrees_with_its_dense_twin(tmp_path: Path) -> None:
    model, x = network(), data()
    gains = {"2": Sides(scale=3.0)}
    phi = reference.jacobian(model, x)
    own = reference.jacobian(model, x, names=("2.weight", "2.bias"))
    made = store(tmp_path / "K.zarr", transforms=gains, outputs="full").read()
    expected = reference.kernel(phi, phi) + 8 * reference.kernel(own, own)
    torch.testing.assert_close(made, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
