"""The tables of an inspection's page, to sort and to download: by layer and by block."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adaptive_tangents.inspection.first_screen import goal_of, layer_rows_of
from adaptive_tangents.inspection.starts import NEW, NO_KERNEL, ZERO, grew
from adaptive_tangents.reporting.frame import Cell, DataTable
from adaptive_tangents.reporting.pages import fixed, number, percent
from adaptive_tangents.runs.results import Results

Row = Mapping[str, Any]
Column = tuple[str, str, Callable[[Row], Cell]]

MOST_ROWS = 300
_STARTS = {NEW: "new", ZERO: "zero", NO_KERNEL: "hardly a kernel"}


def layer_table(results: Results) -> DataTable:
    """Every layer's share of the kernel's change, its growth, alignment, rank, and what a transform explains."""
    rows = layer_rows_of(results)
    goal, words = goal_of(results)
    aligned = "alignment_labels_centered" if goal == "labels" else "alignment_centered"
    columns: list[Column] = [
        ("layer", "layer", lambda row: Cell(row["name"], row["name"])),
        ("share of the change", "change_share", lambda row: _share(row["change_share"], bar=True)),
        ("share of K₀", "trace_share_start", lambda row: _share(row["trace_share"]["initial"])),
        ("share of K_T", "trace_share_end", lambda row: _share(row["trace_share"]["final"])),
        ("growth", "growth", lambda row: _growth(grew(row, len(rows)))),
        (f"alignment with {words}, start", "alignment_start", lambda row: _fixed(row[aligned]["initial"])),
        ("alignment, end", "alignment_end", lambda row: _fixed(row[aligned]["final"])),
        ("CKA", "cka_start_end", lambda row: _fixed(row["cka"])),
        ("directions for 90 %", "rank_90", lambda row: _rank(row["rank_90"], row["rank_most"])),
        ("R²", "two_sided_r2", lambda row: _fixed(row["explain"].get("two_sided"))),
        ("blocks", "blocks", lambda row: Cell(str(len(row["blocks"])), len(row["blocks"]))),
        ("at the start", "start", _start),
    ]  # fmt: skip
    note = "The shares of the change sum to 1; a negative one is of a layer that changed against the whole."
    return _table("layers", columns, rows, note if any(row["change_share"] is not None for row in rows) else "")


def block_table(results: Results) -> DataTable:
    """Every block's numbers; of very many, those of the largest blocks of the kernel at the end."""
    layers = {name: row["name"] for row in layer_rows_of(results) for name in row["blocks"]}
    rows: list[Row] = [
        {"name": name, "layer": layers.get(name, ""), **numbers} for name, numbers in results["blocks"].items()
    ]
    count, total = len(rows), len(results["blocks"])
    if count > MOST_ROWS:
        heavy = sorted(rows, key=lambda row: -(row["trace_share"]["final"] or 0.0))[:MOST_ROWS]
        kept = {row["name"] for row in heavy}
        rows = [row for row in rows if row["name"] in kept]
    columns: list[Column] = [
        ("block", "block", lambda row: Cell(row["name"], row["name"])),
        ("layer", "layer", lambda row: Cell(row["layer"], row["layer"])),
        ("o × i", "shape", _shape),
        ("share of the change", "change_share", lambda row: _share(row.get("change_share"), bar=True)),
        ("share of K₀", "trace_share_start", lambda row: _share(row["trace_share"]["initial"])),
        ("share of K_T", "trace_share_end", lambda row: _share(row["trace_share"]["final"])),
        ("growth", "growth", lambda row: _growth(grew(row, total))),
        ("sim K₀", "alignment_start", lambda row: _fixed(row["alignment"]["initial"])),
        ("sim K_T", "alignment_end", lambda row: _fixed(row["alignment"]["final"])),
        ("CKA", "cka_start_end", lambda row: _fixed(row["cka"])),
        ("‖Δθ‖", "change_norm", lambda row: _number(row["change_norm"])),
        ("‖Δθ‖/‖θ₀‖", "change_relative", lambda row: _number(row["change_relative"])),
        ("rank of Δθ", "effective_rank", lambda row: _rank(row["effective_rank"]["participation"], None)),
        ("directions for 90 %", "rank_90", lambda row: _rank(row.get("rank_90"), min(row["shape"]))),
        ("R²", "two_sided_r2", lambda row: _fixed(row["explain"].get("two_sided"))),
        ("at the start", "start", _start),
    ]  # fmt: skip
    note = "" if count == len(rows) else f"Of {count} blocks, the {len(rows)} with the largest share of K_T are here."
    return _table("blocks", columns, rows, note)


def _table(name: str, columns: Sequence[Column], rows: Sequence[Row], note: str) -> DataTable:
    """The table without the columns that have no value at all."""
    cells = [[make(row) for row in rows] for _, _, make in columns]
    held = [k for k in range(len(columns)) if any(cell.value not in (None, "") for cell in cells[k])]
    rows_of = [tuple(cells[k][r] for k in held) for r in range(len(rows))]
    return DataTable(name, tuple(columns[k][0] for k in held), tuple(columns[k][1] for k in held), rows_of, note)


def _share(value: float | None, *, bar: bool = False) -> Cell:
    return Cell(percent(value), value, min(1.0, max(0.0, value)) if bar and value is not None else None)


def _growth(value: float | None) -> Cell:
    return Cell("—" if value is None else f"{number(float(value))}×", value)


def _fixed(value: float | None) -> Cell:
    return Cell(fixed(value), value)


def _number(value: float | None) -> Cell:
    return Cell(number(value), value)


def _rank(value: float | None, most: int | None) -> Cell:
    if value is None:
        return Cell("—", None)
    told = f"{value:.1f}" if isinstance(value, float) else f"{value}"
    return Cell(told if most is None else f"{told} of {most}", value)


def _shape(row: Row) -> Cell:
    o, i = row["shape"]
    return Cell(f"{o} × {i}", o * i)


def _start(row: Row) -> Cell:
    words = _STARTS.get(row.get("start") or "", "")
    return Cell(words, words)
