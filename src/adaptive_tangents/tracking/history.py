"""The curve of a training: its records, as a table, a data frame, a picture or text."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adaptive_tangents.errors import TangentError
from adaptive_tangents.runtime.progress import duration
from adaptive_tangents.tracking.budget import ALLOWED, Cost
from adaptive_tangents.tracking.records import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_SHOWN = 12
_COLUMNS = {
    "trace": "trace", "alignment_centered": "labels", "alignment_change_centered": "change", "cka_start": "start",
    "cka_last": "last", "loss": "loss", "accuracy": "accuracy",
}  # fmt: skip


@dataclass(frozen=True)
class History:
    """The records of one training.

    Attributes:
        records: in order of training.
        note: which kernel they are of: outputs, samples, mode.
        cost: what they took.
        budget: the share of training that they may take; None is any.
    """

    records: tuple[Record, ...] = field(repr=False)
    note: str
    cost: Cost
    budget: float | None

    def table(self, *, groups: bool = False) -> list[dict[str, Any]]:
        """The records as rows, one a record; None where a number is not defined.

        Args:
            groups: adds a row for each group of blocks, and a column "group", which is "all" for the whole.
        """
        return [row for record in self.records for row in record.rows(groups=groups)]

    def to_frame(self) -> "DataFrame":
        """The rows of ``table(groups=True)`` as a pandas DataFrame.

        Raises:
            TangentError: when pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise TangentError(
                "to_frame: pandas is not installed; pip install pandas, or use table(groups=True), which gives the same rows"
            ) from error
        return DataFrame(self.table(groups=True))

    def plot(self) -> "Figure":
        """Alignment, CKA, trace and loss by step, and below them alignment, share of the trace and CKA of every group.

        Raises:
            TangentError: when matplotlib is not installed, or nothing was recorded.
        """
        if not any(record.whole for record in self.records):
            raise TangentError("plot: there is no record to draw; call record(step) in the loop of training first")
        try:
            from adaptive_tangents.tracking.figures import draw_history
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "matplotlib":
                raise
            raise TangentError(
                "plot: matplotlib is not installed; pip install 'adaptive-tangents[report]', or use table()"
            ) from error
        return draw_history(self.records)

    def summary(self) -> str:
        """The note, the cost, and the records as text to read: at most 12, spread over the training."""
        if not self.records:
            return f"no records yet\n{self.told_cost()}"
        heads = ["step", *_COLUMNS.values()]
        rows = [[str(record.step), *_cells(record)] for record in _spread(self.records)]
        widths = [max(len(row[k]) for row in [heads, *rows]) for k in range(len(heads))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *rows]
        ]
        left = len(self.records) - len(rows)
        notes = [f"step {record.step}: {record.note}" for record in self.records if record.note]
        return "\n".join(
            [
                self.note,
                "labels, change: centered alignment of K with the labels and with f − f₀; start, last: CKA with K then",
                *lines,
                *([f"and {left} more records"] if left else []),
                *notes,
                self.told_cost(),
            ]
        )

    def told_cost(self) -> str:
        """A sentence on what the records took."""
        cost = self.cost
        if not cost.records:
            return "nothing was measured yet"
        each = f"{cost.seconds / cost.records:.2g} s each"
        many = "1 record" if cost.records == 1 else f"{cost.records} records"
        if cost.training <= 0:
            return f"{many}, {each}"
        allowed = "" if self.budget is None else f", of {100 * self.budget:.3g} % allowed"
        said = f"{many}, {each}: {_percent(cost.share)} of {duration(cost.training)} of training{allowed}"
        if self.budget is not None and cost.share > self.budget:
            said += f"; the first and the last record, and {ALLOWED:g} s in all, are taken whatever they cost"
        return said


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _cells(record: Record) -> Iterable[str]:
    row = next(record.rows())
    for name in _COLUMNS:
        value = row[name]
        yield "–" if value is None else (f"{value:.3g}" if name in ("trace", "loss") else f"{value:.3f}")


def _spread(records: tuple[Record, ...]) -> list[Record]:
    if len(records) <= _SHOWN:
        return list(records)
    return [records[round(k * (len(records) - 1) / (_SHOWN - 1))] for k in range(_SHOWN)]
