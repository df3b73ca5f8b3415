"""The report: folders are written completely or not at all; pages are self-contained and agree with the numbers."""

import copy
import html.parser
import json
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from adaptive_tangents._version import __version__
from adaptive_tangents.commands.report import PAGES
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.claims import over_seeds
from adaptive_tangents.experiments.kernel_alignment import page as kernel_alignment
from adaptive_tangents.experiments.kernel_alignment.claims import claims
from adaptive_tangents.experiments.registry import STUDIES
from adaptive_tangents.reporting import drawing, report
from adaptive_tangents.reporting.pages import given, number
from adaptive_tangents.runs.results import PAGE_FILE, load_results, write_results
from study_cases import in_outline, of_few_pixels, plain_figures

pytestmark = pytest.mark.xdist_group("report")

BLOCKS = ["hidden1", "hidden2", "readout"]
STAGES = ("initial", "average", "final")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def _ranks() -> dict[str, float]:
    return {"stable": 1.4, "entropy": 6.2, "participation": 2.3}


def _model(structure: str, strength: float | None, alignment: float) -> dict[str, Any]:
    bound = None if structure == "TwoSided" else 30.5
    numbers = {"alignment": alignment, "test_mse": 0.11, "test_error": 0.04, "objective": 31.0, "feasibility": 3e-13}
    ending = {"stationarity": 2e-9, "lower_bound": bound, "rounds": 40, "seconds": 0.5, "converged": strength != 0.1}
    blocks = {block: {"effective_rank": _ranks()} for block in BLOCKS}
    return {"structure": structure, "strength": strength, **numbers, **ending, "reason": "max_rounds", "block": blocks}


def _target(alignment: tuple[float, float, float], *, difficulty: float, ratio: float) -> dict[str, Any]:
    staged = dict(zip(STAGES, alignment, strict=True))
    weights = {"initial_weight": 1.13, "target_weight": 0.77, "explained": 0.957}
    block = {"alignment": staged, "trace_share": dict.fromkeys(STAGES, 1 / 3), "effective_rank": _ranks()}
    explain = {"total": 0.71, "hidden1": 0.43, "hidden2": 0.83, "readout": -1.3}
    return {
        "alignment": staged,
        "alignment_centered": staged,
        "block": dict.fromkeys(BLOCKS, block),
        "path_error": 0.0019,
        "linearization_error": 0.4,
        "place": {"share": 0.9, "all": 0.5, "near": 0.6, "far": 0.4},
        "path_error_db": 54.4,
        "path_nodes": 50,
        "diagonal": {"near": 6.0 * ratio, "far": 6.0},
        "diagonal_ratio": ratio,
        "decomposition": {"average": weights, "final": weights},
        "representability": {
            "rkhs_norm": 50 * difficulty,
            "top10_energy": 0.9 / difficulty,
            "leave_one_out_rmse": 0.2 * difficulty,
        },
        "network": {"train_mse": 1e-4, "test_mse": 0.09, "train_error": 0.0, "test_error": 0.03},
        "model": {
            "fixed": _model("Fixed", None, alignment[0]),
            "full_1": _model("Full", 1.0, 0.81),
            "two_sided_0.1": _model("TwoSided", 0.1, 0.49),
            "two_sided_1": _model("TwoSided", 1.0, 0.31),
        },
        "adapted_key": "two_sided_1",
        "explain": {"layer_scale": explain, "two_sided": explain},
    }


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _results() -> dict[str, Any]:
    targets = {
        "smooth": _target((0.05, 0.17, 0.28), difficulty=1.0, ratio=1.2),
        "sign": _target((0.04, 0.352, 0.59), difficulty=2.0, ratio=2.3),
    }
    return {
        "experiment": "kernel-alignment",
        "config": {"data": "mnist5k", "near": 0.2, "far": 0.8, "strengths": [0.1, 1.0]},
        "seed": 0,
        "versions": {"adaptive_tangents": "0.1.0", "torch": "2.6.0", "numpy": "2.0.0", "python": "3.11.0"},
        "device": "cpu",
        "threads": 2,
        "wall_seconds": {"total": 123.4, "smooth.train": 10.0},
        "data": {"name": "mnist5k", "train": 800, "test": 200, "kernel_samples": 24},
        "blocks": BLOCKS,
        "targets": targets,
        "reference": {
            "sign.alignment.average": {"paper": 0.40, "project": 0.352},
            "sign.diagonal.near": {"paper": "20–30"},
            "smooth.alignment.initial": {"project": 0.05},
            "sign.something_unmeasured": {"paper": 0.123},
        },
        "metrics": _flat(targets),
        "over_seeds": over_seeds([targets, targets]),
        "claims": claims(targets, over_seeds([targets, targets]), 800),
    }


