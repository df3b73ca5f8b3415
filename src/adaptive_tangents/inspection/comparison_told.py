"""What a comparison found, in sentences."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adaptive_tangents.checks import listed
from adaptive_tangents.inspection.judged import KINDS, WORDS
from adaptive_tangents.reporting.pages import fixed, number
from adaptive_tangents.runs.results import Results

_NOTICEABLE = 0.02
_SAME = 0.999
_ROUNDING = 1e-6
_MUCH = 0.1  # of the change, from which a layer is named
_PARTS = ((1 / 2, "half"), (1 / 3, "a third"), (1 / 4, "a quarter"), (1 / 5, "a fifth"), (1 / 10, "a tenth"))


def findings(results: Results) -> list[str]:
    """The findings, most important first."""
    made: list[Callable[[Results], str]] = [_size, _function, _kernels, _layers, _turn, _performance, _ranks]
    return [sentence for make in made if (sentence := make(results))] + list(results["limits"]) + _outputs(results)


def _numbers(results: Results) -> dict[str, tuple[float | None, float | None]]:
    return {row["number"]: (row["a"], row["b"]) for row in results["numbers"]}


def _size(results: Results) -> str:
    """How much the kernels changed, where, and whether the functions end alike."""
    a, b = results["names"]
    one, two = _numbers(results)["kernel_moved" if results["same_samples"] else "kernel_change"]
    if not one or not two:
        lead = f"{a} and {b} cannot be compared by how much the kernel changed, because one was zero or did not change"
    else:
        lead = f"{b} changed the kernel {times(two / one)} as {a}"
    where = results["where"]
    if where["correlation"] is not None:
        r = where["correlation"]
        place = "the same" if r > 0.8 else "partly the same" if r > 0.4 else "other"
        lead += f", in {place} {where['of']} (correlation {fixed(r)} over {where['count']})"
    functions = results["functions"]
    if functions is not None and functions["cosine"] is not None:
        lead += f"; {_ends(functions['cosine'])} (cosine {fixed(functions['cosine'])})"
    return lead + "."


def times(ratio: float) -> str:
    """A ratio in words, to be followed by "as".

    >>> times(0.34), times(1.02), times(3.1), times(0.62)
    ('a third as much', 'as much', '3.10 times as much', '0.620 times as much')
    """
    if 0.95 <= ratio <= 1.05:
        return "as much"
    for part, words in _PARTS:
        if abs(ratio / part - 1) <= 0.05:
            return f"{words} as much"
    if abs(ratio / 2 - 1) <= 0.05:
        return "twice as much"
    return f"{number(float(ratio))} times as much"


def _ends(cosine: float) -> str:
    how = (
        "nearly the same direction" if cosine >= 0.95 else "similar directions" if cosine >= 0.7 else "other directions"
    )
    return f"both changed the function in {how}" if cosine >= 0.7 else f"they changed the function in {how}"


def _function(results: Results) -> str:
    found = results["functions"]
    if found is None:
        return ""
    a, b = results["names"]
    parts = []
    if found["start_distance"] is not None:
        parts.append(
            f"they start at {'the same function' if found['start_distance'] < _ROUNDING else 'different functions'}"
        )
    one, two = _numbers(results)["function_moved"]
    if one and two:
        parts.append(f"the outputs of {b} moved {times(two / one)} as those of {a}")
    if found["same_prediction"] is not None:
        parts.append(f"at the end {_percent(found['same_prediction'])} of the samples get the same prediction")
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "." if text else ""


def _kernels(results: Results) -> str:
    found = results["kernels"]
    if found is None:
        return ""
    symbols = (("start", "K₀"), ("average", "K̄"), ("end", "K_T"), ("change", "K_T − K₀"))
    known = [f"{symbol} {fixed(found[stage]['cka'])}" for stage, symbol in symbols if found[stage]["cka"] is not None]
    if not known or found["end"]["cka"] is None:
        return ""
    end = found["end"]["cka"]
    alike = (
        "are the same up to size"
        if end >= _SAME
        else "are alike"
        if end >= 0.8
        else "differ"
        if end < 0.5
        else "are partly alike"
    )
    both = " and ".join(results["names"])
    return f"The kernels of {both} {alike} at the end: CKA of one with the other is {listed(known)}."


def _layers(results: Results) -> str:
    rows = results["layers"]
    parts = []
    for side, name in zip("ab", results["names"], strict=True):
        held = [(row[f"change_share_{side}"], row["layer"]) for row in rows if row[f"change_share_{side}"] is not None]
        most = sorted((pair for pair in held if pair[0] >= _MUCH), reverse=True)[:3]
        if len(held) > 1 and most:
            parts.append(f"in {listed([f'{layer} ({_percent(share)})' for share, layer in most])} for {name}")
    return f"Most of the kernel’s change K_T − K₀ is {'; '.join(parts)}." if parts else ""


def _turn(results: Results) -> str:
    numbers = _numbers(results)
    sentences = []
    for goal, words in (("labels", "the labels"), ("change", "the network’s own change")):
        pairs = [numbers.get(f"alignment_{goal}_{stage}", (None, None)) for stage in ("start", "end")]
        if any(value is None for pair in pairs for value in pair):
            continue
        told = [f"{name} {fixed(pairs[0][k])} → {fixed(pairs[1][k])}" for k, name in enumerate(results["names"])]
        turns = [float(pairs[1][k] or 0) - float(pairs[0][k] or 0) for k in (0, 1)]
        sentences.append(f"{_turned(turns, results['names'])} {words}: centered sim {', '.join(told)}.")
    return " ".join(sentences)


def _turned(turns: Sequence[float], names: Sequence[str]) -> str:
    """Whose kernel turned toward a goal, and whose further; the words go on with the goal."""
    toward = [turn > _NOTICEABLE for turn in turns]
    if not any(toward):
        return "Neither kernel turned toward"
    if not all(toward):
        return f"Only the kernel of {names[toward.index(True)]} turned toward"
    gap = turns[1] - turns[0]
    further = "alike" if abs(gap) <= _NOTICEABLE else f"that of {names[gap > 0]} further"
    return f"Both kernels turned, {further}, toward"


def _performance(results: Results) -> str:
    parts = []
    for row in results["numbers"]:
        kind, _, when = row["number"].removeprefix("held_out.").rpartition("_")
        if kind in KINDS and when == "end":
            held = ", on samples held out" if row["number"].startswith("held_out.") else ""
            words = row["words"].partition(",")[0].replace(kind, WORDS.get(kind, kind))
            parts.append(f"{words}{held}: {_each(results, row)}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _each(results: Results, row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {number(row[side])}" for side, name in zip("ab", results["names"], strict=True))


def _ranks(results: Results) -> str:
    rows = {row["number"]: row for row in results["numbers"]}
    parts = []
    if "rank_final" in rows:
        parts.append(f"The effective rank of K_T is {_each(results, rows['rank_final'])}")
    if "weight_rank" in rows:
        told = [
            f"{name} {_percent(rows['weight_rank'][side])}"
            for side, name in zip("ab", results["names"], strict=True)
            if rows["weight_rank"][side] is not None
        ]
        parts.append(f"that of Δθ, median over blocks, is {', '.join(told)} of the full rank")
    return "; ".join(parts) + "." if parts else ""


def _outputs(results: Results) -> list[str]:
    found = results["outputs"]
    if found["same"]:
        return []
    if found["direction"] is not None:
        return [
            f"The kernels are of different directions in output space, the main one of each training (cosine "
            f"{fixed(found['direction'])}); inspect both with the outputs 'all', or the same, for kernels of the same."
        ]
    return ["The kernels are of other outputs in the two; inspect both with the same outputs for kernels of the same."]


def _percent(value: float | None) -> str:
    return "—" if value is None else f"{100 * value:.0f} %".replace("-", "−")
