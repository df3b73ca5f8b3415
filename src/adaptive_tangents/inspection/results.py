"""What an inspection found, as an object: sentences, tables, kernels and figures, kept in a folder and read back."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from adaptive_tangents.errors import TangentError
from adaptive_tangents.inspection.lora import write_advice
from adaptive_tangents.inspection.measures import STRUCTURES
from adaptive_tangents.inspection.rows import Rows
from adaptive_tangents.inspection.showing import needed, picture, plotted, saved, shown, worded, write_with_table
from adaptive_tangents.runs.own_files import BLOCKS_FILE, LORA_FILE
from adaptive_tangents.runs.results import Arrays, Results, load_results, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from adaptive_tangents.reporting.pages import Page

KINDS = ("inspect", "foretold")
"""The experiments whose results are an inspection's."""
STAGES = {"start": "initial", "average": "average", "end": "final"}
_SHOWN = 8
_PRINTED = (
    "block", "rows", "columns", "trace_share_start", "trace_share_end", "change_share", "growth_end", "alignment_start",
    "alignment_end", "cka", "change_relative", "effective_rank",
)  # fmt: skip

BLOCK_COLUMNS = {
    "block": "the block: a layer’s weight with its bias, a norm’s scale or shift",
    "rows": "o, the width of the block’s output",
    "columns": "i, the width of its input; a bias is one column more",
    "trace_share_start": "its part of the trace of K₀",
    "trace_share_average": "its part of the trace of the average kernel",
    "trace_share_end": "its part of the trace of K_T",
    "change_share": "its part of K_T − K₀: ⟨ΔK_b, ΔK⟩/‖ΔK‖²; the parts add to one, and one may be negative",
    "growth_average": "trace of its average kernel over that at the start",
    "growth_end": "trace of its kernel at the end over that at the start",
    "alignment_start": "cosine of its kernel at the start with the kernel of the network’s change f_T − f₀, not centered",
    "alignment_average": "the same of its average kernel",
    "alignment_end": "the same of its kernel at the end",
    "alignment_labels_start": "cosine of its kernel at the start with the kernel of the labels, not centered",
    "alignment_labels_average": "the same of its average kernel",
    "alignment_labels_end": "the same of its kernel at the end",
    "cka": "CKA of its kernels at start and end",
    "change_norm": "‖Δθ‖ of the block",
    "change_relative": "‖Δθ‖/‖θ₀‖",
    "effective_rank": "of Δθ, (Σσ²)²/Σσ⁴",
    "effective_rank_entropy": "of Δθ, exp(−Σ p log p) with p = σ/Σσ",
    "effective_rank_stable": "of Δθ, Σσ²/max σ²",
    **{f"r2_{key}": f"R² of the feature change by {type(s).__name__}, held out" for key, s in STRUCTURES.items()},
}
"""The columns of ``Inspection.blocks`` and of ``blocks.csv``."""

POINT_COLUMNS = {
    "state": "the name of the state",
    "growth": "trace of its kernel over that of K₀",
    "alignment": "cosine of its kernel with that of the network’s change",
    "alignment_centered": "the same, centered",
    "alignment_labels": "cosine of its kernel with that of the labels",
    "alignment_labels_centered": "the same, centered",
    "cka_start": "CKA of its kernel with K₀",
    "cka_end": "CKA of its kernel with K_T",
    "accuracy": "on the samples measured, where labels are known",
    "bce": "mean binary cross-entropy on the samples measured, where labels are rows of 0 and 1",
    "mse": "mean squared error on the samples measured, where targets are known",
}
"""The columns of ``Inspection.trajectory``."""


