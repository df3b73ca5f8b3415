"""`inspect`: what training did to a user's network."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from adaptive_tangents.checks import listed
from adaptive_tangents.commands.checks import check_device, check_folder
from adaptive_tangents.commands.console import console, errors, one_bar, typed
from adaptive_tangents.commands.reading import Reading, read_data
from adaptive_tangents.commands.report import PAGES, finish
from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.inspection import InspectConfig, KeptInFolder, Plan
from adaptive_tangents.inspection import run as run_inspection
from adaptive_tangents.loading import (
    find_checkpoints,
    load_checkpoint,
    load_model,
)
from adaptive_tangents.loading.checkpoint_order import Order, doubted, ordered, swapped
from adaptive_tangents.runs.results import write_results

INTERRUPTED = 130
"""What the command ends with after Ctrl-C."""


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
    resume: bool,
    reading: Reading,
) -> None:
    """Measure, write the results and print the findings."""
    check_device("inspect", device)
    if (checkpoints is None) == (start is None or end is None) or (checkpoints is not None and (start or end)):
        raise TangentError("inspect: give either --start and --end, or --checkpoints 'run/*.pt'")
    check_folder("inspect", out, PAGES["inspect"]().figures)
    if start is not None and end is not None and start.resolve() == end.resolve():
        raise TangentError(f"inspect: --start and --end are the same file, {start}; give two different files")
    most = InspectConfig.samples if samples is None else samples
    network, loaded = read_data(data, load_model(model).to(device), "inspect", reading, most=most, seed=seed)
    doubts: tuple[str, ...] = ()
    if checkpoints is not None:
        order = ordered(find_checkpoints(checkpoints))
        paths, doubts = list(order.paths), order.doubts
        _print_order(order)
    else:
        paths = [path for path in (start, end) if path]
        doubt = swapped(*paths)
        doubts = (doubt,) if doubt else ()
    for doubt in doubts:
        _warn(doubt)
    states = {_title(path, paths): load_checkpoint(path, network) for path in paths}
    config = InspectConfig(
        samples=most,
        seed=seed,
        outputs=outputs,
        wrt=tuple(wrt) if wrt else None,
        nodes=nodes,
    )
    kept = KeptInFolder(out, resume=resume)
    try:
        with one_bar(timed=True) as progress, warnings.catch_warnings():
            warnings.simplefilter("always", TangentWarning)
            warnings.showwarning = _shown  # type: ignore[assignment]
            result = run_inspection(
                network, states, loaded, config.quick() if quick else config,
                progress=progress, show=_print_plan, kept=kept,
            )  # fmt: skip
    except KeyboardInterrupt as error:
        if not kept.written:
            raise
        _say(f"interrupted; finished stages are in {kept}, and the same command with --resume continues")
        raise typer.Exit(INTERRUPTED) from error
    results = result.results | {"command": typed(), "model": model, "data_file": data.name}
    results["limits"] = [*results["limits"], *map(doubted, doubts)]
    write_results(results, result.arrays, out)
    try:
        finish(out)
    except KeyboardInterrupt as error:
        _say(
            f"interrupted while the report was drawn; the results are there: adaptive-tangents report {out} draws them"
        )
        raise typer.Exit(INTERRUPTED) from error
    if results["interrupted"]:
        _say(
            f"interrupted; the report holds what was finished, without {listed(results['interrupted'])}; the same command "
            "with --resume continues"
        )
        raise typer.Exit(INTERRUPTED)


def _print_order(order: Order) -> None:
    """The checkpoints in the order that the report goes by, before any work starts."""
    console.print(f"{len(order.paths)} checkpoints, in the order of {order.basis}:", highlight=False, markup=False)
    for path, place in zip(order.paths, order.places, strict=True):
        line = f"  {path}" + (f"  ({place})" if place else "")
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _print_plan(plan: Plan) -> None:
    """What will be done and what it takes, before it starts."""
    console.print(str(plan), soft_wrap=True, highlight=False)


def _shown(message: Warning | str, category: type[Warning], *place: Any, plainly: Any = warnings.showwarning) -> None:
    """Print the library's own warnings as a line; leave others to Python."""
    if issubclass(category, TangentWarning):
        _warn(str(message))
    else:
        plainly(message, category, *place)


def _warn(message: str) -> None:
    _say(f"warning: {message.removeprefix('inspect: ')}")


def _say(message: str) -> None:
    errors.print(message, soft_wrap=True, highlight=False, markup=False)


def _title(path: Path, paths: Sequence[Path]) -> str:
    """A checkpoint's name, with its folder if two names are equal."""
    return path.stem if len({p.stem for p in paths}) == len(paths) else str(path)
