"""The frame of every page: tiles, tables to sort and download, a legend of signs, and what tiles tell of a study."""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adaptive_tangents.runs.results import Results
from adaptive_tangents.runtime.progress import duration

Legend = list[tuple[str, str]]

_GLOSSARY = {
    "K_0": (r"K_0", "the tangent kernel before training: how a step on one sample changes the output at another"),
    "K̄": (r"K̄", "the kernel of the features averaged along the straight way from the first weights to the last"),
    "K_T": (r"K_T", "the tangent kernel after training"),
    "K_y": (r"K_y", "the kernel of the task, from the targets or from what the network learned"),
    "K_M": (
        r"K_M",
        "the kernel of an exact adaptive model, whose features are the initial ones, transformed by a matrix M",
    ),
    "sim": (r"\bsim\b", "cosine of two kernels; 1 is the same up to size"),
    "CKA": (r"\bCKA\b", "the same cosine of centered kernels, which leaves out what all samples share"),
    "λ": (r"λ", "strength of the penalty on the transform: the larger, the nearer to fixed features"),
    "R²": (r"R²", "the explained share of the squares; 1 is all of it"),
    "±": (r"±", "standard deviation over seeds"),
}


@dataclass(frozen=True)
class Tile:
    """A number of the first screen, with what it was before and a note; ``wordy`` if the value is words."""

    title: str
    value: str
    before: str = ""
    note: str = ""
    wordy: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell as it is shown, the value that it is sorted and downloaded by, and a bar's length, from 0 to 1."""

    text: str
    value: float | int | str | None
    bar: float | None = None


@dataclass(frozen=True)
class DataTable:
    """A table to sort and to download as ``name``.csv; ``columns`` are the downloaded names of its headings."""

    name: str
    head: tuple[str, ...]
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    note: str = ""

    @property
    def csv(self) -> str:
        """Its values as comma-separated text."""
        held = io.StringIO()
        writer = csv.writer(held, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([["" if cell.value is None else cell.value for cell in row] for row in self.rows])
        return held.getvalue().encode("utf-8", "replace").decode()


def legend_of(texts: Iterable[str]) -> Legend:
    """The signs that occur in some texts, with their meanings.

    >>> [sign for sign, _ in legend_of(["CKA of K_0 and K_T"])]
    ['K_0', 'K_T', 'CKA']
    """
    joined = "\n".join(texts)
    return [(sign, meaning) for sign, (pattern, meaning) in _GLOSSARY.items() if re.search(pattern, joined)]


def study_tiles(results: Results) -> list[Tile]:
    """How many claims hold, on what data, over how many seeds, and in what time."""
    claims: Mapping[str, Mapping[str, Any]] = results["claims"]
    counts = Counter(claim["verdict"] for claim in claims.values())
    others = [f"{counts[verdict]} {words}" for verdict, words in (
        ("holds in part", "hold in part"), ("does not hold", "do not hold")) if counts[verdict]]  # fmt: skip
    tiles = [Tile("Claims that hold", f"{counts['holds']} of {len(claims)}", note=", ".join(others))]
    data = results.get("data") or {}
    if data.get("name"):
        sizes = [f"{data[key]:,} {words}" for key, words in (("train", "to train on"), ("test", "to test"))
                 if isinstance(data.get(key), int)]  # fmt: skip
        tiles.append(Tile("Data", str(data["name"]), note=", ".join(sizes), wordy=True))
    seeds = results.get("config", {}).get("seeds")
    if isinstance(seeds, int):
        tiles.append(
            Tile(
                "Runs",
                f"{seeds} seed{'s' if seeds != 1 else ''}",
                note="± is over seeds" if seeds > 1 else "",
                wordy=True,
            )
        )
    took = (results.get("wall_seconds") or {}).get("total")
    if took is not None:
        tiles.append(Tile("Time", duration(took), note=f"on {results.get('device', 'cpu')}", wordy=True))
    return tiles
