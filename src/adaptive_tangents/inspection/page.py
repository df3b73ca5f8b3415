"""The page of an inspection: the findings in sentences, and the context of its template."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from adaptive_tangents.checks import listed
from adaptive_tangents.inspection import figures
from adaptive_tangents.inspection.first_screen import (
    NOTICEABLE,
    headline,
    layer_rows_of,
    start_words,
    telling,
    tiles,
)
from adaptive_tangents.inspection.samples import moved
from adaptive_tangents.inspection.starts import grew
from adaptive_tangents.inspection.strip import strip
from adaptive_tangents.inspection.tables import block_table, layer_table
from adaptive_tangents.reporting.drawing import STAGES, real
from adaptive_tangents.reporting.pages import Page, fixed, number, percent
from adaptive_tangents.runs.results import Arrays, Results
from adaptive_tangents.runtime.progress import duration


def findings(results: Results) -> list[str]:
    """The findings, one or two sentences each, most important first: the first says in words what happened."""
    made = (
        _held_out, _calibrated, start_words, _growth, _turn, _along, _ranks, _explained, _path, _milestones, _adapters,
        _missing,
    )  # fmt: skip
    return [headline(results), *(sentence for make in made if (sentence := make(results)))]


def _held_out(results: Results) -> str:
    return (results.get("held_out") or {}).get("sentence") or ""


def _calibrated(results: Results) -> str:
    count = results.get("calibrated", 0)
    if not count:
        return ""
    norms = "a norm starts" if count == 1 else f"{count} norms start"
    return (
        f"Part of this change is calibration, not training: {norms} with the statistics of a new network; save the start "
        "after a few batches in training mode, without optimizer steps."
    )


def _adapters(results: Results) -> str:
    told = results.get("adapters")
    return f"{told} They are in lora.json, as PEFT takes them." if told else ""


def _growth(results: Results) -> str:
    rows = layer_rows_of(results)
    ratios = {row["name"]: ratio for row in rows if (ratio := grew(row, len(rows))) is not None}
    average = results["growth"]["average"]
    sentence = f"The kernel {_times(results['growth']['final'])} (trace of K_T over that of K₀"
    sentence += ")" if average is None else f"; averaged over the path {number(average)}×)"
    if len(ratios) > 1:
        most = max(ratios, key=lambda name: ratios[name])
        sentence += f"; {most} {'grew most' if ratios[most] > 1 else 'shrank least'}, {number(float(ratios[most]))}×"
    if len(rows) < 2:
        return sentence + "."
    heavy = max(rows, key=lambda row: real(row["trace_share"]["final"]))
    first, last = (heavy["trace_share"][stage] for stage in ("initial", "final"))
    sentence += f". The largest part of K_T is {heavy['name']}, with {percent(last)} of the trace"
    return f"{sentence} ({percent(first)} at the start)."


def _times(growth: float | None) -> str:
    if growth is None:
        return "was zero at the start"
    if abs(growth - 1) < 0.05:
        return "kept its size"
    return f"grew {number(float(growth))}×" if growth > 1 else f"shrank to {number(float(growth))}×"


def _turn(results: Results) -> str:
    parts = []
    for goal, words in (("change", "the network’s own change f_T − f₀"), ("labels", "the labels")):
        plain = results["alignment"].get(goal)
        if plain is None or plain["initial"] is None or plain["final"] is None:
            continue
        name, sims = telling(results, goal)
        sentence = (
            f"It {_verb(sims)} {words}: {name} {fixed(sims['initial'])} (K₀) → {fixed(sims['average'])} (K̄) → "
            f"{fixed(sims['final'])} (K_T)"
        )
        if sims is not plain:
            sentence += f"; not centered {fixed(plain['initial'])} → {fixed(plain['final'])}"
            if _verb(plain) != _verb(sims):
                sentence += ", which a mean that all samples share can move"
        parts.append(sentence + ".")
    cka = results["cka"]["final"]
    if cka is not None:
        parts.append(f"CKA of K₀ and K_T is {fixed(cka)}.")
    return " ".join(parts)


def _verb(sims: Mapping[str, float | None]) -> str:
    turn = real(sims["final"]) - real(sims["initial"])
    return "turned toward" if turn > NOTICEABLE else "turned away from" if turn < -NOTICEABLE else "did not turn toward"


def _along(results: Results) -> str:
    found = results["decomposition"]["final"]
    if found["change_along_target"] is None:
        return ""
    along = percent(found["change_along_target"])
    sentence = f"Of the kernel’s change K_T − K₀, {along} lies along the kernel of what was learned, K_y"
    if found["explained"] is not None:
        weight = found["target_weight"]
        sentence += (
            f"; K₀ and K_y together make up {percent(found['explained'])} of K_T "
            f"(K_T ≈ {number(found['initial_weight'])} K₀ {'−' if weight < 0 else '+'} {number(abs(weight))} K_y)"
        )
    return sentence + "."


def _ranks(results: Results) -> str:
    blocks = results["blocks"]
    names = [
        name for name in figures.matrices(results) if min(blocks[name]["shape"]) > 1 and blocks[name]["change_norm"] > 0
    ]
    if not names:
        return ""
    shares = {name: blocks[name]["effective_rank"]["participation"] / min(blocks[name]["shape"]) for name in names}
    lowest = min(names, key=shares.__getitem__)
    heavy = max(names, key=lambda name: real(blocks[name]["trace_share"]["final"]))

    def told(name: str) -> str:
        rank, full = blocks[name]["effective_rank"]["participation"], min(blocks[name]["shape"])
        return f"{rank:.1f} of {full} in {name}"

    both = f"{told(heavy)} and {told(lowest)}, the lowest share" if heavy != lowest else told(heavy)
    sentence = f"The weight change has effective rank {both}; the median over {len(names)} blocks is "
    sentence += f"{percent(float(np.median(list(shares.values()))))} of the full rank."
    if "two_sided" in results["models"]:
        model = blocks[heavy]["model_rank"]["two_sided"]["participation"]
        sentence += f" The exact adaptive model explains the same change with rank {model:.1f} in {heavy}."
    elif "fixed" in results["models"]:
        model = blocks[heavy]["model_rank"]["fixed"]["participation"]
        sentence += f" Kernel regression with the unchanged K₀ would need rank {model:.1f} in {heavy}."
    return sentence


def _explained(results: Results) -> str:
    explain, total = results["explain"], len(results["blocks"])
    scale, sided = explain["layer_scale"]["total"], explain["two_sided"]
    if sided["total"] is None:
        if scale is None:
            return ""
        return f"One factor per block explains R² = {fixed(scale)} of the feature change on held-out samples."
    fitted = total - len(sided["left_out"])
    wide = figures.matrices(results)
    held = sum(name not in sided["left_out"] for name in wide)
    why = "the others did not move, or memory was too small" if "plan" in results else "the others cost too much"
    why = "the run was interrupted" if results.get("interrupted") else why
    where = "" if fitted == total else f" (on {fitted} of {total} blocks, {held} of {len(wide)} matrices: {why})"
    beside = sided.get("layer_scale_there")
    return (
        f"A two-sided transform per block explains R² = {fixed(sided['total'])} of the feature change on held-out samples"
        f"{where}{'' if beside is None else f'; one factor per block explains {fixed(beside)}'}."
    )


def _path(results: Results) -> str:
    path = results["path"]
    if path["error"] is None:
        return ""
    sentence = (
        f"The trained network is linear in its averaged features to {number(float(path['error_db']))} dB "
        f"(f_T − f₀ = φ̄ Δθ up to {percent(path['error'])}, {path['nodes']} nodes)"
    )
    if path["buffers_moved"]:
        share = percent(path["through_buffers"])
        sentence += f"; {share} of the change went through buffers, such as batch norms’ running statistics"
        if path["through_buffers"] < 0:
            sentence += ", against the change through the parameters"
    return sentence + "."


def _milestones(results: Results) -> str:
    name = figures.alignment_key(results)
    points = [point | {"alignment": point[name]} for point in results["trajectory"]]
    start, end = points[0]["alignment"], points[-1]["alignment"]
    if len(points) < 3 or start is None or end is None or abs(end - start) <= NOTICEABLE:
        return ""
    half = next(
        (p for p in points[1:] if p["alignment"] is not None and abs(p["alignment"] - start) >= abs(end - start) / 2),
        points[-1],
    )
    top = max((p for p in points if p["alignment"] is not None), key=lambda p: p["alignment"])
    last = half is points[-1]
    sentence = (
        "Most of the turn came after the second-to-last checkpoint"
        if last
        else f"Half of the turn had happened by {half['name']}"
    )
    sentence += ", by the centered sim" if name != "alignment" else ""
    if top["alignment"] > end + NOTICEABLE:
        sentence += f"; the kernel was most aligned at {top['name']}, {fixed(top['alignment'])}"
    return sentence + "."


def _missing(results: Results) -> str:
    lost = results.get("interrupted")
    return (
        f"The run was interrupted before {listed(lost)} {'was' if len(lost) == 1 else 'were'} measured." if lost else ""
    )


def _applies(results: Results, name: str) -> bool:
    """Whether the results have what the figure shows."""
    if name == "trajectory":
        return len(results["trajectory"]) > 2
    if name == "images":
        return bool(results["data"]["images"])
    if name == "explain":
        return any(e["total"] is not None for e in results["explain"].values())
    return True


def _arrays(results: Results) -> list[str]:
    held = [stage for stage in STAGES if stage != "average" or results["growth"]["average"] is not None]
    names = [f"{kind}.{stage}" for kind in ("kernel", "spectrum") for stage in held]
    names += [f"singular_values.change.{name}" for name in results["blocks"]]
    names += ["y"] if results["data"]["labels"] else []
    return [*names, "change", *(["images", "images.index"] if results["data"]["images"] else [])]


def _context(results: Results) -> dict[str, Any]:
    weights = results["outputs"]["weights"]
    ordered = sorted(weights.items(), key=lambda item: -item[1]) if weights else []
    first, *rest = findings(results)
    return {
        "verdict": first,
        "started": start_words(results),
        "told": rest,
        "tiles_shown": tiles(results),
        "layer_table": layer_table(results),
        "block_table": block_table(results),
        "positive": [(name, value) for name, value in ordered if value > 0.1][:5],
        "negative": [(name, value) for name, value in reversed(ordered) if value < -0.1][:5],
        "applies": {name: _applies(results, name) for name in PAGE.figures},
        "performance": figures.performance_key(results),
        "planned": duration(sum(results["plan"]["seconds"].values())) if "plan" in results else "",
        "grown": "K_T" if results["growth"]["average"] is None else "K̄",
        "left": len(results["blocks"]) - len(figures.shown_blocks(results)),
    }


def _drawn(results: Results, arrays: Arrays) -> dict[str, Any]:
    most, least = moved(results, arrays)
    return {"strip": strip(results, arrays), "moved_most": most, "moved_least": least}


PAGE = Page(
    template="inspection/page.html.j2",
    figures={
        "kernels": figures.draw_kernels,
        "blocks": figures.draw_blocks,
        "trajectory": figures.draw_trajectory,
        "images": figures.draw_images,
        "growth": figures.draw_growth,
        "spectra": figures.draw_spectra,
        "ranks": figures.draw_ranks,
        "explain": figures.draw_explain,
    },
    arrays=_arrays,
    context=_context,
    applies=_applies,
    drawn=_drawn,
)