def _arrays(n: int = 24) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for target in ("smooth", "sign"):
        y = np.sort(generator.uniform(-1.2, 1.2, n))
        arrays[f"{target}.teacher"] = y
        arrays[f"{target}.change"] = y if target == "smooth" else np.sign(y)
        for name in (*STAGES, "adapted"):
            features = generator.normal(size=(n, 40))
            arrays[f"{target}.kernel.{name}"] = (features @ features.T).astype(np.float32)
        arrays[f"{target}.images"] = generator.integers(0, 256, (n, 28, 28)).astype(np.uint8)
        for model in ("network", "fixed", "full_1", "two_sided_0.1", "two_sided_1"):
            for block in BLOCKS:
                arrays[f"{target}.singular_values.{model}.{block}"] = 0.5 ** np.arange(1 if block == "readout" else 9)
        arrays[f"{target}.linearization.positions"] = np.linspace(0, 1, 6)
        arrays[f"{target}.linearization.error"] = np.linspace(0, 0.4, 6)
        arrays[f"{target}.training.loss"] = 0.5 ** np.arange(8)
        arrays[f"{target}.place"] = np.where(np.arange(n) % 5, np.linspace(0, 1, n), np.nan)
    return arrays


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result folder with its report, never changed by a test."""
    directory = tmp_path_factory.mktemp("run")
    write_results(_results(), _arrays(), directory)
    with of_few_pixels():
        report.build_report(directory, PAGES)
    return directory


class _Page(html.parser.HTMLParser):
    """A page's attributes, and the text of each table row's cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def _page(directory: Path) -> _Page:
    return _Page((directory / PAGE_FILE).read_text(encoding="utf-8"))


def _set(results: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        results = results[key]
    results[last] = value


# --- the folder


def test_results_and_arrays_come_back_as_written(tmp_path: Path) -> None:
    results, arrays = _results(), _arrays()
    write_results(results, arrays, tmp_path / "new" / "folder")
    read_results, read_arrays = load_results(tmp_path / "new" / "folder")
    assert read_results == results
    assert read_arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read_arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(read_arrays[name], array)


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    results = {
        "experiment": "demo",
        "a": float("nan"),
        "b": [np.float32("inf"), np.float64(1.5)],
        "c": {"d": np.array([1.0, -np.inf])},
        "e": (np.int64(3), True, None, Path("data")),
    }
    write_results(results, {}, tmp_path)
    read = json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda name: pytest.fail(f"holds {name}"))
    expected = {
        "experiment": "demo",
        "a": None,
        "b": [None, 1.5],
        "c": {"d": [1.0, None]},
        "e": [3, True, None, "data"],
    }
    assert read == expected


