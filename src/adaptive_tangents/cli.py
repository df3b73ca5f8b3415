"""The command line, ``adaptive-tangents``: ``reproduce``, ``inspect``, ``compare``, ``forecast``, ``kernel``, ``report``.

This module holds only options and help. The work is in ``commands``, which is imported when a command runs, so that help,
completion and the version respond at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptive_tangents._version import __version__
from adaptive_tangents.commands.console import ALL, console, worded_errors
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.registry import STUDIES
from adaptive_tangents.experiments.study import Asked

ABOUT = "How a network's tangent features change when it learns, and the exact model of that change."
EXTRA = ("jinja2", "markupsafe", "matplotlib", "mlxtend", "sklearn", "threadpoolctl")

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=ABOUT)

Model = Annotated[
    str | None,
    typer.Option(
        help="The network, where the checkpoints do not say it: package.module:factory, path/to/file.py:factory, or "
        "timm:NAME?num_classes=10."
    ),
]
Base = Annotated[
    Path | None, typer.Option(help="Folder of the network that adapters were trained on (default: the one they name).")
]
Merged = Annotated[
    bool, typer.Option("--merged", help="Measure the weights with adapters merged in, instead of the adapters.")
]
Wrt = Annotated[
    list[str] | None, typer.Option(help="Use only parameters whose name matches this pattern; may be repeated.")
]
DataPath = Annotated[
    Path,
    typer.Option(
        help="Samples: .npz (x, or x0, x1, …, or argument names; y; classes), .csv, .tsv, .jsonl, .json, .parquet, a folder "
        "of images by class, or a folder of Hugging Face datasets."
    ),
]
Text = Annotated[
    str | None,
    typer.Option(help="Column of texts, two with a comma between for pairs (default: found by its name)."),
]
Label = Annotated[str | None, typer.Option(help="Column of labels, none for no labels (default: found by its name).")]
HeldOut = Annotated[
    Path | None, typer.Option(help="Samples that training did not see, in the form of --data; told apart.")
]
Output = Annotated[
    str | None,
    typer.Option(
        help="What is measured: loss (of each sample), last-token, or module:function or path/to/file.py:function of what "
        "the network returns (default: its output; of a causal language model the loss)."
    ),
]
MaxLength = Annotated[
    int | None, typer.Option(help="The most tokens of a text (default: as tokenizer and network allow).")
]
TokenizerFolder = Annotated[Path | None, typer.Option("--tokenizer", help="Folder with tokenizer.json, for texts.")]
ImageSize = Annotated[
    str | None, typer.Option(help="Size that images are scaled to: 224, or height and width, 224x256.")
]
Normalize = Annotated[
    str | None,
    typer.Option(help="Of images: none, imagenet, or means/deviations of the channels, 0.5,0.5,0.5/0.5,0.5,0.5."),
]
DATA = {
    "text": Text, "label": Label, "held_out": HeldOut, "output": Output, "max_length": MaxLength,
    "tokenizer": TokenizerFolder, "image_size": ImageSize, "normalize": Normalize,
}  # fmt: skip
"""What `commands.reading.Reading` takes."""
Seed = Annotated[int, typer.Option(help="Seed of weights, samples and batches; with several seeds, the first.")]


@contextmanager
def _extra(call: str) -> Iterator[None]:
    """Report a missing package of the extra `report`, and how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        raise TangentError(
            f"{call}: {error.name} is not installed; pip install 'adaptive-tangents[report]' installs what reports and "
            "experiments need"
        ) from error


