"""The page of a forecast: that of an inspection, of a training that has not happened."""

from dataclasses import replace
from typing import Any

from adaptive_tangents.forecasting.words import structure_words
from adaptive_tangents.inspection.page import PAGE as INSPECTED
from adaptive_tangents.reporting.pages import fixed, number
from adaptive_tangents.runs.results import Results

AS_IF = "All that follows treats the foretold end as the end of training: what it says of the kernel is foretold."


def foretold(results: Results) -> list[str]:
    """The findings of the forecast, most important first."""
    made = results["forecast"]
    last = made["steps"][-1]
    blocks = made["blocks"]
    most = sorted(blocks, key=lambda name: -blocks[name]["share"])[:3]
    told = "; ".join(
        f"{name}, {100 * b['share']:.0f} % (effective rank {b['rank']:.1f} of {min(b['shape'])})"
        for name, b in ((name, blocks[name]) for name in most)
    )
    fits = "one exact fit" if len(made["steps"]) == 1 else f"{len(made['steps'])} exact fits"
    sentences = [
        f"In {fits}, at the cost of {made['epochs']:.0f} epochs, the loss falls from "
        f"{number(made['initial_loss'])} to {number(last['loss'])}, held out from {number(made['initial_held_out'])} to "
        f"{number(last['held_out'])}.",
        f"Training will change most, by share of the squared change: {told}.",
    ]
    return [*sentences, *happened(results)]


def happened(results: Results) -> list[str]:
    """What happened beside what was foretold, if that is known."""
    beside = results["happened"]
    if beside is None:
        return []
    sims = beside["cka"]
    sentences = [
        f"Beside what happened: the foretold K̄ has CKA {fixed(sims['average'])} with that of the training (K_0 alone has "
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
        "verdict": context["verdict"].removesuffix(".") + ", if training goes as foretold.",
    }


PAGE = replace(INSPECTED, template="inspection/foretold_page.html.j2", context=_context)
