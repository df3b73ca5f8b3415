"""`reproduce`: run one study or all of them, resume interrupted ones, and run several at once if there are cores."""

import difflib
import os
from functools import partial
from pathlib import Path
from typing import Any

from adaptive_tangents.commands.checks import check_device, check_folder, tell_earlier
from adaptive_tangents.commands.console import bars, one_bar, typed
from adaptive_tangents.commands.report import PAGES, finish
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.registry import STUDIES
from adaptive_tangents.experiments.study import Asked, Study
from adaptive_tangents.runs.parallel import side_by_side
from adaptive_tangents.runs.record import settings
from adaptive_tangents.runs.results import ARRAYS_FILE, RESULTS_FILE, write_results
from adaptive_tangents.runs.summary import NAME as NAME_OF_ALL
from adaptive_tangents.runs.summary import collect
from adaptive_tangents.runs.units import FOLDER as CHECKPOINTS
from adaptive_tangents.runs.units import StoredUnits
from adaptive_tangents.runtime.progress import Progress


def reproduce(name: str, asked: Asked, *, out: Path | None, device: str, resume: bool, jobs: int | None) -> None:
    """Run the missing parts of one study or of all, and print the findings."""
    names = tuple(STUDIES) if name == NAME_OF_ALL else (name,)
    if not set(names) <= set(STUDIES):
        near = difflib.get_close_matches(name, (*STUDIES, NAME_OF_ALL), n=1)
        raise TangentError(
            f"reproduce: no experiment {name!r}; choose from {', '.join(STUDIES)} or {NAME_OF_ALL}"
            + (f" (did you mean {near[0]}?)" if near else "")
        )
    if asked.seeds is not None and asked.seeds < 1:
        raise TangentError(f"reproduce: --seeds must be at least 1, got {asked.seeds}")
    if jobs is not None and jobs < 1:
        raise TangentError(f"reproduce: --jobs must be at least 1, got {jobs}")
    check_device("reproduce", device)
    root = out or Path("runs")
    folders = {each: root if out and name != NAME_OF_ALL else root / each for each in names}
    # All folders are looked at, with or without --resume: one that holds another run is refused before any work.
    if name == NAME_OF_ALL:
        check_folder("reproduce", root, PAGES[name]().figures)
    for each, folder in folders.items():
        check_folder("reproduce", folder, PAGES[each]().figures)
    finished = {each: complete(STUDIES[each], asked, folders[each]) for each in names}
    missing = [each for each in names if not (resume and finished[each])]
    for each in missing:
        tell_earlier(folders[each], parts=CHECKPOINTS, resumed=resume)
    at_once = min(jobs or _jobs(device), len(missing))
    if at_once > 1:
        works = {
            each: partial(run, each, asked, folders[each], device, command=typed(each), resume=resume)
            for each in sorted(missing, key=lambda each: -STUDIES[each].minutes)
        }
        with bars() as progress:
            side_by_side(works, at_once=at_once, threads=max(1, cores() // at_once), progress=progress)
    for each, folder in folders.items():
        if at_once == 1 and each in missing:
            with one_bar() as progress_of_one:
                run(each, asked, folder, device, progress_of_one, command=typed(each), resume=resume)
        finish(folder)
    if name == NAME_OF_ALL:
        finish(collect(root, names, command=typed()))


def cores() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def complete(study: Study, asked: Asked, folder: Path) -> bool:
    """Whether the folder holds the complete results of a run with these settings."""
    StoredUnits(folder, _settings(study, asked))
    return (folder / RESULTS_FILE).is_file() and (folder / ARRAYS_FILE).is_file()


def run(name: str, asked: Asked, folder: Path, device: str, progress: Progress, *, command: str, resume: bool) -> None:
    """Run one study and write it to a folder, saving each part as it is made."""
    study = STUDIES[name]
    units = StoredUnits(folder, _settings(study, asked), resume=resume)
    result = study.run(study.configured(asked), device=device, progress=progress, units=units)
    units.settle()
    write_results(result.results | {"command": command}, result.arrays, folder)


def _jobs(device: str) -> int:
    """The default number of studies at once: at most four, to limit memory."""
    return min(cores(), 4) if device == "cpu" else 1


def _settings(study: Study, asked: Asked) -> dict[str, Any]:
    return {"experiment": study.name, **settings(study.configured(asked))}
