"""The figure of a forecast. It draws finished numbers and measures nothing."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from adaptive_tangents.reporting.drawing import COLORS, DASHES, INK, MUTED, STAGES, fixed, grid, named

_SHOWN = 16


def draw_forecast(
    losses: Sequence[float],
    held: Sequence[float],
    shares: Mapping[str, float],
    ranks: Mapping[str, float],
    turned: Mapping[str, float],
) -> Figure:
    """The losses at θ₀ and after each step, the share and rank of each block's change, the kernel's alignment by stage."""
    names = sorted(shares, key=lambda name: -shares[name])[:_SHOWN]
    figure, (row,) = grid(1, 3, 1.6 + max(1.6, 0.2 * len(names)))
    left, middle, right = row
    left.plot(range(len(losses)), losses, "o-", color=COLORS[0], ms=4, label="training samples")
    if np.isfinite(held).any():
        left.plot(range(len(held)), held, "o", ls=DASHES, color=COLORS[1], ms=4, label="held out")
    left.set(xlabel="step", ylabel="loss", ylim=(0, None))
    left.legend()
    left.set_title("Loss", loc="left")
    places = range(len(names))
    middle.barh(places, [100 * shares[name] for name in names], color=COLORS[0], height=0.6)
    middle.set_yticks(places, [named(name) for name in names])
    middle.invert_yaxis()
    middle.set(xlabel="share of the change, %")
    for place, name in zip(places, names, strict=True):
        middle.annotate(
            f"rank {ranks[name]:.1f}", (100 * shares[name], place), (3, 0), textcoords="offset points", va="center",
            color=MUTED, fontsize=7.5,
        )  # fmt: skip
    middle.margins(x=0.25)
    middle.set_title("What will change", loc="left")
    stages = [stage for stage in STAGES if stage in turned]
    right.bar(range(len(stages)), [turned[stage] for stage in stages], color=INK, width=0.55)
    right.set_xticks(range(len(stages)), [STAGES[stage] for stage in stages])
    for place, stage in enumerate(stages):
        right.annotate(
            fixed(turned[stage]), (place, turned[stage]), (0, 3), textcoords="offset points", ha="center", fontsize=8
        )
    right.set(ylabel="centered alignment with the change", ylim=(0, 1.05))
    right.set_title("How far the kernel will turn", loc="left")
    return figure
