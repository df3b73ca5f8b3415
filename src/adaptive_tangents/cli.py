"""The command line: ``adaptive-tangents reproduce``, ``inspect``, ``kernel`` and ``report``."""

import difflib
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from adaptive_tangents import __version__
from adaptive_tangents.contraction import check_outputs
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.overview_page import counts
from adaptive_tangents.experiments.pages import PAGES as STUDY_PAGES
from adaptive_tangents.experiments.registry import STUDIES
from adaptive_tangents.experiments.study import Asked, Study
from adaptive_tangents.inspection import InspectConfig
from adaptive_tangents.inspection import run as run_inspection
from adaptive_tangents.inspection.outputs import pick
from adaptive_tangents.inspection.page import PAGE as INSPECT_PAGE
from adaptive_tangents.inspection.page import findings
from adaptive_tangents.memory import parse_bytes
from adaptive_tangents.reporting.report import Finding, build_report, page_of, summary_table
from adaptive_tangents.runs.parallel import side_by_side
from adaptive_tangents.runs.record import Progress as StageProgress
from adaptive_tangents.runs.record import settings
from adaptive_tangents.runs.results import ARRAYS_FILE, RESULTS_FILE, load_results, write_results
from adaptive_tangents.runs.summary import NAME as NAME_OF_ALL
from adaptive_tangents.runs.summary import collect
from adaptive_tangents.runs.units import StoredUnits
from adaptive_tangents.runs.user_files import (
    check_runs,
    find_checkpoints,
    fit_data,
    load_checkpoint,
    load_data,
    load_model,
)
from adaptive_tangents.sketches import Sketch
from adaptive_tangents.storing import kernel_to_store, plan_kernel

