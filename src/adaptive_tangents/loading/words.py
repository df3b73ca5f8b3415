"""What the errors of this wing share: a file that must be there, an error of another program, names in a list."""

import importlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptive_tangents.errors import TangentError

INSPECT = "inspect"  # the command that errors name by default


def check_file(path: Path, what: str, remedy: str, call: str) -> None:
    """Raise TangentError unless the path is that of a file."""
    if os.path.isdir(path):
        raise TangentError(f"{call}: {path} is a folder, not a {what}; give the path of a file")
    if not os.path.isfile(path):
        raise TangentError(f"{call}: there is no {what} {path}; {remedy}")


def optional(package: str, what: str, call: str, instead: str = "") -> Any:
    """A package that only some inputs need, imported. Raises TangentError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package.partition(".")[0]:
            raise
        raise TangentError(
            f"{call}: {what} takes {package.partition('.')[0]}; pip install 'adaptive-tangents[integrations]'{instead}"
        ) from error


def text_of(name: str | bytes) -> str:
    """A name as text; bytes that are none are shown as escapes."""
    return name.decode(errors="backslashreplace") if isinstance(name, bytes) else name


def told(error: BaseException) -> str:
    """An error of another program in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


def listed_names(names: Iterable[str], most: int = 6) -> str:
    """Names from a user's file, the first few; what does not print is shown as escapes."""
    words = [name if name.isprintable() else ascii(name) for name in names]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def continuous(value: Tensor) -> bool:
    """Whether a tensor holds real or complex numbers."""
    return value.is_floating_point() or value.is_complex()
