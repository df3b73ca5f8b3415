"""Objects told in short: one line for ``repr``, and a small table for notebooks. Names are escaped, and lists end early."""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import islice

_WIDEST, _LONGEST = 100, 12
_CELL = 'style="text-align:left;padding:1px 12px 1px 0"'


def short(value: object, most: int = _WIDEST) -> str:
    """A value in one line of at most this many characters.

    >>> short("a" * 20, 8)
    'aaaaaaa…'
    """
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def few_digits(value: object) -> str:
    """A structure or a penalty with its numbers to four digits.

    >>> few_digits("TwoSided(Quadratic(strength=0.012345678))")
    'TwoSided(Quadratic(strength=0.01235))'
    """
    return re.sub(r"\d+\.\d{4,}(?:e[+-]?\d+)?", lambda found: f"{float(found[0]):.4g}", str(value))


def few(parts: Sequence[str], most: int = 4) -> str:
    """The first parts, and how many more there are.

    >>> few(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    shown = ", ".join(short(part, 60) for part in parts[:most])
    return f"{shown} and {len(parts) - most} more" if len(parts) > most else shown


def html(
    title: str, facts: Mapping[str, object], head: Sequence[str] = (), rows: Iterable[Sequence[object]] = ()
) -> str:
    """A title, facts and the first rows of a table, as HTML."""
    rows = iter(rows)
    shown = list(islice(rows, _LONGEST))
    left = sum(1 for _ in rows)
    made = [f"<div><b>{escape(short(title))}</b><table>"]
    made += [f"<tr><td {_CELL}>{_cell(key)}</td><td {_CELL}>{_cell(value)}</td></tr>" for key, value in facts.items()]
    made.append("</table>")
    if shown:
        made.append(
            f"<table><thead><tr>{''.join(f'<th {_CELL}>{_cell(name)}</th>' for name in head)}</tr></thead><tbody>"
        )
        made += [f"<tr>{''.join(f'<td {_CELL}>{_cell(value)}</td>' for value in row)}</tr>" for row in shown]
        made.append("</tbody></table>")
    if left:
        made.append(f"<p>and {left} more</p>")
    return "".join([*made, "</div>"])


def _cell(value: object) -> str:
    return escape(short(f"{value:.4g}" if isinstance(value, float) else value, 200))