def test_a_value_that_cannot_be_kept_is_refused_by_name_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TangentError, match=r"report: results\.config\.rate is a complex.*; give a number"):
        write_results({"experiment": "demo", "config": {"rate": 1j}}, {}, tmp_path / "run")
    with pytest.raises(TangentError, match=r"report: array 'x' holds Python objects; give an array of numbers"):
        write_results({"experiment": "demo"}, {"x": np.array([{}])}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("moment", ["while writing", "while replacing"])
def test_a_failing_write_leaves_the_old_files_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    write_results({"experiment": "old"}, {"x": np.ones(3)}, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*arguments: Any, **_: Any) -> None:
        if moment == "while writing":
            arguments[0].write(b"half an arch")
        raise OSError("no space left")

    monkeypatch.setattr(*((np, "savez_compressed") if moment == "while writing" else (os, "replace")), fail)
    with pytest.raises(OSError, match="no space left"):
        write_results({"experiment": "new"}, {"x": np.zeros(3)}, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_page_that_cannot_be_built_leaves_the_old_page_untouched(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "run")
    results = _results()
    del results["versions"]
    write_results(results, _arrays(), tmp_path / "run")
    message = r"report: results\.json is incomplete \(.*versions.*\); run the experiment"
    with plain_figures("kernel-alignment", but="kernels"), pytest.raises(TangentError, match=message):
        report.build_report(tmp_path / "run", PAGES)
    assert (tmp_path / "run" / "report.html").read_bytes() == (built / "report.html").read_bytes()


# --- refusals


def _remove(name: str) -> Any:
    return lambda directory: (directory / name).unlink()


def _write(name: str, text: str) -> Any:
    return lambda directory: (directory / name).write_text(text)


def _rewrite(path: str, value: Any) -> Any:
    def change(directory: Path) -> None:
        results = _results()
        _set(results, path, value)
        write_results(results, _arrays(), directory)

    return change


def _without_array(directory: Path) -> None:
    write_results(_results(), {k: v for k, v in _arrays().items() if k != "sign.kernel.final"}, directory)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, r"no folder .*run; give the folder with an experiment's results"),
        (_remove("results.json"), r"no results\.json in .*run; run an experiment with --out .*run first"),
        (
            _write("results.json", '{"a": '),
            r".*results\.json is not valid JSON \(.*line 1.*\); run the experiment again",
        ),
        (_write("results.json", "[1]"), r".*results\.json names no experiment; run the experiment again"),
        (_remove("arrays.npz"), r"no arrays\.npz beside .*results\.json; copy it there or run"),
        (_write("arrays.npz", "PK not a zip"), r"cannot read .*arrays\.npz \(.*\); run the experiment again"),
        (_without_array, r"arrays\.npz lacks sign\.kernel\.final; run the experiment again"),
        (_rewrite("experiment", "mystery"), r"no page for experiment 'mystery'; .* are kernel-alignment"),
        (
            _rewrite("targets.sign.alignment", {}),
            r"results\.json is incomplete \('average'\); run the experiment again",
        ),
    ],
)
def test_an_unusable_folder_is_refused_with_the_remedy(tmp_path: Path, spoil: Any, message: str) -> None:
    write_results(_results(), _arrays(), tmp_path / "run")
    spoil(tmp_path / "run")
    with plain_figures("kernel-alignment", but="models"), pytest.raises(TangentError, match=f"^report: {message}"):
        report.build_report(tmp_path / "run", PAGES)


@pytest.mark.parametrize("where", ["arrays", "a figure", "the context", "the template"])
def test_a_fault_of_a_page_is_not_blamed_on_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A key missing in the page's own code is a bug of the page; one missing in the results is theirs."""

    def asks(results: Any, *_: Any) -> Any:
        return {"own": {}}["own"]["forgotten"] if wrong == "own" else results["targets"]["sign"]["forgotten"]

    template = "{{ own.forgotten if wrong == 'own' else targets.sign.forgotten }}"
    monkeypatch.setattr(jinja2, "PackageLoader", lambda *_: jinja2.DictLoader({"page.html.j2": template}))
    told = kernel_alignment.PAGE
    pages = {
        "arrays": replace(told, arrays=asks),
        "a figure": replace(told, figures={"kernels": asks}),
        "the context": replace(told, figures={}, context=asks),
        "the template": replace(
            told,
            figures={},
            template="page.html.j2",
            context=lambda results: {"own": {}, "wrong": wrong},
        ),
    }
    made = _results()
    made["versions"]["adaptive_tangents"] = __version__
    write_results(made, _arrays(), tmp_path)
    offered = {"kernel-alignment": lambda: pages[where]}
    wrong = "theirs"
    with pytest.raises(
        TangentError, match=r"^report: results\.json is incomplete \(.*forgotten.*\); run the experiment"
    ):
        report.build_report(tmp_path, offered)
    wrong = "own"
    with pytest.raises((KeyError, jinja2.UndefinedError), match="forgotten"):
        report.build_report(tmp_path, offered)
    # Results of another version may lack what a page asks for in a mapping of its own.
    made["versions"]["adaptive_tangents"] = "0.1.0"
    write_results(made, _arrays(), tmp_path)
    with pytest.raises(TangentError, match=r"changed since it was written, or by an earlier version, .*forgotten"):
        report.build_report(tmp_path, offered)
    assert not (tmp_path / "report.html").exists()


