"""The strip of kernels at the top of the page: small heat maps side by side, on a phone below each other."""

from dataclasses import dataclass

import numpy as np

from adaptive_tangents.inspection.figures import centered, held, sorting
from adaptive_tangents.inspection.first_screen import goal_of, telling
from adaptive_tangents.reporting.drawing import fixed
from adaptive_tangents.reporting.pictures import heat_map
from adaptive_tangents.runs.results import Arrays, Results

_SIGNS = {"initial": ("K₀", "at the start"), "average": ("K̄", "average over the way"), "final": ("K_T", "at the end")}


@dataclass(frozen=True)
class Panel:
    """A kernel: its sign, its words, its heat map as a data URI, and its alignment, if it has one."""

    sign: str
    words: str
    picture: str
    alignment: str = ""


def strip(results: Results, arrays: Arrays) -> list[Panel]:
    """The kernels at the start, on average, at the end, of what was learned, and of the labels: centered and sorted."""
    order, _ = sorting(results, arrays)
    goal, words = goal_of(results)
    name, sims = telling(results, goal)
    panels = [
        Panel(*_SIGNS[stage], _picture(arrays[f"kernel.{stage}"], order), f"{name} with {words} {fixed(sims[stage])}")
        for stage in held(arrays)
    ]
    goals = [("K_y", "what was learned", arrays["change"])]
    goals += [("Labels", "their own kernel", arrays["target"])] if "target" in arrays else []
    return [*panels, *(Panel(sign, words, _picture(y @ y.T, order)) for sign, words, y in goals)]


def _picture(kernel: np.ndarray, order: np.ndarray) -> str:
    return heat_map(centered(kernel)[np.ix_(order, order)])
