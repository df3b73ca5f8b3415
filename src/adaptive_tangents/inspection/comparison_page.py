"""The page of a comparison."""

from typing import Any

from adaptive_tangents.inspection import comparison_figures as figures
from adaptive_tangents.inspection.comparison_told import findings
from adaptive_tangents.reporting.pages import Page, fixed, number
from adaptive_tangents.runs.results import Results

_SYMBOLS = {"start": "K₀, start", "average": "K̄, average", "end": "K_T, end", "change": "K_T − K₀, the change"}


def _arrays(results: Results) -> list[str]:
    return [f"{side}.{name}" for side in ("a", "b") for name in ("kernel.start", "kernel.end", "order", "gained")]


def _context(results: Results) -> dict[str, Any]:
    told = findings(results)
    kernels = results["kernels"] or {}
    return {
        "verdict": told[0],
        "told": told[1:],
        "rows": [(row["words"], number(row["a"]), number(row["b"])) for row in results["numbers"]],
        "alike": [
            (symbol, fixed(kernels[stage]["cka"]), fixed(kernels[stage]["cosine"]))
            for stage, symbol in _SYMBOLS.items()
            if stage in kernels
        ],
        "parts": [
            (row["layer"], *(_percent(row[f"change_share_{side}"]) for side in ("a", "b"))) for row in results["layers"]
        ],
        "applies": {name: figures.applies(results, name) for name in PAGE.figures},
        "described": [
            (name, {key: value for key, value in of.items() if key != "made by"}, of.get("made by"))
            for name, of in zip(results["names"], results["of"], strict=True)
        ],
    }


def _percent(value: float | None) -> str:
    return "—" if value is None else f"{100 * value:.1f} %".replace("-", "−")


PAGE = Page(
    template="inspection/comparison_page.html.j2",
    figures={
        "kernels": figures.draw_kernels,
        "layers": figures.draw_layers,
        "blocks": figures.draw_blocks,
        "functions": figures.draw_functions,
    },
    arrays=_arrays,
    context=_context,
    applies=figures.applies,
)
