"""A tracker's figure reads on a page of 700 pixels, and at 7 inches nothing is cut off or covers anything else."""

from itertools import combinations

import pytest
import torch
from torch import nn

import adaptive_tangents as at
from prepared import draw

PAGE = 700  # pixels


@pytest.mark.parametrize("width", [None, 7.0])
def test_its_letters_are_whole_apart_and_large_enough(width: float | None) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes
    from matplotlib.text import Text

    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = draw(12, 4), torch.arange(12) % 3
    tracker = at.Tracker(model, x, y, budget=None, every=1)
    for step in range(0, 60_000, 10_000):
        tracker.record(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * parameter.tanh()
    figure = tracker.plot()
    if width is not None:
        figure.set_size_inches(width, figure.get_size_inches()[1])
    figure.draw_without_rendering()
    unseen = {
        label
        for axes in figure.findobj(Axes)
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks() + axis.get_minor_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
        for label in (tick.label1, tick.label2)
    }
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in unseen]
    places = {text: text.get_window_extent() for text in texts}
    assert {"labels, centered", "change f − f₀, centered", "with the last record", "loss (right)"} <= {
        text.get_text() for text in places
    }
    for text, box in places.items():
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text
    for (one, first), (other, second) in combinations(places.items(), 2):
        assert not first.overlaps(second), (one, other)
    shrunk = min(1.0, PAGE / figure.bbox.width)
    assert min(text.get_fontsize() for text in texts) * figure.dpi / 72 * shrunk >= 10