# --- the findings


def test_findings_stand_beside_the_paper_and_the_project() -> None:
    rows = {row.label: tuple(row[1:]) for row in report.summary_table(_results(), kernel_alignment.PAGE)}
    assert rows["sign: sim(K̄, K_y)"] == ("0.352", "0.40", "0.352")
    assert rows["sign: mean K̄(x, x) near the boundary"] == ("13.8", "20–30", "—")
    assert rows["smooth: sim(K_0, K_y)"] == ("0.0500", "—", "0.05")
    assert rows["sign: something unmeasured"] == ("—", "0.123", "—")
    assert rows["smooth: K̄(x, x), near over far"] == ("1.20", "—", "—")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.17, "0.170"),
        (-0.0123456, "−0.0123"),
        (-2.41e-9, "−2.4·10⁻⁹"),
        (123456.0, "1.2·10⁵"),
        (1234.5, "1234"),
        (125.2, "125"),
        (36.0, "36.0"),
        (0.0, "0"),
        (7, "7"),
        (-7, "−7"),
        (None, "—"),
        (float("nan"), "—"),
        (True, "yes"),
        ("20–30", "20–30"),
    ],
)
def test_numbers_read_to_three_figures(value: Any, text: str) -> None:
    assert number(value) == text


def test_given_values_keep_the_figures_they_came_with() -> None:
    values = [0.4, 0.05, "kernel-alignment", [0.01, 1.0], -3, 0.1]
    assert [given(v) for v in values] == ["0.40", "0.05", "kernel-alignment", "0.01, 1", "−3", "0.10"]


CLAIM = "the initial features represent the target poorly."


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, f"Yes, and more if {CLAIM}"),
        ({"smooth.alignment.average": 0.6}, f"Yes, but not more if {CLAIM}"),
        ({"smooth.alignment.average": 0.05}, "In part: the kernel turns toward the task for the sign target only."),
        (
            {"smooth.alignment.average": 0.01, "sign.alignment.average": 0.03},
            "No: in this run training does not turn the kernel toward the task.",
        ),
        (
            {"sign.representability": _target((0, 0, 0), difficulty=1.0, ratio=1)["representability"]},
            "Yes: in this run training turns the kernel toward the task.",
        ),
        (
            {"smooth.alignment.average": None, "sign.alignment.average": None},
            "Unanswered: the alignment could not be measured in this run.",
        ),
    ],
)
def test_the_verdict_follows_the_numbers(changes: dict[str, Any], verdict: str) -> None:
    results = copy.deepcopy(_results())
    for path, value in changes.items():
        _set(results["targets"], path, value)
    assert kernel_alignment.PAGE.context(results)["verdict"] == verdict


def test_the_answer_counts_the_measures_that_agree() -> None:
    results = _results()
    _set(results["targets"], "sign.representability.rkhs_norm", 1.0)
    answer = " ".join(kernel_alignment.PAGE.context(results)["answer"])
    assert "By two of three measures, K_0 represents the sign target worse" in answer
    assert "0.35 for the sign target (up from 0.04 at the start)" in answer
    assert "rises more than the other’s: by 0.31 against 0.12." in answer
    assert "1.20 times for the smooth target and 2.30 times for the sign target" in answer


