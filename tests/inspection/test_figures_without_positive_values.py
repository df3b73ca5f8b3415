"""Figures of blocks that did not change, or of what is zero throughout, are drawn without a warning on logarithms."""

import warnings

import pytest
import torch
from matplotlib import pyplot
from torch import Tensor, nn

import adaptive_tangents as at
from adaptive_tangents.inspection import figures
from adaptive_tangents.runtime.figures import lines

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("changes", [["3.weight"], ["0.bias", "3.bias"]])
def test_singular_values_are_those_of_blocks_that_changed(changes: list[str]) -> None:
    """The heaviest matrices stay, as in a network whose adapters are merged."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 8), nn.Tanh(), *(nn.Linear(8, 8) for _ in range(8)), nn.Linear(8, 1)]
    model = nn.Sequential(*layers).eval()
    start: dict[str, Tensor] = {name: value.clone() for name, value in model.state_dict().items()}
    end = {name: value + 0.3 if name in changes else value for name, value in start.items()}
    found = at.inspect(model, start, end, X, nodes=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for draw in (figures.draw_spectra, figures.draw_blocks, figures.draw_growth, figures.draw_trajectory):
            figure = draw(found.results, found.arrays)
            figure.canvas.draw()
            if draw is figures.draw_spectra:
                legend = figure.axes[1].get_legend()
                told = [] if legend is None else [text.get_text().strip() for text in legend.get_texts()]
    blocks = found.results["blocks"]
    moved = {name for name in blocks if blocks[name]["change_norm"] > 0 and min(blocks[name]["shape"]) > 1}
    assert moved == set(told)


def test_a_line_of_zeros_has_a_linear_scale() -> None:
    figure, (left, right) = pyplot.subplots(1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lines(left, {"": ([1, 2], [0.0, 0.0])}, "Zeros", ("index", "value"), log="xy")
        lines(right, {"": ([1, 2], [0.0, 2.0])}, "Some", ("index", "value"), log="y")
        figure.canvas.draw()
    assert (left.get_xscale(), left.get_yscale(), right.get_yscale()) == ("log", "linear", "log")
    pyplot.close(figure)
