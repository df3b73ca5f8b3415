"""``compare``: two inspections side by side, as an object with sentences, tables, figures and a page."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_tangents.errors import TangentError
from adaptive_tangents.inspection.compared import NAME, compared
from adaptive_tangents.inspection.results import Inspection, read_inspection
from adaptive_tangents.inspection.rows import Rows
from adaptive_tangents.inspection.showing import needed, picture, plotted, saved, shown, worded
from adaptive_tangents.runs.results import Arrays, Results, plain, write_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from adaptive_tangents.reporting.pages import Page

Inspected = Inspection | str | os.PathLike[str]
"""An inspection, or the folder of one."""
_RESERVED = ("number", "difference")
_HANDLES = ".findings, .table(), .blocks, .layers; .plot(); .save(DIR) writes the page"

_OF_A_BLOCK = {
    "blocks": "how many blocks the network has there: 2 for a low-rank adapter, 0 if none was measured",
    "change_share": "their part of K_T − K₀: ⟨ΔK_b, ΔK⟩/‖ΔK‖²",
    "trace_share": "their part of the trace of K_T",
    "growth": "trace of their kernel at the end over that at the start",
    "alignment": "cosine of the kernel at the end with that of the network’s change, where it is one block",
    "change_norm": "‖Δθ‖",
    "change_relative": "‖Δθ‖/‖θ₀‖, where it is one block",
    "effective_rank": "of Δθ, (Σσ²)²/Σσ⁴, where it is one block",
}


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Two inspections side by side.

    Attributes:
        results: all numbers, as ``results.json`` holds them: "numbers" of each, "kernels" and "functions" between the two
            (None if their samples differ), "places" and "layers".
        arrays: what the figures draw: "a.kernel.end", "b.gained" (f_T − f₀) and others.
    """

    results: Results
    arrays: Arrays

    @property
    def names(self) -> tuple[str, str]:
        """What the two are called."""
        one, two = self.results["names"]
        return one, two

    @property
    def findings(self) -> list[str]:
        """What is the same and what differs, in sentences, most important first."""
        with needed("findings"):
            from adaptive_tangents.inspection.comparison_told import findings
        return findings(self.results)

    @property
    def headline(self) -> str:
        """The first finding."""
        return self.findings[0]

    def table(self) -> Rows:
        """The numbers of both: columns "number", one for each inspection, and "difference", the second minus the first."""
        one, two = self.names
        columns = {"number": "what it is", one: f"of {one}", two: f"of {two}", "difference": f"{two} minus {one}"}
        rows = tuple(
            {"number": row["words"], one: row["a"], two: row["b"], "difference": _difference(row["a"], row["b"])}
            for row in self.results["numbers"]
        )
        return Rows(columns, rows)

    def to_frame(self) -> Any:
        """``table()`` as a pandas DataFrame; raises TangentError where pandas is not installed."""
        return self.table().to_frame()

    @property
    def blocks(self) -> Rows:
        """One row for every place that either network has: a block, or the layer that an adapter adapts.

        Columns end in ``_a`` for the first inspection and ``_b`` for the second.
        """
        columns = {"place": "the block; adapters stand at the layer that they adapt"}
        for key, words in _OF_A_BLOCK.items():
            columns |= {f"{key}_{side}": f"{words} ({name})" for side, name in zip("ab", self.names, strict=True)}
        return Rows(
            columns,
            tuple(self.results["places"]),
            ("place", "change_share_a", "change_share_b", "growth_a", "growth_b"),
        )

    @property
    def layers(self) -> Rows:
        """The parts of K_T − K₀ and of the trace of K_T by layer; columns end in ``_a`` and ``_b``."""
        columns = {"layer": "the layer"}
        for key in ("change_share", "trace_share"):
            columns |= {
                f"{key}_{side}": f"{_OF_A_BLOCK[key]} ({name})" for side, name in zip("ab", self.names, strict=True)
            }
        return Rows(columns, tuple(self.results["layers"]))

    def plot(self, name: str | None = None) -> "Figure":
        """A figure of the page.

        Args:
            name: "kernels" (default), "layers", "blocks" or "functions".

        Raises:
            TangentError: when there is no such figure, or not of this comparison.
        """
        return plotted("plot", _page("plot"), self.results, self.arrays, name)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write results, arrays, figures and the page, as ``adaptive-tangents compare`` does.

        Args:
            directory: the folder, made if needed. Only files that this library wrote are replaced.

        Returns:
            The path of the page, ``report.html``.

        Raises:
            TangentError: when a file in the way is not the library's own.
        """
        return saved("save", Path(directory), NAME, _page("save"), self.write)

    def write(self, directory: str | os.PathLike[str]) -> None:
        """Write results and arrays, without figures and page.

        Args:
            directory: the folder, made if needed.

        Raises:
            TangentError: when a file in the way is not the library's own.
        """
        write_results(self.results, self.arrays, directory)

    def __repr__(self) -> str:
        return "\n".join([self._title(), f"  {worded(lambda: self.headline)}", f"  see {_HANDLES}"])

    def _repr_html_(self) -> str:
        def strip() -> str:
            return picture(_page("plot"), self.results, self.arrays, "kernels")

        return shown(self._title(), lambda: self.headline, lambda: self.findings[1:], self.table().html(), strip)

    def _title(self) -> str:
        one, two = self.results["of"]
        samples = "the same samples" if self.results["same_samples"] else "other samples"
        networks = one["network"] if one["network"] == two["network"] else f"{one['network']} and {two['network']}"
        return f"Comparison of {self.names[0]} and {self.names[1]}: {networks}, on {samples}"


def compare(a: Inspected, b: Inspected, *, names: Sequence[str] = ("A", "B")) -> Comparison:
    """Set two inspections side by side: full fine-tuning and LoRA, two seeds, two learning rates.

    Kernels and functions are compared sample by sample if both were measured on the same samples. The cosine of two kernels
    is ⟨K_a, K_b⟩/(‖K_a‖‖K_b‖); CKA is that of the centered kernels.
    Classes are known by their names, whatever their order in each network.

    Args:
        a: an inspection, or the folder of one.
        b: another.
        names: what the two are called.

    Returns:
        A ``Comparison``: ``findings`` in sentences, ``table()``, ``blocks``, ``plot()``, ``save(DIR)``.

    Raises:
        TangentError: when a folder holds no inspection, or the names are not two different ones.

    >>> import torch
    >>> from adaptive_tangents.inspection.api import inspect
    >>> model = torch.nn.Linear(3, 1)
    >>> start = {name: value.clone() for name, value in model.state_dict().items()}
    >>> ends = [{name: value + step for name, value in start.items()} for step in (0.1, 0.2)]
    >>> one, two = (inspect(model, start, end, torch.randn(12, 3, generator=torch.manual_seed(0))) for end in ends)
    >>> round(compare(one, two).results["functions"]["cosine"], 4)
    1.0
    """
    for each in (a, b):
        if not isinstance(each, Inspection | str | os.PathLike):
            raise TangentError(f"{NAME}: takes inspections, or the folders of some, got {type(each).__name__}")
    pair = [each if isinstance(each, Inspection) else read_inspection(each, NAME) for each in (a, b)]
    names = [str(name) for name in names]
    if len(names) != 2 or len(set(names)) != 2 or not all(name.strip() for name in names) or set(names) & {*_RESERVED}:
        raise TangentError(
            f"{NAME}: names are two different words, other than {' and '.join(_RESERVED)}, got {names}; give e.g. "
            "names=('full', 'LoRA')"
        )
    results, arrays = compared(pair, names)
    command = f"adaptive_tangents.compare(a, b, names={tuple(names)!r})"
    return Comparison(plain({**results, "command": command}), arrays)


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else b - a


def _page(call: str) -> "Page":
    with needed(call):
        from adaptive_tangents.inspection.comparison_page import PAGE
    return PAGE
