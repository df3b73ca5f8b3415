"""A writer killed at any moment, alone or among others, loses only its current tile."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore

import adaptive_tangents as at
from adaptive_tangents.storage.processes import _agreed
from stored import LIMIT, data, files, network

SCRIPT = Path(__file__).parents[1] / "forked.py"


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=280)


def test_a_writer_killed_at_random_moments_leaves_whole_tiles_and_resumes_to_the_same_files(tmp_path: Path) -> None:
    done = run(sys.executable, str(SCRIPT), "killed", folder=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    kills = re.search(r"(\d+) kills, \d+ stores", done.stdout)
    assert kills is not None
    assert int(kills[1]) >= 20


def test_processes_make_together_what_one_makes_alone(tmp_path: Path) -> None:
    done = run(sys.executable, str(SCRIPT), "together", folder=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    refusals = re.findall(r"^refused: (.*)$", done.stdout, re.MULTILINE)
    assert len(refusals) == 2
    assert len(set(refusals)) == 1
    assert re.fullmatch(r"kernel_to_store: .*other.zarr was made of other data x; resume it with .*", refusals[0])


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_under_torchrun_a_killed_process_is_made_good(restarts: int, tmp_path: Path) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = run(*launcher, f"--max-restarts={restarts}", str(SCRIPT), "rank", folder=tmp_path)
    path = tmp_path / "K.zarr"
    if not restarts:
        assert done.returncode != 0
        left = at.open_kernel(path)
        assert (left.complete, left.verify()) == (False, [])
        assert 3 <= len(left.places) - len(left.missing()) < len(left.places)
        at.kernel_to_store(network(), data(40), path, outputs="trace", memory_limit=LIMIT, resume=True)
    else:
        assert done.returncode == 0, done.stderr
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
