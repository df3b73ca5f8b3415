"""A writer killed at any moment, alone or among others, loses only its current tile."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed.run
from torch.distributed import HashStore

import adaptive_tangents as at
import forked
from adaptive_tangents.storage.processes import _agreed
from stored import LIMIT, data, files, network


def test_a_writer_killed_at_random_moments_leaves_whole_tiles_and_resumes_to_the_same_files(tmp_path: Path) -> None:
    forked.killed(tmp_path)


def test_processes_make_together_what_one_makes_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    forked.together(tmp_path)
    refusals = re.findall(r"^refused: (.*)$", capfd.readouterr().out, re.MULTILINE)
    assert len(refusals) == 2
    assert len(set(refusals)) == 1
    assert re.fullmatch(r"kernel_to_store: .*other.zarr was made of other data x; resume it with .*", refusals[0])


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_under_torchrun_a_killed_process_is_made_good(
    restarts: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--standalone",
        "--nproc-per-node=2",
        "--run-path",
        "--start-method=fork",
        f"--max-restarts={restarts}",
    ]
    code = forked.code_of(forked.fork(lambda: torch.distributed.run.main([*arguments, forked.__file__, str(tmp_path)])))
    path = tmp_path / "K.zarr"
    if not restarts:
        assert code != 0
        left = at.open_kernel(path)
        assert (left.complete, left.verify()) == (False, [])
        assert 3 <= len(left.places) - len(left.missing()) < len(left.places)
        at.kernel_to_store(network(), data(40), path, outputs="trace", memory_limit=LIMIT, resume=True)
    else:
        assert code == 0, capfd.readouterr().err
    at.kernel_to_store(network(), data(40), tmp_path / "expected.zarr", outputs="trace", tile=4, memory_limit=LIMIT)
    assert files(path) == files(tmp_path / "expected.zarr")


def test_processes_started_anew_agree_on_a_new_name_whatever_earlier_ones_left_in_the_store() -> None:
    store, names = HashStore(), []
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(_agreed, store, rank, 3) for rank in (1, 0, 2)]
            found = {made.result(timeout=60) for made in asked}
        assert len(found) == 1
        names += found
        for rank in (1, 2):
            store.set(f"come/{rank}", f"one that was killed on its way {len(names)}")
    assert len(set(names)) == 3
