"""`inspect`: what training did to a user's network."""

import warnings
from pathlib import Path
from typing import Any

import typer

from adaptive_tangents.checks import listed
from adaptive_tangents.commands.checks import check_device, check_exists, check_folder, tell_earlier
from adaptive_tangents.commands.console import console, errors, one_bar, print_plan, typed
from adaptive_tangents.commands.reading import Reading, opened, read_data
from adaptive_tangents.commands.report import PAGES, finish
from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.inspection import InspectConfig, KeptInFolder
from adaptive_tangents.inspection.api import inspect_states as run_inspection
from adaptive_tangents.inspection.kept import FOLDER as STAGES
from adaptive_tangents.loading.checkpoint_order import Order
from adaptive_tangents.loading.checkpoints import is_series
from adaptive_tangents.runs.own_files import BLOCKS_FILE, LORA_FILE

INTERRUPTED = 130
"""What the command ends with after Ctrl-C."""


def inspect(
    model: str | None,
    data: Path,
    out: Path,
    *,
    start: Path | None,
    end: Path | None,
    checkpoints: str | None,
    base: Path | None,
    merged: bool,
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
    if checkpoints is None and start is not None and end is None and is_series(start):
        checkpoints, start = str(start), None
    if (checkpoints is None) == (start is None or end is None) or (checkpoints is not None and (start or end)):
        raise TangentError("inspect: give either --start and --end, or --checkpoints 'run/*.pt'")
    check_folder("inspect", out, PAGES["inspect"]().figures, (BLOCKS_FILE, LORA_FILE))
    if start is not None and end is not None and start.resolve() == end.resolve():
        raise TangentError(f"inspect: --start and --end are the same file, {start}; give two different files")
    check_exists("inspect", data)
    tell_earlier(out, parts=STAGES, resumed=resume)
    series = opened(
        "inspect", model=model, start=start, end=end, checkpoints=checkpoints, base=base, merged=merged, device=device
    )
    if series.order is not None:
        _print_order(series.order)
    for doubt in series.doubts:
        _warn(doubt)
    most = InspectConfig.samples if samples is None else samples
    network, loaded = read_data(data, series, "inspect", reading, most=most, seed=seed)
    config = InspectConfig(
        samples=most,
        seed=seed,
        outputs=outputs,
        wrt=series.selected(wrt),
        nodes=nodes,
    )
    kept = KeptInFolder(out, resume=resume)
    try:
        with one_bar(timed=True) as progress, warnings.catch_warnings():
            warnings.simplefilter("always", TangentWarning)
            warnings.showwarning = _shown  # type: ignore[assignment]
            found = run_inspection(
                network, series.states, loaded, config.quick() if quick else config, doubts=series.doubts,
                said={"command": typed(), "model": series.source, "data_file": data.name},
                progress=progress, show=print_plan, kept=kept, names=series.names,
            )  # fmt: skip
    except KeyboardInterrupt as error:
        if not kept.written:
            raise
        _say(f"interrupted; finished stages are in {kept}, and the same command with --resume continues")
        raise typer.Exit(INTERRUPTED) from error
    found.write(out)
    try:
        finish(out)
    except KeyboardInterrupt as error:
        _say(
            f"interrupted while the report was drawn; the results are there: adaptive-tangents report {out} draws them"
        )
        raise typer.Exit(INTERRUPTED) from error
    if found.results["interrupted"]:
        _say(
            f"interrupted; the report holds what was finished, without {listed(found.results['interrupted'])}; the same "
            "command with --resume continues"
        )
        raise typer.Exit(INTERRUPTED)


def _print_order(order: Order) -> None:
    """The checkpoints in the order that the report goes by, before any work starts."""
    console.print(f"{len(order.paths)} checkpoints, in the order of {order.basis}:", highlight=False, markup=False)
    for path, place in zip(order.paths, order.places, strict=True):
        line = f"  {path}" + (f"  ({place})" if place else "")
        console.print(line, soft_wrap=True, highlight=False, markup=False)


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