def test_the_exact_models_are_said_to_turn_the_kernel_as_far_as_the_best_of_them_does() -> None:
    full, two_sided = kernel_alignment.PAGE.context(_results())["turns"]
    assert full.startswith("Full raises sim(K_M, K_y) to at most 0.810 at λ = 1 for the smooth target (K_0: ")
    assert "to at most 0.490 at λ = 0.1 for the smooth target" in two_sided
    assert "and 0.490 at λ = 0.1 for the sign target (K_0: 0.0400)" in two_sided


# --- the page


def test_the_page_shows_every_finding_beside_the_papers(built: Path) -> None:
    shown = [tuple(row) for row in _page(built).rows]
    findings = report.summary_table(_results(), kernel_alignment.PAGE)
    assert len(findings) == 13
    for row in findings:
        assert (re.sub("[_̄]", "", row.label), *row[1:]) in shown


def test_the_page_shows_each_exact_model_with_its_certificates(built: Path) -> None:
    shown = [tuple(row) for row in _page(built).rows]
    certificates = ("3.0·10⁻¹³", "2.0·10⁻⁹", "40", "0.500")
    for name, bound, ending in [
        ("Fixed", "30.5", "converged"),
        ("Full, λ = 1", "30.5", "converged"),
        ("TwoSided, λ = 0.1", "—", "not converged: max_rounds"),
        ("TwoSided, λ = 1", "—", "converged"),
    ]:
        assert shown.count((name, "31.0", bound, *certificates, ending)) == 2


def test_the_page_loads_nothing_from_outside(built: Path) -> None:
    page = _page(built)
    text = (built / "report.html").read_text(encoding="utf-8")
    loading = [
        a for a in page.attributes if a[1] in ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
    ]
    assert len(loading) > 20
    assert [a for a in loading if not a[2].startswith(("data:image/", "#"))] == []
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _, _ in page.attributes}
    assert re.findall(r"url\((?!#)|@import|https?:|file:", text) == []


def test_heat_maps_and_digits_go_in_as_pixels_and_the_rest_as_shapes(built: Path) -> None:
    page = _page(built)
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert len(pictures) == 3
    assert all(value.startswith("data:image/png;base64,") for value in pictures)
    assert not [a for a in page.attributes if a[0] == "image"]
    assert len([a for a in page.attributes if a[:2] == ("svg", "viewbox")]) == 7


def test_every_link_and_shape_on_the_page_refers_to_one_place(built: Path) -> None:
    attributes = _page(built).attributes
    names = [value for _, name, value in attributes if name == "id"]
    assert sorted({name for name in names if names.count(name) > 1}) == []
    assert {value[1:] for _, name, value in attributes if name.endswith("href") and value[0] == "#"} <= set(names)
    assert set(re.findall(r"url\(#([^)]*)\)", (built / "report.html").read_text(encoding="utf-8"))) <= set(names)


