"""How long work tells how far it is, as a call or as a bar, and how times are told."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

Progress = Callable[[str, float], None]
"""Called with the name of a stage and the fraction of the work that is done."""

Steps = Callable[[int, float], None]
"""Called with the number of steps so far, and the residual or objective there."""

Asked = Progress | bool | None
"""What users give: a function, True for a bar, or None or False for silence."""

PERCENT = "[progress.percentage]{task.percentage:>3.0f} %"
_Made = TypeVar("_Made")
_Given = ParamSpec("_Given")


def silent(stage: str, fraction: float) -> None:
    """Progress that nobody watches."""


def in_notebook() -> bool:
    """Whether a Jupyter kernel started this process."""
    return "JPY_PARENT_PID" in os.environ


def redrawn(file: Any) -> bool:
    """Whether a bar may move there: on a terminal, but not on that of a notebook's `!command`, which keeps every frame."""
    # What rich goes by, FORCE_COLOR, says nothing of this: kernels and CI set it where output is kept.
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return bool(getattr(file, "isatty", bool)()) and not in_notebook() and not dumb


class Bar:
    """A bar in the terminal or the notebook, from its first call until it is closed."""

    def __init__(self) -> None:
        self._shown: Any = None
        self._task: Any = None

    def __call__(self, stage: str, fraction: float) -> None:
        if self._shown is None:
            self._shown = _rich_bar()
            self._task = self._shown.add_task(stage, total=1.0)
            self._shown.start()
        self._shown.update(self._task, description=stage, completed=fraction)

    @property
    def open(self) -> bool:
        """Whether the bar is on the screen and moves."""
        return self._shown is not None and self._shown.live.is_started

    def close(self, *, done: bool) -> None:
        """Let the bar stand; ``done`` fills it."""
        if self._shown is not None:
            if done:
                self._shown.update(self._task, completed=1.0)
            self._shown.stop()


def _rich_bar() -> Any:
    """A bar of rich's with a console of its own, since one console shows one bar at a time."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    # In a notebook, rich draws with ipywidgets; without it, as in a file, the last state is printed.
    console = Console(
        force_jupyter=None if importlib.util.find_spec("ipywidgets") else False, force_terminal=redrawn(sys.stdout)
    )
    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(PERCENT), TimeElapsedColumn(),
        TextColumn("left", markup=False), TimeRemainingColumn(), console=console,
    )  # fmt: skip


@contextmanager
def shown(progress: Asked) -> Iterator[Progress | None]:
    """The function that work calls: the one given, a bar for True, None for silence. The bar is closed whatever happens."""
    if progress is not True:
        yield progress or None
        return
    bar = Bar()
    done = False
    try:
        yield bar
        done = True
    finally:
        bar.close(done=done)


@contextmanager
def counted(progress: Steps | bool | None, what: str, most: int) -> Iterator[Steps | None]:
    """As ``shown``, for work that counts its steps, at most so many; ``what`` names the number it tells with them."""
    if progress is not True:
        yield progress or None
        return
    with shown(True) as bar:

        def tell(steps: int, value: float) -> None:
            assert bar is not None
            bar(f"step {steps}, {what} {value:.3g}", min(1.0, steps / most))

        yield tell


def with_bar(function: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """A decorator: the function with its argument ``progress`` a call or None, and a bar around it for True."""

    @wraps(function)
    def called(*given: _Given.args, **options: _Given.kwargs) -> _Made:
        if not isinstance(options.get("progress"), bool):
            return function(*given, **options)
        with shown(bool(options["progress"])) as told:
            options["progress"] = told
            return function(*given, **options)

    return called


def told(progress: Asked) -> Progress | None:
    """The argument of a function under ``with_bar``."""
    assert not isinstance(progress, bool)
    return progress


def duration(seconds: float) -> str:
    """A time to read.

    >>> duration(0.2), duration(75), duration(5400)
    ('1 s', '75 s', '90 min')
    """
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
