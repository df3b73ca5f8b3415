"""What every command prints with: the console, progress bars, errors in words, and the command as it was typed."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from adaptive_tangents.errors import TangentError

console = Console(width=None if sys.stdout.isatty() else 120)
errors = Console(stderr=True)
ALL = "all"
"""The word for every study."""


@contextmanager
def bars() -> Iterator[Callable[[str, str, float], None]]:
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
def one_bar() -> Iterator[Callable[[str, float], None]]:
    """A bar with the time left; where nobody watches, one line a stage."""
    with bars() as update:
        yield partial(update, "")


@contextmanager
def worded_errors(
    interrupted: str = "interrupted; the same command with --resume keeps what was trained",
) -> Iterator[None]:
    """Errors of the library end the command with their message; an interruption says how to go on."""
    try:
        yield
    except TangentError as error:
        errors.print(f"[red]error[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        errors.print(interrupted)
        raise typer.Exit(130) from error


def typed(study: str | None = None) -> str:
    """The command as it was typed; of one study where all were asked for."""
    words = sys.argv[1:]
    if study is not None and words[:1] == ["reproduce"]:
        words = [study if word == ALL else word for word in words]
    return shlex.join(["adaptive-tangents", *words])