@dataclass(frozen=True, eq=False, repr=False)
class Inspection:
    """What training did to a network: what the page of ``adaptive-tangents inspect`` tells, as an object.

    Attributes:
        results: all numbers and words, as ``results.json`` holds them.
        arrays: kernels, spectra, outputs and singular values by name, as ``arrays.npz`` holds them.
    """

    results: Results
    arrays: Arrays

    @property
    def findings(self) -> list[str]:
        """The findings in sentences, most important first."""
        page = _told("findings")
        return list(page.findings(self.results))

    @property
    def headline(self) -> str:
        """The first finding."""
        return self.findings[0]

    @property
    def blocks(self) -> Rows:
        """One row for every block, in the network's order; ``blocks.columns`` says what each number is."""
        return Rows(BLOCK_COLUMNS, tuple(_block(name, b) for name, b in self.results["blocks"].items()), _PRINTED)

    @property
    def kernels(self) -> dict[str, NDArray[Any]]:
        """The kernels "start", "average" and "end", (n, n) each, summed over the outputs measured.

        The samples are in the order of the data. An interrupted run may lack the average.
        """
        found = {stage: self.arrays.get(f"kernel.{key}") for stage, key in STAGES.items()}
        return {stage: kernel for stage, kernel in found.items() if kernel is not None}

    @property
    def trajectory(self) -> Rows:
        """One row for every state, in the order of training."""
        rows = []
        for point in self.results["trajectory"]:
            known = {**point, **(point["performance"] or {}), "state": point["name"]}
            rows.append({name: known.get(name) for name in POINT_COLUMNS})
        return Rows(POINT_COLUMNS, tuple(rows))

    def plot(self, name: str | None = None) -> "Figure":
        """A figure of the page.

        Args:
            name: "kernels" (default), "blocks", "trajectory", "images", "growth", "spectra", "ranks", "explain", or another
                of the page's figures.

        Raises:
            TangentError: when the page has no such figure, or not of this inspection.
        """
        return plotted("plot", _page(self.results), self.results, self.arrays, name)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the folder that the command writes: results, arrays, table of blocks, figures and the page.

        Args:
            directory: the folder, made if needed. Only files that this library wrote are replaced.

        Returns:
            The path of the page, ``report.html``.

        Raises:
            TangentError: when a file in the way is not the library's own.
        """
        return saved(
            "save",
            Path(directory),
            self.results["experiment"],
            _page(self.results, "save"),
            self.write,
            (BLOCKS_FILE, LORA_FILE),
        )

    def write(self, directory: str | os.PathLike[str]) -> None:
        """Write results, arrays, the table of blocks and the advice on adapters, without figures and page.

        Args:
            directory: the folder, made if needed.

        Raises:
            TangentError: when a file in the way is not the library's own.
        """
        write_with_table(self.results, self.arrays, self.blocks, Path(directory))
        write_advice(self.results, self.arrays, directory)

    def __repr__(self) -> str:
        return "\n".join([self._title(), f"  {worded(lambda: self.headline)}", f"  see {_HANDLES}"])

    def _repr_html_(self) -> str:
        heavy = sorted(self.blocks, key=lambda row: -abs(row["change_share"] or 0.0))[:_SHOWN]
        table = Rows(BLOCK_COLUMNS, tuple(heavy), _PRINTED).html()
        note = f"<p>The {len(heavy)} of {len(self.blocks)} blocks with the largest part of K_T − K₀.</p>"
        return shown(self._title(), lambda: self.headline, lambda: self.findings[1:], note + table, self.strip)

    def strip(self) -> str:
        """The kernels side by side, as an image for HTML."""
        return picture(_page(self.results), self.results, self.arrays, "kernels")

    def _title(self) -> str:
        network, data = self.results["network"], self.results["data"]
        first, *_, last = (point["name"] for point in self.results["trajectory"])
        return f"Inspection of {network['class']}, {first} → {last}: {network['blocks']} blocks on {data['samples']} samples"


_HANDLES = ".findings, .blocks, .kernels, .trajectory; .plot(); .save(DIR) writes the page"


def load_inspection(directory: str | os.PathLike[str]) -> Inspection:
    """Read the folder that ``adaptive-tangents inspect`` or ``Inspection.save`` wrote.

    Args:
        directory: the folder.

    Raises:
        TangentError: when it holds no inspection, or a file of it is missing or damaged.
    """
    return read_inspection(directory, "load_inspection")


def read_inspection(directory: str | os.PathLike[str], call: str) -> Inspection:
    """The same, for any call."""
    results, arrays = load_results(directory, call)
    if results["experiment"] not in KINDS or "blocks" not in results:
        raise TangentError(
            f"{call}: {directory} holds results of {results['experiment']!r}, not an inspection; give a folder that "
            "adaptive-tangents inspect or Inspection.save wrote"
        )
    return Inspection(results, arrays)


def made(results: Results, arrays: Arrays) -> Inspection:
    """An inspection of what was just measured, in the form in which it is read back."""
    return Inspection(plain(results), dict(arrays))


def _block(name: str, block: Mapping[str, Any]) -> dict[str, Any]:
    rank = block["effective_rank"]
    row = {"block": name, "rows": block["shape"][0], "columns": block["shape"][1]}
    for stage, key in STAGES.items():
        row[f"trace_share_{stage}"] = block["trace_share"][key]
        row[f"growth_{stage}"] = block["growth"].get(key)
        row[f"alignment_{stage}"] = block["alignment"][key]
        row[f"alignment_labels_{stage}"] = block["alignment_labels"].get(key)
    row |= {name: block.get(name) for name in ("change_share", "cka", "change_norm", "change_relative")}
    row |= {f"r2_{key}": block["explain"].get(key) for key in STRUCTURES}
    row |= {"effective_rank": rank["participation"]}
    row |= {f"effective_rank_{kind}": rank[kind] for kind in ("entropy", "stable")}
    return {column: row[column] for column in BLOCK_COLUMNS}


def _told(call: str) -> Any:
    """The module that tells what an inspection found."""
    with needed(call):
        from adaptive_tangents.inspection import page
    return page


def _page(results: Results, call: str = "plot") -> "Page":
    page: Page = _told(call).PAGE
    if results["experiment"] == "inspect":
        return page
    from adaptive_tangents.inspection.foretold_page import PAGE

    return PAGE
