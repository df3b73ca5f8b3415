"""What all pages share: their building blocks, and how numbers are formatted."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from adaptive_tangents.reporting import drawing
from adaptive_tangents.reporting.drawing import Draw
from adaptive_tangents.reporting.frame import legend_of, study_tiles
from adaptive_tangents.runs.results import Arrays, Results

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Page:
    """What an experiment's page needs: a template, figures with their arrays, and extra context for the template.

    ``applies`` says which figures a run has, ``headline`` which metrics of each target begin its summary, and ``labels``
    how metrics are named. ``drawn`` is further context that needs the arrays. The template is a path within the package.
    """

    template: str
    figures: Mapping[str, Draw]
    arrays: Callable[[Results], list[str]]
    context: Callable[[Results], dict[str, Any]]
    applies: Callable[[Results, str], bool] = lambda results, figure: True
    headline: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    drawn: Callable[[Results, Arrays], dict[str, Any]] = lambda results, arrays: {}


@dataclass(frozen=True)
class Table:
    """Rows of text under headings; the first column names the row."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


@dataclass(frozen=True)
class Shown:
    """A figure of the page: its name, alternative text and caption."""

    name: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A section: paragraphs, tables and figures in order. ``key`` is its anchor."""

    key: str
    title: str
    parts: tuple[str | Table | Shown, ...]


@dataclass(frozen=True)
class Story:
    """An experiment's story: question, method, answer and sections. Claims and settings are added automatically."""

    title: str
    lead: str
    verdict: str
    sections: tuple[Section, ...]


def told(
    figures: Mapping[str, Draw], arrays: Callable[[Results], list[str]], story: Callable[[Results], Story]
) -> Page:
    """The page of a story with its claims and settings. ``arrays`` names what the figures need."""

    def context(results: Results) -> dict[str, Any]:
        kinds = {Table: "table", Shown: "figure", str: "text"}
        found = story(results)
        sections = [(s.key, s.title, [(kinds[type(part)], part) for part in s.parts]) for s in found.sections]
        return {
            "story": found,
            "sections": sections,
            "tiles_shown": study_tiles(results),
            "signs": legend_of([found.lead, found.verdict, *(text for s in found.sections for text in _texts(s))]),
            "signs_first": bool(legend_of([found.verdict])),
            "command": results.get("command", f"adaptive-tangents reproduce {results['experiment']}"),
        }

    return Page("reporting/templates/study.html.j2", figures, arrays, context)


def _texts(section: Section) -> Iterator[str]:
    for part in section.parts:
        if isinstance(part, Table):
            yield from (*part.head, part.note, *(row[0] for row in part.rows))
        else:
            yield part.caption if isinstance(part, Shown) else part


def claims_context(results: Results, verdict: str) -> dict[str, Any]:
    """The verdict if every claim holds, else the claims that do not; and the command."""
    claims = results["claims"].values()
    failed = [claim["claim"] for claim in claims if not claim["holds"]]
    if failed:
        verdict = f"{len(claims) - len(failed)} of {len(claims)} claims hold. These do not: {'; '.join(failed)}."
    return {
        "verdict": verdict,
        "tiles_shown": study_tiles(results),
        "command": results.get("command", f"adaptive-tangents reproduce {results['experiment']}"),
    }


def number(value: Any) -> str:
    """A measured value to three figures, with true minus signs and powers, and a dash for None.

    >>> number(0.4), number(-2.41e-9), number(None), number(True)
    ('0.400', '−2.4·10⁻⁹', '—', 'yes')
    """
    if not isinstance(value, float) or value == 0 or not math.isfinite(value):
        return given(value)
    if 1e-3 <= abs(value) < 1e5:
        text = f"{value:#.3g}".rstrip(".") if abs(value) < 999.5 else f"{value:.0f}"
        return text.replace("-", "−")
    mantissa, exponent = f"{value:.1e}".replace("-", "−", value < 0).split("e")
    return f"{mantissa}·10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def given(value: Any) -> str:
    """A chosen or published value, with the digits it was given with.

    >>> given(0.4), given(0.05), given("20–30"), given([0.1, 1.0]), given(None)
    ('0.40', '0.05', '20–30', '0.1, 1', '—')
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(f"{item:g}" if isinstance(item, float) else given(item) for item in value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return (text + "0" * bool(re.fullmatch(r"-?0\.\d", text))).replace(
        "-", "−" if isinstance(value, float | int) else "-"
    )


def percent(value: float | None) -> str:
    """A share in percent, with a decimal if it is below a tenth.

    >>> percent(0.724), percent(0.0461), percent(None)
    ('72 %', '4.6 %', '—')
    """
    if value is None or not math.isfinite(value):
        return given(None)
    return f"{100 * value:.{0 if abs(value) >= 0.0995 or value == 0 else 1}f} %".replace("-", "−")


def fixed(value: float | None) -> str:
    """A value with two decimals."""
    return drawing.fixed(value, none=given(None))


def counted(number: int, thing: str) -> str:
    """A count of things, in words.

    >>> counted(1, "seed"), counted(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{number} {thing}{'s' if number != 1 else ''}"
