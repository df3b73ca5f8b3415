"""The command line: ``adaptive-tangents reproduce``, ``inspect``, ``kernel`` and ``report``, with their options.

Only options and help are here. What a command does is in ``commands``, imported when it runs, so that help, completion and
the version come at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from adaptive_tangents._version import __version__
from adaptive_tangents.commands.console import ALL, console, worded_errors
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.registry import STUDIES
from adaptive_tangents.experiments.study import Asked

ABOUT = "How a network's tangent features change when it learns, and the exact model of that change."
EXTRA = ("jinja2", "markupsafe", "matplotlib", "mlxtend", "sklearn", "threadpoolctl")

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=ABOUT)

Model = Annotated[str, typer.Option(help="What makes the network: package.module:factory or path/to/file.py:factory.")]
Wrt = Annotated[
    list[str] | None, typer.Option(help="Only parameters whose name matches this pattern; may be repeated.")
]
Seed = Annotated[int, typer.Option(help="Seed of weights, samples and batches; the first of several.")]


@contextmanager
def _extra(call: str) -> Iterator[None]:
    """What the extra `report` brings and is not there is named with the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        raise TangentError(
            f"{call}: {error.name} is not installed; pip install 'adaptive-tangents[report]' brings what reports and "
            "experiments need"
        ) from error


@app.callback(invoke_without_command=True, help=ABOUT)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """What comes before any command."""
    if version:
        console.print(f"adaptive-tangents {__version__}")
        raise typer.Exit


@app.command()
def reproduce(
    name: Annotated[
        str,
        typer.Argument(help=f"The experiment: {', '.join(STUDIES)}, or {ALL}.", autocompletion=lambda: [*STUDIES, ALL]),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="mnist5k (embedded), mnist (files, else OpenML), cifar10, openml:NAME.",
            autocompletion=lambda: ["mnist5k", "mnist", "cifar10"],
        ),
    ] = "mnist5k",
    data_dir: Annotated[Path | None, typer.Option(help="Folder that holds the files of MNIST and CIFAR-10.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results and report (default: runs/NAME); with all, one folder in it for each."),
    ] = None,
    seed: Seed = 0,
    seeds: Annotated[int | None, typer.Option(help="How many seeds, where an experiment takes several.")] = None,
    samples: Annotated[int | None, typer.Option(help="Training samples the kernels and exact models are of.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of training.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.", autocompletion=lambda: ["cpu", "cuda"])] = "cpu",
    quick: Annotated[
        bool, typer.Option("--quick", help="A small run to see it work: its numbers mean little.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="More seeds and sizes than usual: hours.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what an interrupted run in OUT has made.")] = False,
    jobs: Annotated[
        int | None,
        typer.Option(help="With all: how many at once, sharing the cores (default: one a core to 4; on cuda 1)."),
    ] = None,
) -> None:
    """Run a published experiment and write results.json, figures, checkpoints and report.html."""
    with worded_errors(), _extra("reproduce"):
        if quick and full:
            raise TangentError("reproduce: --quick and --full exclude each other; give one of them or neither")
        from adaptive_tangents.commands import reproduce as command

        asked = Asked(
            size="quick" if quick else "full" if full else "standard",
            data=data, data_dir=None if data_dir is None else str(data_dir), seed=seed, seeds=seeds, samples=samples,
            epochs=epochs,
        )  # fmt: skip
        command.reproduce(name, asked, out=out, device=device, resume=resume, jobs=jobs)


@app.command()
def inspect(
    model: Model,
    data: Annotated[Path, typer.Option(help="An .npz file: x (or x0, x1, …, or argument names), y, classes.")],
    start: Annotated[Path | None, typer.Option(help="Checkpoint before training, .pt or .safetensors.")] = None,
    end: Annotated[Path | None, typer.Option(help="Checkpoint after training.")] = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(help="Instead: a quoted pattern of checkpoints; the first is the start, the last the end."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results and report.")] = Path("runs/inspect"),
    samples: Annotated[int | None, typer.Option(help="Samples the kernels are of (default: 128).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of which samples.")] = 0,
    outputs: Annotated[
        str, typer.Option(help="auto, main, main:K, margin, all, or outputs by number or class name, with commas.")
    ] = "auto",
    wrt: Wrt = None,
    nodes: Annotated[
        int | None, typer.Option(help="Nodes of the path average; else as many as it needs, to 8.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.", autocompletion=lambda: ["cpu", "cuda"])] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Few samples and nodes, to see it work.")] = False,
) -> None:
    """Measure what training did to a network of yours, between two checkpoints or along many."""
    with worded_errors("interrupted; nothing was written"), _extra("inspect"):
        from adaptive_tangents.commands import inspect as command

        command.inspect(
            model, data, out, start=start, end=end, checkpoints=checkpoints, samples=samples, seed=seed, outputs=outputs,
            wrt=wrt, nodes=nodes, device=device, quick=quick,
        )  # fmt: skip


@app.command()
def kernel(
    model: Model,
    data: Annotated[Path, typer.Option(help="An .npz file: x (or x0, x1, …, or argument names).")],
    out: Annotated[Path, typer.Option(help="The store: a folder that is made, K.zarr say.")],
    weights: Annotated[
        Path | None, typer.Option(help="Its parameters, .pt or .safetensors; else as it is made.")
    ] = None,
    data2: Annotated[Path | None, typer.Option(help="Samples of the columns, .npz; else those of the rows.")] = None,
    outputs: Annotated[
        str,
        typer.Option(
            help="full, trace (summed over outputs) or diagonal.",
            autocompletion=lambda: ["full", "trace", "diagonal"],
        ),
    ] = "full",
    wrt: Wrt = None,
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
    with worded_errors("interrupted; the same command with --resume makes the tiles that are missing"):
        from adaptive_tangents.commands import kernel as command

        command.kernel(
            model, data, out, weights=weights, data2=data2, outputs=outputs, wrt=wrt, by_block=by_block, tile=tile,
            memory_limit=memory_limit, float64=float64, sketch=sketch, seed=seed, device=device, plan=plan, resume=resume,
        )  # fmt: skip


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="Folder of an earlier run.")]) -> None:
    """Draw the figures and the page of a result folder again."""
    with worded_errors(), _extra("report"):
        from adaptive_tangents.commands.report import finish

        finish(directory)
