"""What the terminal says: the headline and a few findings, each in a line; the page has the rest."""

from collections.abc import Callable, Mapping
from typing import Any

from adaptive_tangents.checks import listed
from adaptive_tangents.inspection.compared import NAME as COMPARED
from adaptive_tangents.inspection.comparison_told import findings as compared_findings
from adaptive_tangents.inspection.first_screen import headline, layer_rows_of, telling, times
from adaptive_tangents.inspection.foretold import KIND
from adaptive_tangents.inspection.foretold_page import brief as foretold_brief
from adaptive_tangents.inspection.judged import WORDS
from adaptive_tangents.inspection.starts import grew
from adaptive_tangents.reporting.drawing import real
from adaptive_tangents.reporting.pages import fixed, number, percent
from adaptive_tangents.runs.results import Results
from adaptive_tangents.runtime.told import short

MOST = 5
_NAME = 36  # characters of a layer's name in a line


def told(results: Results) -> tuple[str, list[str]]:
    """The headline, and the findings most worth a line, most important first; no findings for a study's results."""
    if results["experiment"] == COMPARED:
        first, *rest = compared_findings(results)
        return first, [*results["limits"], *(each for each in rest if each not in results["limits"])][:MOST]
    if results["experiment"] == KIND:
        first, lines = foretold_brief(results)
        return first, [*lines, *(line for make in (_interrupted, _adapters) if (line := make(results)))][:MOST]
    made: tuple[Callable[[Results], str], ...] = (
        _interrupted, _calibrated, _held_out, _turned, _grown, _explained, _adapters
    )  # fmt: skip
    return headline(results), [line for make in made if (line := make(results))][:MOST]


def _interrupted(results: Results) -> str:
    lost = results.get("interrupted")
    return f"The run was interrupted; not measured: {listed(lost)}." if lost else ""


def _calibrated(results: Results) -> str:
    count = results.get("calibrated", 0)
    if not count:
        return ""
    norms = "a norm starts" if count == 1 else f"{count} norms start"
    return f"Part of this change is calibration, not training: {norms} with the statistics of a new network."


def _held_out(results: Results) -> str:
    found = results.get("held_out")
    if not found:
        return ""
    held, trained = found["held_out"], found["trained"]
    pairs = [[side["performance"][end] for end in ("start", "end")] for side in (held, trained)]
    if any(value is None for pair in pairs for value in pair):
        return ""
    kind = next(iter(pairs[0][0]))
    shown = percent if kind == "accuracy" else number
    own, seen = (" → ".join(shown(value[kind]) for value in pair) for pair in pairs)
    name = WORDS.get(kind, kind)
    return f"On {held['samples']} samples held out: {name} {own} (trained on: {seen})."


def _turned(results: Results) -> str:
    parts, centered = [], False
    for goal, words in (("labels", "the labels"), ("change", "its own change")):
        plain = results["alignment"].get(goal)
        if plain is None or plain["initial"] is None or plain["final"] is None:
            continue
        name, sims = telling(results, goal)
        centered = centered or name != "sim"
        parts.append(f"with {words} {fixed(sims['initial'])} → {fixed(sims['final'])}")
    if not parts:
        return ""
    cka = results["cka"]["final"]
    same = "" if cka is None else f"; CKA of K₀ and K_T {fixed(cka)}"
    return f"{'Centered alignment' if centered else 'Alignment'} {', '.join(parts)}{same}."


def _grown(results: Results) -> str:
    rows = layer_rows_of(results)
    ratios = {row["name"]: ratio for row in rows if (ratio := grew(row, len(rows))) is not None}
    growth = results["growth"]["final"]
    told = "The kernel was zero at the start"
    if growth is not None:
        told = f"The kernel’s trace is {times(growth)}× that at the start"
    if len(ratios) > 1:
        most = max(ratios, key=lambda name: ratios[name])
        told += f", most in {short(most, _NAME)} ({times(ratios[most])}×)"
    if len(rows) > 1:
        heavy: Mapping[str, Any] = max(rows, key=lambda row: real(row["trace_share"]["final"]))
        told += f"; {percent(heavy['trace_share']['final'])} of it is {short(heavy['name'], _NAME)}"
    return f"{told}."


def _explained(results: Results) -> str:
    total = results["explain"]["two_sided"]["total"]
    if total is None:
        return ""
    return f"A transform on both sides of each block explains R² = {fixed(total)} of the features’ change."


def _adapters(results: Results) -> str:
    advice = results.get("adapters")
    if not advice:
        return ""
    # "LoRA adapters of rank 2 in 3 layers (600 parameters, …) hold 99 % of …": without the brackets, and to the first point.
    first, _, rest = advice.partition(" (")
    return f"{first} {rest.partition(') ')[2].partition('.')[0]} (lora.json)."