PAGES = STUDY_PAGES | {"inspect": lambda: INSPECT_PAGE}

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="How a network's tangent features change when it learns, and the exact model of that change.",
)  # fmt: skip
console = Console(width=None if sys.stdout.isatty() else 120)
errors = Console(stderr=True)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """How a network's tangent features change when it learns, and the exact model of that change."""
    if version:
        console.print(f"adaptive-tangents {__version__}")
        raise typer.Exit


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help=f"The experiment: {', '.join(STUDIES)}, or all.")],
    data: Annotated[
        str, typer.Option(help="mnist5k (embedded), mnist (files, else OpenML), cifar10, openml:NAME.")
    ] = "mnist5k",
    data_dir: Annotated[Path | None, typer.Option(help="Folder that holds the files of MNIST and CIFAR-10.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results and report [default: runs/NAME]; with all, one folder in it for each."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, samples and batches; the first of several.")] = 0,
    seeds: Annotated[int | None, typer.Option(help="How many seeds, where an experiment takes several.")] = None,
    samples: Annotated[int | None, typer.Option(help="Training samples the kernels and exact models are of.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of training.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    quick: Annotated[
        bool, typer.Option("--quick", help="A small run to see it work: its numbers mean little.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="More seeds and sizes than usual: hours.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what an interrupted run in OUT has made.")] = False,
    jobs: Annotated[
        int | None,
        typer.Option(help="With all: how many at once, sharing the cores [default: one a core to 4; on cuda 1]."),
    ] = None,
) -> None:
    """Run a published experiment and write results.json, figures, checkpoints and report.html."""
    with _worded_errors():
        names = tuple(STUDIES) if name == "all" else (name,)
        if not set(names) <= set(STUDIES):
            near = difflib.get_close_matches(name, (*STUDIES, "all"), n=1)
            raise TangentError(
                f"reproduce: there is no experiment {name!r}; choose from {', '.join(STUDIES)} or all"
                + (f" (did you mean {near[0]}?)" if near else "")
            )
        if quick and full:
            raise TangentError("reproduce: --quick and --full exclude each other; give one of them or neither")
        if seeds is not None and seeds < 1:
            raise TangentError(f"reproduce: --seeds is at least 1, got {seeds}")
        if jobs is not None and jobs < 1:
            raise TangentError(f"reproduce: --jobs is at least 1, got {jobs}")
        _check_device("reproduce", device)
        if out is not None:
            _check_folder("reproduce", out)
        asked = Asked(
            size="quick" if quick else "full" if full else "standard",
            data=data, data_dir=None if data_dir is None else str(data_dir), seed=seed, seeds=seeds, samples=samples,
            epochs=epochs,
        )  # fmt: skip
        root = out or Path("runs")
        folders = {each: root if out and name != NAME_OF_ALL else root / each for each in names}
        missing = [each for each in names if not (_complete(STUDIES[each], asked, folders[each]) and resume)]
        at_once = min(jobs or _jobs(device), len(missing))
        if at_once > 1:
            works = {
                each: partial(_reproduce, each, asked, folders[each], device, command=_command(each), resume=resume)
                for each in sorted(names, key=lambda name: -STUDIES[name].minutes)
                if each in missing
            }
            with _bars() as progress:
                side_by_side(works, at_once=at_once, threads=max(1, _cores() // at_once), progress=progress)
        for each, folder in folders.items():
            if at_once == 1 and each in missing:
                with _progress() as progress:
                    _reproduce(each, asked, folder, device, progress, command=_command(each), resume=resume)
            _finish(folder)
        if name == NAME_OF_ALL:
            _finish(collect(root, names, command=_command()))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _jobs(device: str) -> int:
    """Experiments at once, unless asked otherwise: more than four would want too much memory."""
    return min(_cores(), 4) if device == "cpu" else 1


def _complete(study: Study, asked: Asked, folder: Path) -> bool:
    """Whether the folder holds all results of a run with these settings."""
    StoredUnits(folder, _settings(study, asked))
    return (folder / RESULTS_FILE).is_file() and (folder / ARRAYS_FILE).is_file()


def _settings(study: Study, asked: Asked) -> dict[str, Any]:
    return {"experiment": study.name, **settings(study.configured(asked))}


def _reproduce(
    name: str, asked: Asked, folder: Path, device: str, progress: StageProgress, *, command: str, resume: bool
) -> None:
    study = STUDIES[name]
    units = StoredUnits(folder, _settings(study, asked), resume=resume)
    result = study.run(study.configured(asked), device=device, progress=progress, units=units)
    units.settle()
    write_results(result.results | {"command": command}, result.arrays, folder)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Option(help="What makes the network: package.module:factory or path/to/file.py:factory.")
    ],
    data: Annotated[Path, typer.Option(help="An .npz file: x (or x0, x1, …, or argument names), y, classes.")],
    start: Annotated[Path | None, typer.Option(help="Checkpoint before training, .pt or .safetensors.")] = None,
    end: Annotated[Path | None, typer.Option(help="Checkpoint after training.")] = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(help="Instead: a quoted pattern of checkpoints; the first is the start, the last the end."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results and report.")] = Path("runs/inspect"),
    samples: Annotated[int, typer.Option(help="Samples the kernels are of.")] = InspectConfig.samples,
    seed: Annotated[int, typer.Option(help="Seed of which samples.")] = 0,
    outputs: Annotated[
        str, typer.Option(help="auto, main, main:K, margin, all, or outputs by number or class name, with commas.")
    ] = "auto",
    wrt: Annotated[
        list[str] | None, typer.Option(help="Only parameters whose name matches this pattern; may be repeated.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(help="Nodes of the path average; else as many as it needs, to 8.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Few samples and nodes, to see it work.")] = False,
) -> None:
    """Measure what training did to a network of yours, between two checkpoints or along many."""
    with _worded_errors("interrupted; nothing was written"):
        _check_device("inspect", device)
        if (checkpoints is None) == (start is None or end is None) or (checkpoints is not None and (start or end)):
            raise TangentError("inspect: give --start and --end, or --checkpoints 'run/*.pt'; one or the other")
        config = InspectConfig(
            samples=samples, seed=seed, outputs=outputs, wrt=tuple(wrt) if wrt else None, nodes=nodes
        )
        _check_folder("inspect", out)
        if start is not None and end is not None and start.resolve() == end.resolve():
            raise TangentError(f"inspect: --start and --end are the same file, {start}; give two")
        loaded = load_data(data)
        network = load_model(model).to(device)
        check_runs(network, fit_data(loaded, network), data)
        paths = find_checkpoints(checkpoints) if checkpoints is not None else [start, end]
        states = {_title(path, paths): load_checkpoint(path, network) for path in paths if path is not None}
        with _progress() as progress:
            result = run_inspection(network, states, loaded, config.quick() if quick else config, progress=progress)
        write_results(
            result.results | {"command": _command(), "model": model, "data_file": data.name}, result.arrays, out
        )
        _finish(out)


@app.command()
def kernel(
    model: Annotated[
        str, typer.Option(help="What makes the network: package.module:factory or path/to/file.py:factory.")
    ],
    data: Annotated[Path, typer.Option(help="An .npz file: x (or x0, x1, …, or argument names).")],
    out: Annotated[Path, typer.Option(help="The store: a folder that is made, K.zarr say.")],
    weights: Annotated[
        Path | None, typer.Option(help="Its parameters, .pt or .safetensors; else as it is made.")
    ] = None,
    data2: Annotated[Path | None, typer.Option(help="Samples of the columns, .npz; else those of the rows.")] = None,
    outputs: Annotated[str, typer.Option(help="trace (summed over outputs), full or diagonal.")] = "trace",
    wrt: Annotated[
        list[str] | None, typer.Option(help="Only parameters whose name matches this pattern; may be repeated.")
    ] = None,
    by_block: Annotated[bool, typer.Option("--by-block", help="One kernel for every block of parameters.")] = False,
    tile: Annotated[int | None, typer.Option(help="Samples a side of a tile; else chosen by the plan.")] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="Of each process, 4GB say; else half of what is free.")
    ] = None,
    float64: Annotated[bool, typer.Option("--float64", help="Everything in double precision.")] = False,
    sketch: Annotated[int | None, typer.Option(help="Sketch features to this many coordinates: not exact.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sketch.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda; under torchrun every process its own.")] = "cpu",
    plan: Annotated[bool, typer.Option("--plan", help="Say what it will take, and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the store in OUT, if it is there.")] = False,
) -> None:
    """Make a tangent kernel of any size into a Zarr store, tile by tile; under torchrun by several processes."""
    with _worded_errors("interrupted; the same command with --resume makes the tiles that are missing"):
        rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device
        _check_device("kernel", device)
        check_outputs("kernel", outputs)
        limit = None if memory_limit is None else parse_bytes("kernel", memory_limit)
        network = load_model(model, "kernel").to(device)
        if weights is not None:
            network.load_state_dict(load_checkpoint(weights, network, "kernel"))
        batches = []
        for file in (data,) if data2 is None else (data, data2):
            loaded = fit_data(load_data(file, "kernel"), network, "kernel")
            check_runs(network, loaded, file, "kernel")
            batches.append(loaded.x)
        x, x2 = batches[0], None if data2 is None else batches[1]
        arguments: dict[str, Any] = {
            "output": partial(pick, call="kernel"),
            "outputs": outputs, "wrt": tuple(wrt) if wrt else None, "by_block": by_block, "tile": tile,
            "memory_limit": limit, "dtype": torch.float64 if float64 else None,
            "sketch": None if sketch is None else Sketch(sketch, seed=seed),
        }  # fmt: skip
        if rank == 0:
            console.print(
                str(plan_kernel(network, x, x2, **arguments, processes=processes)), highlight=False, soft_wrap=True
            )
        if plan:
            return
        with _progress() if rank == 0 else nullcontext() as progress:
            store = kernel_to_store(network, x, out, x2, **arguments, resume=resume, progress=progress)
        if rank == 0:
            console.print(f"Kernel: {store.path.resolve()}", soft_wrap=True, highlight=False)


def _title(path: Path | None, paths: list[Path | None] | list[Path]) -> str:
    """A checkpoint's name, with its folder where two have the same."""
    assert path is not None
    return path.stem if len({p.stem for p in paths if p}) == len(paths) else str(path)


def _check_folder(call: str, out: Path) -> None:
    """Before hours are spent: results have a folder to go to."""
    at = next((place for place in (out, *out.parents) if place.exists()), out)
    if at.exists() and not at.is_dir():
        raise TangentError(f"{call}: --out is a folder, and {at} is a file; give another path")


def _check_device(call: str, device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TangentError(f"{call}: device {device!r} cannot be used here; use --device cpu") from error


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="Folder of an earlier run.")]) -> None:
    """Draw the figures and the page of a result folder again."""
    with _worded_errors():
        _finish(directory)


def _finish(folder: Path) -> None:
    with console.status("Drawing the report"):
        page = build_report(folder, PAGES)
    results, _ = load_results(folder)
    table = summary_table(results, page_of(results, PAGES))
    if results["experiment"] == "inspect":
        for sentence in findings(results):
            console.print(f"• {sentence}", highlight=False)
    elif results["experiment"] == NAME_OF_ALL:
        for each, run in results["runs"].items():
            found = ", ".join(
                f"{count} {verdict}" for verdict, count in counts(run["claims"].values()).items() if count
            )
            console.print(f"{each}: {found}", highlight=False)
    elif table:
        _print_table(results, table)
    for claim in results.get("claims", {}).values():
        mark = {"holds": "✓", "holds in part": "~"}.get(claim["verdict"], "✗")
        console.print(f"{mark} {claim['claim']}: {claim['evidence']}", highlight=False)
    # Plain text, unwrapped: a path that is broken over lines cannot be opened.
    console.print(f"Report: {page.resolve()}", soft_wrap=True, highlight=False)


def _print_table(results: Mapping[str, Any], rows: Iterable[Finding]) -> None:
    table = Table(
        title=f"{results['experiment']} on {results['data']['name']}, {results['data']['train']} training samples"
    )
    for k, heading in enumerate(("", "this run", "paper", "project, 2,850 samples")):
        table.add_column(heading, justify="right" if k else "left", no_wrap=k > 0)
    for label, *values in rows:
        table.add_row(label.replace("_0", "₀"), *values)
    console.print(table)


@contextmanager
def _progress() -> Iterator[StageProgress]:
    """A bar with the time left; where nobody watches, one line a stage."""
    with _bars() as bars:
        yield partial(bars, "")


@contextmanager
def _bars() -> Iterator[Callable[[str, str, float], None]]:
    """A bar for each name."""
    columns = (
        TextColumn("{task.description:<18}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, speed_estimate_period=120) as bar:
        tasks: dict[str, TaskID] = {}
        seen: set[tuple[str, str]] = set()

        def update(name: str, stage: str, fraction: float) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=1.0)
            described = f"{name}: {stage}" if name else stage
            bar.update(tasks[name], description=described, completed=fraction)
            if (name, stage) not in seen and not console.is_terminal:
                console.print(f"{fraction:4.0%} {described}")
            seen.add((name, stage))

        yield update


@contextmanager
def _worded_errors(
    interrupted: str = "interrupted; the same command with --resume keeps what was trained",
) -> Iterator[None]:
    """Errors of the library end the command with their message; an interruption says how to go on."""
    try:
        yield
    except TangentError as error:
        errors.print(f"[red]error[/red] {error}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        errors.print(interrupted)
        raise typer.Exit(130) from error


def _command(experiment: str | None = None) -> str:
    """What was typed; of one experiment where all were asked for."""
    words = sys.argv[1:]
    if experiment is not None and words[:1] == ["reproduce"]:
        words = [experiment if word == NAME_OF_ALL else word for word in words]
    return shlex.join(["adaptive-tangents", *words])
