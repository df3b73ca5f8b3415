"""A small table whose columns say what they are, for people, for CSV files and for pandas."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, overload

from adaptive_tangents.errors import TangentError

Row = Mapping[str, Any]
_SHOWN = 60


@dataclass(frozen=True, repr=False)
class Rows(Sequence[Row]):
    """Rows by name: each a mapping from column to value; None where a value is not defined.

    Attributes:
        columns: every column and what it holds, in order; the first names the row.
        rows: the rows, in order.
        shown: the columns that are printed; all if empty.

    >>> table = Rows({"block": "its name", "growth": "of its trace"}, ({"block": "0", "growth": 1.5},))
    >>> table["0"]["growth"], table[0]["block"], len(table), table.column("growth")
    (1.5, '0', 1, [1.5])
    """

    columns: Mapping[str, str]
    rows: tuple[Row, ...]
    shown: tuple[str, ...] = ()

    @overload
    def __getitem__(self, which: int | str) -> Row: ...
    @overload
    def __getitem__(self, which: slice) -> "Rows": ...
    def __getitem__(self, which: int | str | slice) -> "Row | Rows":
        if isinstance(which, slice):
            return replace(self, rows=self.rows[which])
        if isinstance(which, str):
            for name, row in zip(self.names, self.rows, strict=True):
                if name == which:
                    return row
            raise KeyError(f"no row {which!r}; the rows are {', '.join(self.names)}")
        return self.rows[which]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def names(self) -> list[str]:
        """The names of the rows: the values of the first column."""
        return self.column(next(iter(self.columns)))

    def column(self, name: str) -> list[Any]:
        """The values of one column.

        Args:
            name: of the column.

        Raises:
            TangentError: when there is no such column.
        """
        if name not in self.columns:
            raise TangentError(f"column: no column {name!r}; the columns are {', '.join(self.columns)}")
        return [row[name] for row in self.rows]

    def to_frame(self) -> Any:
        """The table as a pandas DataFrame, one row a row; raises TangentError where pandas is not installed."""
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise TangentError(
                "to_frame: pandas is not installed; pip install 'adaptive-tangents[integrations]' installs it, or use the "
                "rows as they are, which are mappings"
            ) from error
        return pandas.DataFrame([dict(row) for row in self.rows], columns=list(self.columns))

    def csv(self) -> str:
        """The table as CSV, with numbers in full; what is not defined is empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([_exact(row[name]) for name in self.columns] for row in self.rows)
        return text.getvalue()

    def html(self) -> str:
        """The table as HTML, with numbers to three figures."""
        shown = self.shown or tuple(self.columns)
        head = "".join(f'<th title="{escape(self.columns[name])}">{escape(name)}</th>' for name in shown)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(rounded(row[name]))}</td>' for name in shown)}</tr>" for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _repr_html_(self) -> str:
        return self.html()

    def __repr__(self) -> str:
        shown = self.shown or tuple(self.columns)
        lines = [list(shown), *([rounded(row[name]) for name in shown] for row in self.rows[:_SHOWN])]
        widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                f"{cell:{'<' if k == 0 else '>'}{w}}" for k, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        more = len(self.rows) - _SHOWN
        return "\n".join([*text, f"… and {more} more"] if more > 0 else text)


def rounded(value: Any) -> str:
    """A value to read: a number to three figures, a dash for None.

    >>> rounded(0.12345), rounded(None), rounded("0.weight"), rounded(12)
    ('0.123', '–', '0.weight', '12')
    """
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _exact(value: Any) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)