def _reads_data(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Put the options of DATA where a command has the parameter ``reading``, which gets them by name."""
    options = {name: kind for name, kind in DATA.items() if name not in without}
    added = [Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind) for name, kind in options.items()]

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def called(**given: Any) -> None:
            reading = {name: given.pop(name) for name in options}
            command(**given, reading=reading)

        own = signature(command).parameters.values()
        parts = [part for one in own for part in (added if one.name == "reading" else [one])]
        called.__signature__ = Signature(parts)  # type: ignore[attr-defined]
        return called

    return with_options


@app.callback(invoke_without_command=True, help=ABOUT)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Options that come before any command."""
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
    data_dir: Annotated[Path | None, typer.Option(help="Folder with the files of MNIST and CIFAR-10.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results and report (default: runs/NAME); with all, it gets a folder for each."),
    ] = None,
    seed: Seed = 0,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds, if the experiment takes several.")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Number of training samples for kernels and exact models.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of training.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.", autocompletion=lambda: ["cpu", "cuda"])] = "cpu",
    quick: Annotated[
        bool, typer.Option("--quick", help="A small run to see it work; its numbers mean little.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="More seeds and sizes than usual; takes hours.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run in OUT.")] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="With all: how many run at once, sharing the cores (default: one per core, at most 4; 1 on cuda)."
        ),
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
@_reads_data()
def inspect(
    *,
    data: DataPath,
    model: Model = None,
    start: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint before training: .pt, .safetensors, .ckpt, or a folder of Hugging Face or PEFT; alone, a folder "
            "that holds checkpoint-N."
        ),
    ] = None,
    end: Annotated[Path | None, typer.Option(help="Checkpoint after training.")] = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            help="Instead of --start and --end: a quoted pattern, or a folder that holds checkpoint-N. They are put in order "
            "by the steps that they store, else by numbers and words of their names; the order is printed first."
        ),
    ] = None,
    base: Base = None,
    merged: Merged = False,
    out: Annotated[Path, typer.Option(help="Folder for results and report.")] = Path("runs/inspect"),
    samples: Annotated[int | None, typer.Option(help="Number of samples for the kernels (default: 128).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of which samples.")] = 0,
    outputs: Annotated[
        str,
        typer.Option(help="auto, main, main:K, margin, all, or outputs by number or class name, separated by commas."),
    ] = "auto",
    wrt: Wrt = None,
    nodes: Annotated[
        int | None, typer.Option(help="Nodes of the path average (default: as many as it needs, at most 8).")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.", autocompletion=lambda: ["cpu", "cuda"])] = "cpu",
    reading: dict[str, Any],
    quick: Annotated[bool, typer.Option("--quick", help="Use few samples and nodes, to see it work.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Take what an interrupted run into OUT has finished.")
    ] = False,
) -> None:
    """Measure what training did to your network, between two checkpoints or along many."""
    with worded_errors("interrupted; nothing was written"), _extra("inspect"):
        from adaptive_tangents.commands import inspect as command
        from adaptive_tangents.commands.reading import Reading

        command.inspect(
            model, data, out, start=start, end=end, checkpoints=checkpoints, base=base, merged=merged, samples=samples,
            seed=seed, outputs=outputs, wrt=wrt, nodes=nodes, device=device, quick=quick, resume=resume,
            reading=Reading(**reading),
        )  # fmt: skip


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that inspect wrote.")],
    second: Annotated[Path, typer.Argument(metavar="DIR", help="Another.")],
    out: Annotated[Path, typer.Option(help="Folder for results and report.")] = Path("runs/compare"),
    names: Annotated[
        str | None, typer.Option(help="What the two are called, e.g. full,LoRA (default: the folders' names).")
    ] = None,
) -> None:
    """Set two inspections side by side: full fine-tuning and LoRA, two seeds, two learning rates."""
    with worded_errors("interrupted; nothing was written"), _extra("compare"):
        from adaptive_tangents.commands import compare as command

        command.compare(first, second, out, names=names)


