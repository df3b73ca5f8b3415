"""What the commands share for printing: the console, progress bars, error messages, and the command as typed."""

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
"""The name that means all studies."""


@contextmanager
def bars() -> Iterator[Callable[[str, str, float], None]]:
    """One progress bar per name."""
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
    """A bar with the time left; without a terminal, one line per stage."""
    with bars() as update:
        yield partial(update, "")


@contextmanager
def worded_errors(
    interrupted: str = "interrupted; the same command with --resume continues it",
) -> Iterator[None]:
    """End the command with the message of a library error; an interruption says how to continue."""
    try:
        yield
    except TangentError as error:
        errors.print(f"[red]error[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        errors.print(interrupted)
        raise typer.Exit(130) from error


def typed(study: str | None = None) -> str:
    """The command as typed; if all studies were asked for, the command for one of them."""
    words = sys.argv[1:]
    if study is not None and words[:1] == ["reproduce"]:
        words = [study if word == ALL else word for word in words]
    return shlex.join(["adaptive-tangents", *words])
