"""The page of all experiments: a table of claims for each, and how each was made."""

from collections.abc import Iterable, Mapping
from typing import Any

from adaptive_tangents.reporting.pages import Page
from adaptive_tangents.runs.results import Results

VERDICTS = ("holds", "holds in part", "does not hold")


def counts(claims: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The number of claims with each verdict.

    >>> counts([{"verdict": "holds"}, {"verdict": "does not hold"}, {"verdict": "holds"}])
    {'holds': 2, 'holds in part': 0, 'does not hold': 1}
    """
    made = dict.fromkeys(VERDICTS, 0)
    for claim in claims:
        made[claim["verdict"]] += 1
    return made


def _context(results: Results) -> dict[str, Any]:
    """The verdicts, counted in one sentence, and the command."""
    claims = [claim for run in results["runs"].values() for claim in run["claims"].values()]
    found = counts(claims)
    return {
        "verdict": f"Of {len(claims)} claims {found['holds']} hold, {found['holds in part']} hold in part and "
        f"{found['does not hold']} do not hold.",
        "command": results.get("command", "adaptive-tangents reproduce all"),
    }


PAGE = Page("experiments/overview.html.j2", {}, lambda results: [], _context)
