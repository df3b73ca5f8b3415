"""What a reader sees first: one sentence in words, and four tiles, from the numbers of an inspection."""

from collections.abc import Mapping, Sequence
from typing import Any

from adaptive_tangents.features.layer_names import layers_of, phrase
from adaptive_tangents.inspection.judged import WORDS
from adaptive_tangents.inspection.starts import NEW, NO_KERNEL, ZERO, from_scratch
from adaptive_tangents.reporting.drawing import real
from adaptive_tangents.reporting.frame import Tile
from adaptive_tangents.reporting.pages import fixed, number, percent
from adaptive_tangents.runs.results import Results

NOTICEABLE = 0.02
_ALREADY = 0.8  # a kernel that is aligned so far has little left to turn
_MOST = 0.5
_MANY = 0.4  # of all directions


FORETOLD = "foretold"
"""The experiment of a forecast's results."""
_TO_COME = {
    "grew to": "grows to", "shrank to": "shrinks to", "kept its size": "keeps its size", "was zero": "is zero",
    "hardly turned": "hardly turns", "and turned": "and turns", "was aligned": "is aligned",
}  # fmt: skip


def headline(results: Results) -> str:
    """The first sentence; of a forecast, in words that say that it has not happened."""
    sentence = first_sentence(results)
    if results.get("experiment") != FORETOLD:
        return sentence
    for happened, foretold in _TO_COME.items():
        sentence = sentence.replace(happened, foretold)
    return f"Foretold: {sentence[0].lower()}{sentence[1:]}"


def first_sentence(results: Results) -> str:
    """One sentence in words: where the change is, how the kernel grew and turned, and how many directions changed."""
    parts = [
        _where_words(results),
        f"the kernel {grown(results['growth']['final'])}{_turned(results)}",
        _directions(results),
    ]
    sentence = "; ".join(part for part in parts if part)
    return sentence[0].upper() + sentence[1:] + "."


def layer_rows_of(results: Results) -> list[Mapping[str, Any]]:
    """The rows by layer; of results from before there were any, what their blocks' numbers say."""
    found: list[Mapping[str, Any]] | None = results.get("layers")
    return _rolled_up(results) if found is None else found