def test_every_figure_exists_as_png_and_svg(built: Path) -> None:
    names = {path.stem for path in (built / "figures").iterdir()}
    assert names == set(STUDIES["kernel-alignment"].page().figures)
    for name in names:
        assert (built / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert ElementTree.parse(built / "figures" / f"{name}.svg").getroot().tag.endswith("svg")
    assert len(list((built / "figures").iterdir())) == 2 * len(names)


def test_every_figure_has_a_caption_and_words_for_those_who_cannot_see_it(built: Path) -> None:
    text = (built / "report.html").read_text(encoding="utf-8")
    figures = re.findall(r"<figure .*?</figure>", text, flags=re.DOTALL)
    assert len(figures) == len(STUDIES["kernel-alignment"].page().figures)
    for k, figure in enumerate(figures, start=1):
        assert f"<b>Figure {k}.</b>" in figure
        assert "Look for" in figure
        assert re.search(r'role="img" aria-label="[^"]{20,}"', figure)


def test_no_notation_is_left_unset(built: Path) -> None:
    text = re.sub(
        r"<(style|svg|pre)\b.*?</\1>|<[^>]*>", "", (built / "report.html").read_text("utf-8"), flags=re.DOTALL
    )
    assert re.findall(r"\b\w_\w\b|\w̄|\{\{|\bNone\b|\bnan\b", text) == []


def test_the_same_results_give_the_same_page(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "run")
    with plain_figures("kernel-alignment", but="kernels"):
        pages = [report.build_report(tmp_path / "run", PAGES).read_bytes() for _ in range(2)]
    assert pages[0] == pages[1]
    assert len(pages[0]) > 50_000


def test_a_figure_is_laid_out_once_for_both_of_its_files_and_drawn_once_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    execute, executed = ConstrainedLayoutEngine.execute, list[Figure]()
    draw_figure, times = Figure.draw, list[Figure]()

    def counted(engine: ConstrainedLayoutEngine, figure: Figure) -> None:
        executed.append(figure)
        execute(engine, figure)

    def drawn_once(figure: Figure, renderer: Any) -> None:
        times.append(figure)
        draw_figure(figure, renderer)

    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", counted)
    monkeypatch.setattr(Figure, "draw", drawn_once)
    draw = PAGES["kernel-alignment"]().figures["diagonal"]
    drawn = drawing.render(draw, "diagonal", _results(), _arrays())
    assert (len(executed), len(times)) == (1, 2)
    assert drawn.png.startswith(b"\x89PNG")
    assert "<svg " in drawn.svg


def test_a_page_is_built_even_where_numbers_could_not_be_measured(tmp_path: Path) -> None:
    def emptied(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: item if key == "strength" else emptied(item) for key, item in value.items()}
        return None if isinstance(value, float) else value

    results = _results()
    results["targets"] = emptied(results["targets"])
    results["metrics"] = _flat(results["targets"])
    write_results(results, _arrays(), tmp_path)
    with in_outline():
        text = report.build_report(tmp_path, PAGES).read_text(encoding="utf-8")
    assert "Unanswered" in text


# --- the page in a browser


def _browse(tmp_path: Path, page: Path, *flags: str) -> str:
    quiet = ["disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-component-update"]
    command = [CHROMIUM, "--headless", "--no-sandbox", *(f"--{flag}" for flag in quiet), "--disable-sync"]
    profile = tmp_path / "profile"
    run = subprocess.run(
        [*command, f"--user-data-dir={profile}", *flags, page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed")


@needs_chromium
def test_a_browser_renders_the_page(built: Path, tmp_path: Path) -> None:
    dom = _browse(tmp_path, built / "report.html", "--dump-dom")
    assert dom.count("<figure ") == len(STUDIES["kernel-alignment"].page().figures)
    assert "How this was made" in dom
    picture = tmp_path / "page.png"
    _browse(tmp_path, built / "report.html", "--window-size=1100,2000", f"--screenshot={picture}")
    assert picture.stat().st_size > 50_000


@needs_chromium
@pytest.mark.parametrize("width", [400, 1100])
def test_the_page_never_scrolls_sideways(built: Path, tmp_path: Path, width: int) -> None:
    (tmp_path / "report.html").write_bytes((built / "report.html").read_bytes())
    frame = tmp_path / "frame.html"
    measure = (
        "const page = this.contentDocument.documentElement; "
        "document.title = page.clientWidth + ' of ' + page.scrollWidth"
    )
    source = (built / "report.html").read_text(encoding="utf-8").replace("&", "&amp;").replace('"', "&quot;")
    frame.write_text(
        f'<iframe style="width:{width}px;height:900px;border:0" onload="{measure}" srcdoc="{source}"></iframe>'
    )
    dom = _browse(tmp_path, frame, "--dump-dom", "--window-size=1400,1000")
    shown, needed = map(int, re.findall(r"<title>(\d+) of (\d+)</title>", dom)[0])
    assert width - 20 <= shown <= width
    assert needed == shown
