"""What inspections and comparisons share: how they are written, drawn and shown in notebooks."""

import base64
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from adaptive_tangents.checks import listed
from adaptive_tangents.errors import TangentError
from adaptive_tangents.inspection.rows import Rows
from adaptive_tangents.runs.own_files import BLOCKS_FILE, check_ours, check_replaceable
from adaptive_tangents.runs.results import Arrays, Results, write_results
from adaptive_tangents.runtime.tensor_files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from adaptive_tangents.reporting.pages import Page


@contextmanager
def needed(call: str) -> Iterator[None]:
    """Word the error for a missing package that pages and figures need."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise TangentError(
            f"{call}: {error.name} is not installed; pip install 'adaptive-tangents[report]' installs what pages and figures "
            "need"
        ) from error


def write_with_table(results: Results, arrays: Arrays, table: Rows, directory: Path) -> None:
    """Write results, arrays and a table of blocks, where only the library's own files are replaced."""
    check_replaceable("report", directory / BLOCKS_FILE)
    write_results(results, arrays, directory)
    write_bytes(directory / BLOCKS_FILE, table.csv().encode("utf-8", "backslashreplace"))


def saved(
    call: str, directory: Path, kind: str, page: "Page", write: Callable[[Path], object], tables: Iterable[str] = ()
) -> Path:
    """Write results and their page; nothing is written if a file in the way is not the library's own."""
    with needed(call):
        from adaptive_tangents.reporting.report import build_report
    if os.path.lexists(directory) and not os.path.isdir(directory):
        raise TangentError(f"{call}: {directory} is not a folder; give the path of a folder")
    check_ours(call, directory, page.figures, tables)
    write(directory)
    return build_report(directory, {kind: lambda: page})


def plotted(call: str, page: "Page", results: Results, arrays: Arrays, name: str | None) -> "Figure":
    """A figure of a page, by name; the first by default."""
    from adaptive_tangents.reporting.drawing import styled

    known = [each for each in page.figures if page.applies(results, each)]
    name = known[0] if name is None else name
    if name not in known:
        raise TangentError(f"{call}: no figure {name!r} of these results; the figures are {listed(known)}")
    return styled(page.figures[name], results, _floats(arrays))


def picture(page: "Page", results: Results, arrays: Arrays, name: str) -> str:
    """A figure of a page as an image for HTML."""
    from adaptive_tangents.reporting.drawing import render

    content = base64.b64encode(render(page.figures[name], name, results, _floats(arrays)).png).decode()
    return f'<img alt="{escape(name)}" style="max-width:100%" src="data:image/png;base64,{content}">'


def shown(
    title: str,
    headline: Callable[[], str],
    findings: Callable[[], Iterable[str]],
    tables: str,
    strip: Callable[[], str],
) -> str:
    """Headline, findings, picture and tables as HTML; without what draws pages, the tables alone."""
    try:
        told = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings())
        top = f"<p><b>{escape(headline())}</b></p><ul>{told}</ul>{strip()}"
    except TangentError as error:
        top = f"<p>{escape(str(error))}</p>"
    return f"<div><p>{escape(title)}</p>{top}{tables}</div>"


def _floats(arrays: Arrays) -> dict[str, NDArray[Any]]:
    return {name: array.astype(float) if array.dtype.kind == "f" else array for name, array in arrays.items()}


def worded(make: Callable[[], str]) -> str:
    """A sentence, or why there is none."""
    try:
        return make()
    except TangentError as error:
        return str(error)
