"""`report`, and the last step of every command with results: draw the page and print its findings."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from adaptive_tangents.commands.console import console
from adaptive_tangents.experiments.overview_page import counts
from adaptive_tangents.experiments.pages import PAGES as STUDY_PAGES
from adaptive_tangents.inspection.brief import told
from adaptive_tangents.inspection.compared import NAME as COMPARED
from adaptive_tangents.inspection.comparison_page import PAGE as COMPARE_PAGE
from adaptive_tangents.inspection.foretold import KIND
from adaptive_tangents.inspection.foretold_page import PAGE as FORECAST_PAGE
from adaptive_tangents.inspection.page import PAGE as INSPECT_PAGE
from adaptive_tangents.reporting.report import Finding, build_report, page_of, summary_table
from adaptive_tangents.runs.results import load_results
from adaptive_tangents.runs.summary import NAME as NAME_OF_ALL

_OF_USERS = ("inspect", KIND, COMPARED)  # networks, not studies
PAGES = STUDY_PAGES | {"inspect": lambda: INSPECT_PAGE, KIND: lambda: FORECAST_PAGE, COMPARED: lambda: COMPARE_PAGE}


def finish(folder: Path) -> None:
    """Draw the figures and the page of a result folder, and print its findings."""
    with console.status("Drawing the report"):
        page = build_report(folder, PAGES)
    results, _ = load_results(folder)
    table = summary_table(results, page_of(results, PAGES))
    of_users = results["experiment"] in _OF_USERS
    if of_users:
        headline, lines = told(results)
        console.print(headline, highlight=False)
        for line in lines:
            console.print(f"• {line}", highlight=False)
    elif results["experiment"] == NAME_OF_ALL:
        for each, run in results["runs"].items():
            found = ", ".join(
                f"{count} {verdict}" for verdict, count in counts(run["claims"].values()).items() if count
            )
            console.print(f"{each}: {found}", highlight=False)
    elif table:
        _print_table(results, table)
    for claim in results.get("claims", {}).values():
        mark = {"holds": "✓", "holds in part": "~"}.get(claim["verdict"], "✗")
        console.print(f"{mark} {_plain(claim['claim'])}: {_plain(claim['evidence'])}", highlight=False)
    # Plain text, unwrapped: a path broken over two lines cannot be opened.
    where = "More on the page" if of_users else "Report"
    console.print(f"{where}: {page.resolve()}", soft_wrap=True, highlight=False)


def _plain(text: str) -> str:
    """Symbols as a terminal shows them, with a zero as index below the line."""
    return re.sub(r"\b([A-Za-zθφσ])_0\b", r"\1₀", text)


def _print_table(results: Mapping[str, Any], rows: Iterable[Finding]) -> None:
    table = Table(
        title=f"{results['experiment']} on {results['data']['name']}, {results['data']['train']} training samples"
    )
    for k, heading in enumerate(("", "this run", "paper", "project, 2,850 samples")):
        table.add_column(heading, justify="right" if k else "left", no_wrap=k > 0)
    for label, *values in rows:
        table.add_row(_plain(label), *values)
    console.print(table)
