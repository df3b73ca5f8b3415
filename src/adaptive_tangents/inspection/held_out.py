"""What is found on samples that training did not see, beside those that it saw."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adaptive_tangents.inspection import measures
from adaptive_tangents.inspection.judged import ACCURACY, WORDS
from adaptive_tangents.inspection.problem import Problem

_SHOWN = ("growth", "alignment", "alignment_centered", "cka")
SIDES = ("trained", "held_out")


def held_out_numbers(problem: Problem, wholes: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Performance, growth, alignment and CKA on samples trained on and on those held out, each alone.

    ``wholes`` are the kernels of all samples by stage. None if no samples are held out.
    """
    held = problem.data.held_out
    if held is None:
        return None
    held = held.to(problem.change.device)
    found = {side: _side(problem, wholes, rows) for side, rows in zip(SIDES, (~held, held), strict=True)}
    return found | {"sentence": sentence(found)}


def _side(problem: Problem, wholes: Mapping[str, Tensor], rows: Tensor) -> dict[str, Any]:
    index = rows.nonzero()[:, 0]
    kernels = {stage: kernel[index][:, index] for stage, kernel in wholes.items()}
    target = None if problem.target is None else problem.target[index]
    numbers = measures.kernel_numbers(kernels, problem.change[index], target)
    y = None if problem.data.y is None else problem.data.y[index]
    ends = {"start": problem.outputs[0], "end": problem.outputs[-1]}
    return {
        "samples": len(index),
        "performance": {end: problem.judge.performance(outputs[index], y) for end, outputs in ends.items()},
        **{name: numbers[name] for name in _SHOWN},
    }


def sentence(found: Mapping[str, Any] | None) -> str | None:
    """The finding in words: what happened on samples that training did not see, beside those that it saw.

    >>> side = {"samples": 8, "performance": {"start": None, "end": None}, "growth": {"final": 2.0},
    ...         "alignment_centered": {"change": {"initial": None, "final": None}}}
    >>> sentence({"trained": side, "held_out": side | {"samples": 4}})
    'On 4 samples that training did not see, the kernel becomes 2 times as large (trained on: 2).'
    """
    if found is None:
        return None
    held, trained = found["held_out"], found["trained"]
    told = _performance(held["performance"], trained["performance"])
    growth, other = (side["growth"]["final"] for side in (held, trained))
    if growth is not None and other is not None:
        told.append(f"the kernel becomes {growth:.2g} times as large ({_first(told)}{other:.2g})")
    pairs = [
        [side["alignment_centered"]["change"][stage] for stage in ("initial", "final")] for side in (held, trained)
    ]
    if all(value is not None for pair in pairs for value in pair):
        own, beside = (f"{first:.2f} to {last:.2f}" for first, last in pairs)
        told.append(f"its centered alignment with the change goes from {own} ({_first(told)}{beside})")
    if not told:
        return None
    words = told[0] if len(told) == 1 else f"{', '.join(told[:-1])}, and {told[-1]}"
    return f"On {held['samples']} samples that training did not see, {words}."


def _first(told: list[str]) -> str:
    """What the numbers in brackets are, said once."""
    return "" if told else "trained on: "


def _performance(held: Mapping[str, Any], trained: Mapping[str, Any]) -> list[str]:
    values = [side[end] for side in (held, trained) for end in ("start", "end")]
    if any(value is None for value in values):
        return []
    kind = next(iter(values[0]))
    shown = [f"{100 * v[kind]:.0f} %" if kind == ACCURACY else f"{v[kind]:.3g}" for v in values]
    name = kind if kind == ACCURACY else f"the {WORDS.get(kind, kind)}"
    return [f"{name} goes from {shown[0]} to {shown[1]} (trained on: {shown[2]} to {shown[3]})"]