@app.command()
@_reads_data()
def forecast(
    *,
    data: DataPath,
    model: Model = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Checkpoint before training, a file or a folder (default: the network as made)."),
    ] = None,
    end: Annotated[
        Path | None, typer.Option(help="Checkpoint after training, to compare with; the forecast does not see it.")
    ] = None,
    base: Base = None,
    merged: Merged = False,
    out: Annotated[Path, typer.Option(help="Folder for results and report.")] = Path("runs/forecast"),
    loss: Annotated[
        str,
        typer.Option(
            help="What training minimizes: squared, cross-entropy, or auto (cross-entropy for labels).",
            autocompletion=lambda: ["auto", "squared", "cross-entropy"],
        ),
    ] = "auto",
    steps: Annotated[int | None, typer.Option(help="The most steps of the forecast (default: 8).")] = None,
    max_epochs: Annotated[
        float | None,
        typer.Option(
            help="Begin no step that would take the passes beyond this many epochs of training (default: 60)."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Number of samples for the kernels (default: 128).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the held-out samples, and of those for the kernels.")] = 0,
    outputs: Annotated[
        str,
        typer.Option(help="Of the kernels: all, auto, main, main:K, or outputs by number or class name."),
    ] = "all",
    wrt: Wrt = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.", autocompletion=lambda: ["cpu", "cuda"])] = "cpu",
    reading: dict[str, Any],
    quick: Annotated[bool, typer.Option("--quick", help="Use few samples and steps, to see it work.")] = False,
) -> None:
    """Foretell what training will do to your network, without training it."""
    with worded_errors("interrupted; nothing was written"), _extra("forecast"):
        from adaptive_tangents.commands import forecast as command
        from adaptive_tangents.commands.reading import Reading

        command.forecast(
            model, data, out, weights=weights, end=end, base=base, merged=merged, loss=loss, steps=steps,
            max_epochs=max_epochs, samples=samples, seed=seed, outputs=outputs, wrt=wrt, device=device, quick=quick,
            reading=Reading(**reading),
        )  # fmt: skip


@app.command()
@_reads_data("held_out")
def kernel(
    *,
    data: DataPath,
    out: Annotated[Path, typer.Option(help="Folder of the new store, e.g. K.zarr.")],
    model: Model = None,
    weights: Annotated[
        Path | None, typer.Option(help="Checkpoint to load, a file or a folder (default: the network as made).")
    ] = None,
    base: Base = None,
    merged: Merged = False,
    data2: Annotated[Path | None, typer.Option(help="Samples of the columns (default: those of the rows).")] = None,
    outputs: Annotated[
        str,
        typer.Option(
            help="full, trace (summed over outputs) or diagonal.",
            autocompletion=lambda: ["full", "trace", "diagonal"],
        ),
    ] = "full",
    wrt: Wrt = None,
    by_block: Annotated[
        bool, typer.Option("--by-block", help="Make one kernel for every block of parameters.")
    ] = False,
    tile: Annotated[int | None, typer.Option(help="Samples per side of a tile (default: chosen by the plan).")] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="Memory of each process, e.g. 4GB (default: half of the free memory).")
    ] = None,
    float64: Annotated[bool, typer.Option("--float64", help="Compute everything in double precision.")] = False,
    sketch: Annotated[int | None, typer.Option(help="Sketch features to this many coordinates; not exact.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sketch.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda; under torchrun each process uses its own.")] = "cpu",
    reading: dict[str, Any],
    plan: Annotated[bool, typer.Option("--plan", help="Print the expected cost and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the store in OUT, if there is one.")] = False,
) -> None:
    """Write a tangent kernel of any size to a Zarr store, tile by tile; torchrun adds processes."""
    with worded_errors("interrupted; the same command with --resume makes the missing tiles"):
        from adaptive_tangents.commands import kernel as command
        from adaptive_tangents.commands.reading import Reading

        command.kernel(
            model, data, out, weights=weights, base=base, merged=merged, data2=data2, outputs=outputs, wrt=wrt,
            by_block=by_block, tile=tile, memory_limit=memory_limit, float64=float64, sketch=sketch, seed=seed,
            device=device, plan=plan, resume=resume,
            reading=Reading(**reading),
        )  # fmt: skip


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="Folder of an earlier run.")]) -> None:
    """Redraw the figures and the page of a result folder."""
    with worded_errors(), _extra("report"):
        from adaptive_tangents.commands.report import finish

        finish(directory)
