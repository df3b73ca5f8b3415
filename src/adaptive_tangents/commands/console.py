"""What the commands share for printing: the console, progress bars, error messages, and the command as typed."""

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from adaptive_tangents.errors import TangentError
from adaptive_tangents.runtime.progress import PERCENT, duration, in_notebook, redrawn


class _Plain(Console):
    """A console that prints text as it is: brackets and colons are no markup, and what cannot be shown is spelled out."""

    def __init__(self, **options: Any) -> None:
        # A kernel sets FORCE_COLOR for all that it starts; its user, who may read what a command prints, did not ask for it.
        super().__init__(markup=False, emoji=False, force_terminal=False if in_notebook() else None, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown(text, self.encoding), **options)


def shown(text: str, encoding: str = "utf-8") -> str:
    r"""Text without characters that steer a terminal or that its encoding lacks; they become escapes such as \x1b.

    >>> print(shown("a\x1b[31mb"))
    a\x1b[31mb
    """
    plain = re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)
    return plain.encode(encoding, "backslashreplace").decode(encoding)


console = _Plain(width=None if sys.stdout.isatty() else 120)
errors = _Plain(stderr=True)
ALL = "all"
"""The name that means all studies."""


class _ExpectedTimeLeft(ProgressColumn):
    """The time left where progress is the share of the expected time that has passed."""

    def render(self, task: Task) -> Text:
        left = left_of(task.elapsed or 0.0, task.completed)
        return Text("-:--:--" if left is None else str(timedelta(seconds=round(left))), style="progress.remaining")


def left_of(elapsed: float, share: float) -> float | None:
    """Seconds left when a share of the expected time has passed; None before there is an estimate.

    >>> left_of(30.0, 0.25)
    90.0
    """
    return elapsed * (1 - share) / share if share > 0 else None


@contextmanager
def bars(*, timed: bool = False) -> Iterator[Callable[[str, str, float], None]]:
    """One progress bar per name; ``timed`` if progress is the share of the expected time, not of the work."""
    columns = (
        TextColumn("{task.description:<18}", markup=False), BarColumn(), TaskProgressColumn(PERCENT), TimeElapsedColumn(),
        TextColumn("left", markup=False), _ExpectedTimeLeft() if timed else TimeRemainingColumn(),
    )  # fmt: skip
    live = redrawn(console.file)
    with Progress(*columns, console=console, transient=True, speed_estimate_period=120, disable=not live) as bar:
        tasks: dict[str, TaskID] = {}
        seen: set[tuple[str, str]] = set()

        def update(name: str, stage: str, fraction: float) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=1.0)
            described = shown(f"{name}: {stage}" if name else stage, console.encoding)
            bar.update(tasks[name], description=described, completed=fraction)
            if (name, stage) not in seen and not live:
                left = left_of(bar.tasks[tasks[name]].elapsed or 0.0, fraction) if timed else None
                words = "" if left is None else f", about {duration(left)} left"
                console.print(f"{100 * fraction:3.0f} % {described}{words}")
            seen.add((name, stage))

        yield update


@contextmanager
def one_bar(*, timed: bool = False) -> Iterator[Callable[[str, float], None]]:
    """A bar with the time left; without a terminal, one line per stage."""
    with bars(timed=timed) as update:
        yield partial(update, "")


def print_plan(plan: object) -> None:
    """What will be done and what it takes, before it starts."""
    console.print(str(plan), soft_wrap=True, highlight=False)


@contextmanager
def worded_errors(
    interrupted: str = "interrupted; the same command with --resume continues it",
) -> Iterator[None]:
    """End the command with the message of a library error or of the system; an interruption says how to continue."""
    try:
        yield
    except TangentError as error:
        _tell(str(error))
        raise typer.Exit(1) from error
    except OSError as error:
        _tell(f"{error}; check that place, or give another")
        raise typer.Exit(1) from error
    except MemoryError as error:
        _tell("there is not enough memory; use fewer samples, or a machine with more")
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        errors.print(interrupted)
        raise typer.Exit(130) from error


def _tell(message: str) -> None:
    """Print an error in one line."""
    told = shown(message.replace("\n", "\\n"), errors.encoding)
    errors.print(Text.assemble(("error", "red"), " ", told), soft_wrap=True, highlight=False)


def typed(study: str | None = None) -> str:
    """The command as typed; if all studies were asked for, the command for one of them."""
    words = sys.argv[1:]
    if study is not None and words[:1] == ["reproduce"]:
        words = [study if word == ALL else word for word in words]
    return shlex.join(["adaptive-tangents", *words])
