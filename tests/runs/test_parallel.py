"""Experiments that run in parallel: each in its own process, and all end when the run ends."""

import os
import pickle
import signal
import time
from functools import partial
from multiprocessing import popen_fork
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from threadpoolctl import threadpool_limits
from typer.testing import CliRunner

import parallel_works
from adaptive_tangents import TangentError, cli
from adaptive_tangents.commands import reproduce
from adaptive_tangents.experiments.registry import STUDIES
from adaptive_tangents.runs.parallel import side_by_side
from adaptive_tangents.runs.results import load_results
from study_cases import SMALL, made_up_data, plain_figures


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _ended(pids: list[int]) -> bool:
    end = time.monotonic() + 30
    while any(map(_alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(_alive, pids))


class Forked(SpawnProcess):
    """A copy of this process: a new one takes seconds to import torch. Its work is pickled all the same."""

    def __init__(self, *, args: tuple[Any, ...], **keywords: Any) -> None:
        super().__init__(args=(pickle.loads(pickle.dumps(args[0])), *args[1:]), **keywords)

    @staticmethod
    def _Popen(process: BaseProcess) -> popen_fork.Popen:
        return popen_fork.Popen(process)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpawnContext, "Process", Forked)


@pytest.mark.usefixtures("forked")
def test_each_work_has_a_process_and_its_threads_and_is_heard_under_its_name(tmp_path) -> None:
    heard = []
    works = {name: partial(parallel_works.write, tmp_path, name) for name in ("a", "b")}
    side_by_side(works, at_once=2, threads=2, progress=lambda *told: heard.append(told))
    assert sorted(heard) == [("a", "writing", 0.5), ("b", "writing", 0.5)]
    processes, threads = zip(*((tmp_path / name).read_text().split() for name in works), strict=True)
    assert len({*processes, str(os.getpid())}) == 3
    assert threads == ("2", "2")


@pytest.mark.usefixtures("forked")
def test_as_many_run_together_as_asked_and_no_more(tmp_path) -> None:
    for name in "two", "one":
        (tmp_path / name).mkdir()
    together, alone = (
        {each: partial(parallel_works.together, tmp_path / name, each, 60) for each in "ab"} for name in ("two", "one")
    )
    side_by_side(together, at_once=2, threads=1, progress=parallel_works.ignore)
    alone["a"] = partial(parallel_works.together, tmp_path / "one", "a", 1)
    with pytest.raises(TangentError, match="alone"):
        side_by_side(alone, at_once=1, threads=1, progress=parallel_works.ignore)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("work", "message"),
    [
        (parallel_works.fail, "reproduce: no data"),
        (parallel_works.die, f"the process of bad ended with status -{int(signal.SIGKILL)}; .*--resume"),
    ],
)
def test_a_work_that_fails_ends_the_others_and_its_error_is_raised(work, message, tmp_path) -> None:
    with pytest.raises(TangentError, match=message):
        side_by_side(
            {"long": partial(parallel_works.wait, tmp_path), "bad": work},
            at_once=2,
            threads=1,
            progress=parallel_works.ignore,
        )
    assert _ended([int(path.name) for path in tmp_path.iterdir()])


@pytest.mark.parametrize(("ending", "kind"), [(signal.SIGKILL, SpawnProcess), (signal.SIGINT, Forked)])
def test_the_processes_end_with_the_one_that_began_them(ending, kind, tmp_path, monkeypatch) -> None:
    """New processes, as users have them, end with one that is killed; copies do with one that is interrupted."""
    monkeypatch.setattr(SpawnContext, "Process", kind)
    parent = Forked(target=parallel_works.wait_in_two, args=(tmp_path,))
    parent.start()
    assert parent.pid is not None
    end = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 4 and time.monotonic() < end:
        time.sleep(0.05)
    assert {path.name for path in tmp_path.glob("heard *")} == {"heard a", "heard b"}
    pids = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
    assert len(pids) == 2
    assert all(map(_alive, pids))
    os.kill(parent.pid, ending)
    parent.join(30)
    assert parent.exitcode not in (0, None)
    assert _ended(pids)


@pytest.mark.usefixtures("forked")
def test_experiments_run_at_once_measure_what_they_do_one_by_one(tmp_path, monkeypatch) -> None:
    few = {name: STUDIES[name] for name in ("penalties", "weight-spectra")}
    monkeypatch.setattr(reproduce, "STUDIES", few)
    monkeypatch.setattr(reproduce, "cores", lambda: 2)  # one thread each: other sums round differently
    for name, study in few.items():
        monkeypatch.setattr(f"{study.package}.{study.measured_in}.configured", lambda asked, name=name: SMALL[name])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1), made_up_data(), plain_figures("penalties"), plain_figures("weight-spectra"):
            for jobs in (1, 2):
                asked = ["reproduce", "all", "--jobs", str(jobs), "--out", str(tmp_path / str(jobs))]
                done = CliRunner().invoke(cli.app, asked)
                assert done.exit_code == 0, done.output
                assert "Report: " in done.output
    finally:
        torch.set_num_threads(threads)
    for name in few:
        alone, beside = (load_results(tmp_path / str(jobs) / name)[0] for jobs in (1, 2))
        assert alone["metrics"] == beside["metrics"]
        assert alone["claims"] == beside["claims"]
