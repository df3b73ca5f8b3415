"""The command line: ``adaptive-tangents reproduce`` and ``adaptive-tangents report``."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from adaptive_tangents import __version__
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments import kernel_alignment
from adaptive_tangents.experiments.checkpoints import read_checkpoints, write_checkpoint
from adaptive_tangents.experiments.common import Progress as StageProgress
from adaptive_tangents.experiments.training import SGD
from adaptive_tangents.report import build_report, load_results, summary_table, write_results

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="How a network's tangent features change when it learns, and the exact model of that change.",
)  # fmt: skip
console = Console(width=None if sys.stdout.isatty() else 120)
errors = Console(stderr=True)

EXPERIMENTS = (kernel_alignment.NAME,)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """How a network's tangent features change when it learns, and the exact model of that change."""
    if version:
        console.print(f"adaptive-tangents {__version__}")
        raise typer.Exit


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help=f"The experiment: {', '.join(EXPERIMENTS)}, or all.")],
    data: Annotated[str, typer.Option(help="mnist5k (embedded) or mnist (files, else OpenML).")] = "mnist5k",
    data_dir: Annotated[Path | None, typer.Option(help="Folder that holds MNIST's IDX files.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results and report [default: runs/NAME].")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, samples and batches.")] = 0,
    samples: Annotated[int, typer.Option(help="Training samples the kernels are of.")] = 500,
    epochs: Annotated[int, typer.Option(help="Epochs of training.")] = 500,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="A small run to see it work, whatever --samples and --epochs say: its numbers mean little."
        ),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what an interrupted run in OUT has trained.")] = False,
) -> None:
    """Run a published experiment on real data and write results.json, figures, checkpoints and report.html."""
    with _worded_errors():
        if name not in (*EXPERIMENTS, "all"):
            raise TangentError(
                f"reproduce: there is no experiment {name!r}; choose from {', '.join(EXPERIMENTS)} or all"
            )
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise TangentError(f"reproduce: device {device!r} cannot be used here; use --device cpu") from error
        folder = out or Path("runs") / kernel_alignment.NAME
        config = kernel_alignment.KernelAlignmentConfig(
            data=data, data_dir=None if data_dir is None else str(data_dir), seed=seed, kernel_samples=samples,
            training=SGD(epochs=epochs),
        )  # fmt: skip
        if quick:
            config = replace(
                config, training=SGD(epochs=20), kernel_samples=100, path_nodes=16, strengths=(10.0, 100.0)
            )
        settings = kernel_alignment.config_dict(config)
        earlier = read_checkpoints(folder, settings) if resume else {}
        with _progress() as progress:
            result = kernel_alignment.run(
                config, device=device, progress=progress, resume=earlier,
                save=lambda key, tensors: write_checkpoint(folder, key, tensors, settings),
            )  # fmt: skip
        write_results(result.results | {"command": _command()}, result.arrays, folder)
        _finish(folder)


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="Folder of an earlier run.")]) -> None:
    """Draw the figures and the page of a result folder again."""
    with _worded_errors():
        _finish(directory)


def _finish(folder: Path) -> None:
    with console.status("Drawing the report"):
        page = build_report(folder)
    results, _ = load_results(folder)
    table = Table(
        title=f"{results['experiment']} on {results['data']['name']}, {results['data']['train']} training samples"
    )
    for k, heading in enumerate(("", "this run", "paper", "project, 2,850 samples")):
        table.add_column(heading, justify="right" if k else "left", no_wrap=k > 0)
    for label, *values in summary_table(results):
        table.add_row(label.replace("_0", "₀"), *values)
    console.print(table)
    # Plain text, unwrapped: a path that is broken over lines cannot be opened.
    console.print(f"Report: {page.resolve()}", soft_wrap=True, highlight=False)


@contextmanager
def _progress() -> Iterator[StageProgress]:
    """A bar with the time left; where nobody watches, one line a stage."""
    columns = (
        TextColumn("{task.description:<18}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, speed_estimate_period=120) as bar:
        task = bar.add_task("starting", total=1.0)
        seen: set[str] = set()

        def update(stage: str, fraction: float) -> None:
            bar.update(task, description=stage, completed=fraction)
            if stage not in seen and not console.is_terminal:
                console.print(f"{fraction:4.0%} {stage}")
            seen.add(stage)

        yield update


@contextmanager
def _worded_errors() -> Iterator[None]:
    """Errors of the library end the command with their message; an interruption says how to go on."""
    try:
        yield
    except TangentError as error:
        errors.print(f"[red]error[/red] {error}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        errors.print("interrupted; the same command with --resume keeps what was trained")
        raise typer.Exit(130) from error


def _command() -> str:
    return shlex.join(["adaptive-tangents", *sys.argv[1:]])
