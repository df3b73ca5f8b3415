"""`inspect`: what training did to a user's network."""

from collections.abc import Sequence
from pathlib import Path

from adaptive_tangents.commands.checks import check_device, check_folder
from adaptive_tangents.commands.console import one_bar, typed
from adaptive_tangents.commands.report import PAGES, finish
from adaptive_tangents.errors import TangentError
from adaptive_tangents.inspection import InspectConfig
from adaptive_tangents.inspection import run as run_inspection
from adaptive_tangents.runs.results import write_results
from adaptive_tangents.runs.user_files import (
    check_runs,
    find_checkpoints,
    fit_data,
    load_checkpoint,
    load_data,
    load_model,
)


def inspect(
    model: str,
    data: Path,
    out: Path,
    *,
    start: Path | None,
    end: Path | None,
    checkpoints: str | None,
    samples: int | None,
    seed: int,
    outputs: str,
    wrt: list[str] | None,
    nodes: int | None,
    device: str,
    quick: bool,
) -> None:
    """Measure, write the results and print the findings."""
    check_device("inspect", device)
    if (checkpoints is None) == (start is None or end is None) or (checkpoints is not None and (start or end)):
        raise TangentError("inspect: give either --start and --end, or --checkpoints 'run/*.pt'")
    check_folder("inspect", out, PAGES["inspect"]().figures)
    if start is not None and end is not None and start.resolve() == end.resolve():
        raise TangentError(f"inspect: --start and --end are the same file, {start}; give two different files")
    loaded = load_data(data)
    network = load_model(model).to(device)
    check_runs(network, fit_data(loaded, network), data)
    paths = find_checkpoints(checkpoints) if checkpoints is not None else [path for path in (start, end) if path]
    states = {_title(path, paths): load_checkpoint(path, network) for path in paths}
    config = InspectConfig(
        samples=InspectConfig.samples if samples is None else samples,
        seed=seed,
        outputs=outputs,
        wrt=tuple(wrt) if wrt else None,
        nodes=nodes,
    )
    with one_bar() as progress:
        result = run_inspection(network, states, loaded, config.quick() if quick else config, progress=progress)
    write_results(result.results | {"command": typed(), "model": model, "data_file": data.name}, result.arrays, out)
    finish(out)


def _title(path: Path, paths: Sequence[Path]) -> str:
    """A checkpoint's name, with its folder if two names are equal."""
    return path.stem if len({p.stem for p in paths}) == len(paths) else str(path)
