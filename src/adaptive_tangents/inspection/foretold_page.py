"""The page of a forecast: that of an inspection, of a training that has not happened."""

from dataclasses import replace
from typing import Any

from adaptive_tangents.forecasting.words import structure_words
from adaptive_tangents.inspection.first_screen import headline
from adaptive_tangents.inspection.page import PAGE as INSPECTED
from adaptive_tangents.reporting.pages import fixed, number, percent
from adaptive_tangents.runs.results import Results


def foretold(results: Results) -> list[str]:
    """The findings of the forecast, most important first."""
    return [
        _loss(results), f"Training will change most, by share of the squared change: {_most(results)}.", *happened(results)
    ]  # fmt: skip


def brief(results: Results) -> tuple[str, list[str]]:
    """What the terminal says: the headline, and findings of a line each."""
    most = _most(results, 2).replace("effective rank", "rank")
    return _loss(results), [f"Will change most: {most}.", headline(results), *happened(results)]


def _loss(results: Results) -> str:
    made = results["forecast"]
    last = made["steps"][-1]
    fits = "one exact fit" if len(made["steps"]) == 1 else f"{len(made['steps'])} exact fits"
    return (
        f"Foretold: training takes the loss from {number(made['initial_loss'])} to {number(last['loss'])}, held out from "
        f"{number(made['initial_held_out'])} to {number(last['held_out'])} ({fits}, at the cost of {made['epochs']:.0f} "
        "epochs)."
    )


def _most(results: Results, count: int = 3) -> str:
    """The blocks that will change most, with their shares and ranks."""
    blocks = results["forecast"]["blocks"]
    most = sorted(blocks, key=lambda name: -blocks[name]["share"])[:count]
    return "; ".join(
        f"{name}, {percent(b['share'])} (effective rank {b['rank']:.1f} of {min(b['shape'])})"
        for name, b in ((name, blocks[name]) for name in most)
    )


def happened(results: Results) -> list[str]:
    """What happened beside what was foretold, if that is known."""
    beside = results["happened"]
    if beside is None:
        return []
    sims = beside["cka"]
    sentences = [
        f"Beside what happened: the foretold K̄ has CKA {fixed(sims['average'])} with that of the training (K₀ alone has "
        f"{fixed(sims['without'])}), and the foretold K_T {fixed(sims['final'])}.",
        f"The kernel grew {number(beside['growth'][1])}×, foretold {number(beside['growth'][0])}×; its centered sim with the "
        f"network’s change became {fixed(beside['alignment'][1])}, foretold {fixed(beside['alignment'][0])}.",
    ]
    orders = [
        ("layers by their share of the change", beside["share_order"]),
        ("samples by growth", beside["sample_order"]),
    ]
    known = [f"{what} {fixed(order)}" for what, order in orders if order is not None]
    if known:
        sentences.append(f"Rank correlations of forecast and training: {', '.join(known)}.")
    return sentences


def _context(results: Results) -> dict[str, Any]:
    context = INSPECTED.context(results)
    beside = results["happened"]
    rows = []
    if beside is not None:
        names = sorted(beside["shares"], key=lambda name: -beside["shares"][name][1])[:24]
        rows = [(name, beside["shares"][name], beside["ranks"][name]) for name in names]
    return context | {
        "foretold": foretold(results),
        "structure": results["forecast"].get("name") or structure_words(results["forecast"]["structure"]),
        "rows": rows,
    }


PAGE = replace(INSPECTED, template="inspection/foretold_page.html.j2", context=_context)
