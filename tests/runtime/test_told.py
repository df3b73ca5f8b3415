"""Results print in a line, show as escaped tables, and draw figures that leave matplotlib's settings alone."""

import html.parser
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptive_tangents as at
import clean_process
from adaptive_tangents.runtime.told import few, few_digits, short
from adaptive_tangents.runtime.told import html as told_html
from prepared import draw

pytestmark = pytest.mark.xdist_group("told")

NAME = "a<script>&'\"$x$"  # a module's name may hold anything but a dot


def network(layers: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.Sequential()
        for k in range(layers):
            made.add_module(f"{NAME}{k}" + "long" * 20 * (k == 1), nn.Linear(3, 3))
            made.add_module(f"t{k}", nn.Tanh())
        return made.double()


@cache
def results() -> dict[str, Any]:
    model, x, y = network(24), draw(12, 3), draw(12, 3, seed=1)
    feats = at.tangent_features(model, x)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    end = {name: value + 0.2 * draw(*value.shape, seed=2) for name, value in start.items()}
    average = at.average_features(model, start, end, x, nodes=2)
    mixed = at.Mixed({f"*{k}" if k != 1 else "*long": at.Fixed() for k in range(10, 24)} | {"*": at.LayerScale()})
    kernels = feats.kernel(by_block=True)
    sketch = at.Sketch(240).fitted(feats)
    return {
        "features": feats, "average features": average, "sketched features": sketch.apply(feats), "sketch": sketch,
        "a sketched kernel": at.tangent_kernel(model, x, sketch=sketch),
        "a fit": at.fit(feats, y, structure=mixed, ridge=1.0),
        "a fit to kernels": at.fit(kernels, y, structure=mixed, ridge=1.0),
        "an explanation": at.explain(feats, average, at.Left(), rank=(1, 2)),
        "a forecast": at.forecast(model, x, y, structure=at.Fixed(), steps=1, validation=0),
        "a plan": feats.plan(), "a plan of a store": at.plan_kernel(model, x),
    }  # fmt: skip


NAMES = (
    "features", "average features", "sketched features", "sketch", "a sketched kernel", "a fit", "a fit to kernels",
    "an explanation", "a forecast", "a plan", "a plan of a store",
)  # fmt: skip
DRAWN = (
    "features",
    "average features",
    "sketched features",
    "a fit",
    "a fit to kernels",
    "an explanation",
    "a forecast",
)
TABLES = tuple(name for name in NAMES if name not in ("sketch", "a sketched kernel"))


class _Tags(html.parser.HTMLParser):
    """The tags of a text, which must be closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.seen.add(tag)
        self.rows += tag == "tr"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_result_is_listed() -> None:
    assert tuple(results()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_result_prints_in_one_bounded_line_without_tensors(name: str) -> None:
    text = repr(results()[name])
    assert "\n" not in text
    assert len(text) < 420
    assert "tensor(" not in text


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_the_first_blocks_and_escapes_names(name: str) -> None:
    text = results()[name]._repr_html_()
    tags = _Tags()
    tags.feed(text)
    assert not tags.open
    assert tags.seen <= {"div", "b", "table", "thead", "tbody", "tr", "th", "td", "p"}
    assert "<script>" not in text
    assert "a&lt;script&gt;&amp;" in text
    assert "and 12 more" in text
    assert tags.rows < 25


def test_a_store_prints_in_a_line_and_shows_a_table(tmp_path: Path) -> None:
    store = at.kernel_to_store(network(2), draw(6, 3), tmp_path / "K.zarr", by_block=True)
    assert "\n" not in repr(store)
    assert "a&lt;script&gt;" in store._repr_html_()
    assert "complete" in store._repr_html_()


@pytest.mark.parametrize("name", DRAWN)
def test_a_plot_is_a_figure_that_can_be_saved_and_leaves_the_settings_alone(name: str, tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is in the extra 'report'")
    from matplotlib.figure import Figure

    before = dict(matplotlib.rcParams)
    figure = results()[name].plot()
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "figure.png", dpi=40)
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert dict(matplotlib.rcParams) == before
    labels = [text.get_text() for axes in figure.axes for text in axes.get_yticklabels()]
    assert len(labels) < 60


@clean_process.in_one_group
def test_drawing_imports_no_pyplot_and_its_absence_is_said_in_words() -> None:
    script = """
import sys, torch, adaptive_tangents as at
feats = at.tangent_features(torch.nn.Linear(3, 1), torch.randn(9, 3))
found = at.fit(feats, torch.randn(9, 1), ridge=0.1)
every = (feats, found, at.fit(feats.kernel(), torch.randn(9, 1), ridge=0.1, structure=at.Fixed()))
for one in every:
    one.plot()
print("matplotlib.pyplot" in sys.modules)
sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
for one in every:
    try:
        one.plot()
    except at.TangentError as error:
        print(error)
"""
    done = clean_process.run(script)
    assert done.returncode == 0, done.stderr
    wanted = "plot: matplotlib is not installed; pip install 'adaptive-tangents[report]' installs it"
    assert done.stdout.splitlines() == ["False", *[wanted] * 3]


def test_a_forecast_without_matplotlib_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adaptive_tangents.forecasting.figures", None)
    with pytest.raises(at.TangentError, match=r"^plot: .* is not installed; pip install 'adaptive-tangents\[report\]'"):
        results()["a forecast"].plot()


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (lambda: short("one\ntwo"), "one two"),
        (lambda: short("x" * 300), "x" * 99 + "…"),
        (lambda: few_digits(at.TwoSided(at.Quadratic(1 / 3))), "TwoSided(left=Quadratic(strength=0.3333), right=None)"),
        (
            lambda: few_digits(at.Rows(at.Quadratic(1e-7 / 3))),
            "Rows(penalty_on_transform=Quadratic(strength=3.333e-08))",
        ),
        (lambda: few(["a", "b"]), "a, b"),
        (lambda: few([str(k) for k in range(9)]), "0, 1, 2, 3 and 5 more"),
        (lambda: told_html("<b>", {"k&": 0.123456})[:24], "<div><b>&lt;b&gt;</b><ta"),
    ],
)
def test_texts_are_short_and_escaped(made: Callable[[], str], wanted: str) -> None:
    assert made() == wanted