def where(results: Results) -> tuple[str, float] | None:
    """The layers that hold most of the kernel's change, in words, and their share; None if no few layers do."""
    rows = [row for row in layer_rows_of(results) if row["change_share"] is not None]
    chosen: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda row: -row["change_share"]):
        if sum(each["change_share"] for each in chosen) >= _MOST:
            break
        chosen.append(row)
    if len(rows) < 2 or len(chosen) > max(3, len(rows) // 2):
        return None
    named = [(row["name"], row["kind"], row["start"] == NEW) for row in rows if row in chosen]
    return phrase(named), sum(row["change_share"] for row in chosen)


def _where_words(results: Results) -> str:
    rows = [row for row in layer_rows_of(results) if row["change_share"] is not None]
    found = where(results)
    if found is not None:
        return f"most of the change ({percent(found[1])}) is in {found[0]}"
    return "the change is spread over the whole network" if len(rows) > 1 else ""


def telling(results: Results, goal: str) -> tuple[str, Mapping[str, float | None]]:
    """The alignment that tells whether a kernel turned: the centered one, which no common mean can raise, if there is one."""
    plain = results["alignment"][goal]
    centered = results.get("alignment_centered", {}).get(goal)
    if centered is None or centered["initial"] is None or centered["final"] is None:
        return "sim", plain
    return "centered sim", centered


def goal_of(results: Results) -> tuple[str, str]:
    """The goal that the first screen tells of, and its words: the labels, if there are any that say something."""
    labels = results["alignment"].get("labels")
    if labels is not None and None not in (labels["initial"], labels["final"]):
        return "labels", "the labels"
    return "change", "what was learned"


def grown(growth: float | None) -> str:
    """How a kernel grew, in words.

    >>> grown(3.14), grown(0.25), grown(None)
    ('grew to 3.1 times its size', 'shrank to 25 % of its size', 'was zero at the start')
    """
    if growth is None:
        return "was zero at the start"
    if abs(growth - 1) < 0.05:
        return "kept its size"
    if growth < 1:
        return f"shrank to {percent(growth)} of its size"
    return f"grew to {times(growth)} times its size"


def times(value: float) -> str:
    """A factor in two figures, with commas: no more can be held in mind.

    >>> times(1509.6), times(3.14), times(45.2)
    ('1,500', '3.1', '45')
    """
    if value >= 1e7:
        return number(float(f"{value:.2g}"))
    return f"{float(f'{value:.2g}'):,.{1 if value < 9.95 else 0}f}"


def _turned(results: Results) -> str:
    goal, words = goal_of(results)
    _, sims = telling(results, goal)
    if sims["initial"] is None or sims["final"] is None:
        return ""
    turn = sims["final"] - sims["initial"]
    if abs(turn) <= NOTICEABLE:
        already = " (it was aligned from the start)" if sims["initial"] >= _ALREADY else ""
        return f" and hardly turned{already}"
    return f" and turned {'toward' if turn > 0 else 'away from'} {words}"


def _directions(results: Results) -> str:
    """How few directions hold most of the change, in the matrix whose share of directions is the median."""
    matrices = sorted(
        (block["rank_90"] / min(block["shape"]), block["rank_90"], min(block["shape"]))
        for block in results["blocks"].values()
        if block.get("rank_90") and min(block["shape"]) > 1
    )
    if not matrices:
        return ""
    share, held, most = matrices[(len(matrices) - 1) // 2]
    if share > _MANY:
        return "the change of the weights is spread over many directions"
    hold = "holds" if held == 1 else "hold"
    if len(matrices) == 1:
        return f"{held} of {most:,} directions {hold} 90 % of the change of the weights"
    return f"in the median matrix, {held} of {most:,} directions {hold} 90 % of its change"


def start_words(results: Results) -> str:
    """What is special about the start: a new head, adapters at zero, layers without a kernel, or all of the network new."""
    blocks: Mapping[str, Mapping[str, Any]] = results["blocks"]
    starts = {name: block.get("start") for name, block in blocks.items()}
    matrices = [starts[name] for name, block in blocks.items() if min(block["shape"]) > 1 and "lora_" not in name]
    told = []
    new = [(row["name"], row["kind"], False) for row in layer_rows_of(results) if row.get("start") == NEW]
    if new:
        head = phrase(new)
        told.append(
            f"{head[0].upper()}{head[1:]} is new: its weights start as freshly drawn ones, not as trained ones."
        )
    elif from_scratch(matrices):
        told.append("Most weights start as freshly drawn ones: the network starts from scratch.")
    firsts = sum(start == NO_KERNEL for name, start in starts.items() if "lora_A" in name)
    if firsts:
        told.append(
            f"The adapters start at zero (lora_B = 0), so {firsts} of their first factors (lora_A) have no kernel at the "
            "start."
        )
    zero = [name for name, start in starts.items() if start == ZERO and "lora_" not in name]
    if zero:
        told.append(f"{_few(zero)} start{'s' if len(zero) == 1 else ''} with weights of zero.")
    nothing = [name for name, start in starts.items() if start == NO_KERNEL and "lora_A" not in name]
    if nothing:
        also = "also " if firsts else ""
        subject = _few(nothing) if len(nothing) <= 2 else f"{len(nothing)} {'more ' if firsts else ''}blocks"
        told.append(f"{subject} {also}{'has' if len(nothing) == 1 else 'have'} nearly no kernel at the start.")
    if nothing or firsts:
        told.append("Where a kernel starts from nearly nothing, its growth is not told as a ratio.")
    return " ".join(told)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def tiles(results: Results) -> list[Tile]:
    """Accuracy or error, the kernel's size, its alignment, and where the change is."""
    goal, words = goal_of(results)
    name, sims = telling(results, goal)
    found = where(results)
    growth = results["growth"]["final"]
    average = results["growth"]["average"]
    size = (
        "no kernel at the start" if growth is None else f"{percent(growth)}" if growth < 0.95 else f"{times(growth)}×"
    )
    beside = "" if average is None or growth is None else f"; on average along the way {number(average)}×"
    place = Tile("Where", "all over the network", note="no few layers hold most of the change", wordy=True)
    if found is not None:
        place = Tile("Where", found[0], note=f"{percent(found[1])} of the kernel’s change", wordy=True)
    return [
        _performance(results),
        Tile("Size of the kernel", size, note=f"of its size at the start{beside}" if growth is not None else ""),
        Tile(
            f"Alignment with {words}", fixed(sims["final"]), before=fixed(sims["initial"]),
            note=f"{'centered, ' if name != 'sim' else ''}1 is perfect",
        ),
        place,
    ]  # fmt: skip


def _performance(results: Results) -> Tile:
    first, last = (results["performance"][k] for k in ("start", "end"))
    samples = f"on the {results['data']['samples']} samples measured"
    if first is None or last is None:
        return Tile("Samples", f"{results['data']['samples']}", note="measured, without labels")
    kind = next(iter(first))
    shown = percent if kind == "accuracy" else number
    held = (results.get("held_out") or {}).get("held_out")
    if held is not None and None not in held["performance"].values():
        before, after = (shown(held["performance"][end][kind]) for end in ("start", "end"))
        samples = f"{samples}; {before} → {after} on the {held['samples']} of them held out"
    return Tile(WORDS.get(kind, kind).capitalize(), shown(last[kind]), before=shown(first[kind]), note=samples)


def _rolled_up(results: Results) -> list[Mapping[str, Any]]:
    """Rows by layer with what older results have: shares of the trace and growth."""
    blocks, whole = results["blocks"], results["growth"]["final"]
    rows: list[Mapping[str, Any]] = []
    for layer in layers_of([*blocks]):
        share = {
            stage: None if any(blocks[name]["trace_share"][stage] is None for name in layer.blocks)
            else sum(blocks[name]["trace_share"][stage] for name in layer.blocks)
            for stage in ("initial", "average", "final")
        }  # fmt: skip
        growth = real(share["final"]) * whole / share["initial"] if whole is not None and share["initial"] else None
        norms = [real(blocks[name]["change_norm"]) for name in layer.blocks]
        none = dict.fromkeys(("initial", "average", "final"))
        rows.append({
            "name": layer.name, "kind": layer.kind, "blocks": list(layer.blocks), "start": None, "change_share": None,
            "trace_change_share": None, "trace_share": share, "growth": {"average": None, "final": growth},
            "alignment": none, "alignment_centered": none, "alignment_labels_centered": none, "cka": None,
            "change_norm": sum(norm**2 for norm in norms) ** 0.5, "rank_90": None, "rank_most": 0, "explain": {},
        })  # fmt: skip
    return rows
