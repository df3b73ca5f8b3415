"""The first screen of an inspection: its sentence for every kind of result, its tiles, samples and tables."""

import copy
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from adaptive_tangents.commands.report import PAGES
from adaptive_tangents.inspection import InspectConfig, run
from adaptive_tangents.inspection.first_screen import first_sentence, layer_rows_of, start_words, tiles, where
from adaptive_tangents.inspection.page import findings
from adaptive_tangents.inspection.sampling import order_of
from adaptive_tangents.inspection.tables import MOST_ROWS, block_table, layer_table
from adaptive_tangents.loading import Data
from adaptive_tangents.reporting import report
from adaptive_tangents.reporting.frame import Cell, DataTable
from adaptive_tangents.reporting.pictures import heat_map, image
from adaptive_tangents.runs.record import RunResult
from adaptive_tangents.runs.results import load_results, write_results
from study_cases import explained_in_rounds, plain_figures

pytestmark = pytest.mark.xdist_group("first screen")

Numbers = dict[str, Any]


def row(name: str, share: float | None, *, kind: str = "layer", start: str | None = None, rank: int = 4) -> Numbers:
    stages = {"initial": 0.2, "average": 0.2, "final": 0.2}
    return {
        "name": name, "kind": kind, "blocks": [name], "start": start, "change_share": share, "trace_change_share": None,
        "trace_share": stages, "growth": {"average": 1.0, "final": 2.0}, "alignment": stages, "alignment_centered": stages,
        "alignment_labels_centered": stages, "cka": 0.5, "change_norm": 1.0, "rank_90": rank, "rank_most": 32, "explain": {},
    }  # fmt: skip


def results(
    layers: list[Numbers], *, growth: float | None = 2.3, sims: tuple[float | None, float | None] = (0.1, 0.6),
    labels: bool = True,
) -> Numbers:  # fmt: skip
    stages = {"initial": sims[0], "average": None, "final": sims[1]}
    goals = {"change": stages} | ({"labels": stages} if labels else {})
    return {
        "growth": {"average": 1.5, "final": growth}, "alignment": goals, "alignment_centered": goals, "layers": layers,
        "blocks": {row["name"]: {"shape": [32, 64], "rank_90": row["rank_90"]} for row in layers},
        "data": {"samples": 32}, "performance": {"start": {"accuracy": 0.25}, "end": {"accuracy": 0.9375}},
    }  # fmt: skip


DEEP = [row("embeddings", 0.02, kind="embeddings"), *(row(f"layer {k}", 0.03) for k in range(4)), row("layer 4", 0.2),
        row("layer 5", 0.26), row("layer 6", 0.2), row("head", 0.2, kind="head", start="new")]  # fmt: skip


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (results(DEEP), "Most of the change (66 %) is in layers 4 to 6; the kernel grew to 2.3 times its size and turned "
         "toward the labels; in the median matrix, 4 of 32 directions hold 90 % of its change."),
        (results([*DEEP[:-1], row("head", 0.4, kind="head", start="new")]),
         "Most of the change (66 %) is in layer 5 and the new head; the kernel grew to 2.3 times its size and turned toward "
         "the labels; in the median matrix, 4 of 32 directions hold 90 % of its change."),
        (results([row(f"layer {k}", 0.125) for k in range(4)] + [row("head", 0.5, kind="head", rank=1)], growth=0.43,
                 sims=(0.6, 0.1), labels=False),
         "Most of the change (50 %) is in the head; the kernel shrank to 43 % of its size and turned away from what was "
         "learned; in the median matrix, 4 of 32 directions hold 90 % of its change."),
        (results([row(f"layer {k}", 0.1, rank=30) for k in range(10)], growth=1.01, sims=(0.4, 0.41)),
         "Most of the change (50 %) is in layers 0 to 4; the kernel kept its size and hardly turned; the change of the "
         "weights is spread over many directions."),
        (results([row(name, 1 / 7) for name in "abcdefg"], growth=1510.0, sims=(0.9, 0.91)),
         "The change is spread over the whole network; the kernel grew to 1,500 times its size and hardly turned (it was "
         "aligned from the start); in the median matrix, 4 of 32 directions hold 90 % of its change."),
        (results([row("layer 0", 1.0, rank=1)], growth=None, sims=(None, 0.3)),
         "The kernel was zero at the start; 1 of 32 directions holds 90 % of the change of the weights."),
        (results([]), "The kernel grew to 2.3 times its size and turned toward the labels."),
    ],
)  # fmt: skip
def test_the_first_sentence_follows_the_numbers(found: Numbers, sentence: str) -> None:
    assert first_sentence(found) == sentence
    assert not re.search(r"[A-Za-z]_|[×→φθ̄]", sentence)  # words, no symbols


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([(2, 300), (4, 384), (200, 384)], "in the median matrix, 4 of 384 directions hold 90 % of its change"),
        ([(1, 100), (6, 10)], "in the median matrix, 1 of 100 directions holds 90 % of its change"),
        ([(3, 5), (3, 4)], "the change of the weights is spread over many directions"),
        ([(1, 1), (2, 32), (None, 64)], "2 of 32 directions hold 90 % of the change of the weights"),
    ],
)
def test_directions_are_those_of_one_matrix_the_median_by_their_share(
    ranks: list[tuple[int | None, int]], words: str
) -> None:
    blocks = {f"b{k}": {"shape": [most, 400], "rank_90": rank} for k, (rank, most) in enumerate(ranks)}
    assert words in first_sentence(results([row("layer 0", 1.0)]) | {"blocks": blocks})


def test_negative_shares_leave_most_of_the_change_where_it_is() -> None:
    assert where(results([row("layer 0", -0.4), row("layer 1", 0.3), row("layer 2", 1.1)])) == ("layer 2", 1.1)
    assert where(results([row("layer 0", 1.0)])) is None


def test_tiles_tell_performance_size_alignment_and_place() -> None:
    told = [(tile.title, tile.before, tile.value) for tile in tiles(results(DEEP))]
    assert told == [
        ("Accuracy", "25 %", "94 %"),
        ("Size of the kernel", "", "2.3×"),
        ("Alignment with the labels", "0.10", "0.60"),
        ("Where", "", "layers 4 to 6"),
    ]
    none = results(DEEP, growth=None, labels=False) | {"performance": {"start": None, "end": None}}
    assert [tile.value for tile in tiles(none)] == ["32", "no kernel at the start", "0.60", "layers 4 to 6"]
    mse = results(DEEP, growth=0.5) | {"performance": {"start": {"mse": 2.0}, "end": {"mse": 0.0125}}}
    assert [tile.value for tile in tiles(mse)][:2] == ["0.0125", "50 %"]


def block(start: str | None, shape: tuple[int, int] = (4, 4)) -> Numbers:
    return {"start": start, "shape": list(shape)}


def test_what_is_special_about_the_start_is_said_in_words() -> None:
    found = results(DEEP)
    found["blocks"] = {
        "layer 5": block(None),
        "head": block("new"),
        "x.lora_A": block("no kernel"),
        "x.lora_B": block("zero"),
    }
    told = start_words(found)
    assert "The new head is new" not in told
    assert told.startswith("The head is new: its weights start as freshly drawn ones")
    assert "so 1 of their first factors (lora_A) have no kernel at the start" in told
    assert "not told as a ratio" in told
    scratch = results([row("layer 0", 1.0)]) | {"blocks": {"0": block("new"), "2": block("new"), "4": block(None)}}
    assert start_words(scratch) == "Most weights start as freshly drawn ones: the network starts from scratch."
    odd = results([row("layer 0", 1.0)]) | {"blocks": {"a": block("zero"), "b": block("no kernel"), "c": block(None)}}
    assert start_words(odd).startswith("a starts with weights of zero. b has nearly no kernel at the start.")
    assert start_words(results([row("layer 0", 1.0)]) | {"blocks": {"a": block(None)}}) == ""


# a run


HOSTILE = '<img src=x onerror="alert(1)"> & "quoted" {{ 7 * 7 }}</td></table><script>alert(2)</script>'


class Named(nn.Module):
    """Names that a page must escape, one of which holds markup."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.parts = nn.ModuleDict({"<b>bold</b>&": nn.Linear(4, 4)})
        self.classifier = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.classifier(torch.tanh(self.parts["<b>bold</b>&"](self.embed(x).mean(1))))
        return found


@pytest.fixture(scope="module")
def made() -> RunResult:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Named().double().eval()
        start = {name: value.clone() for name, value in model.state_dict().items()}
        end = {name: value + 0.4 * torch.rand_like(value) for name, value in start.items()}
        x = torch.randint(0, 9, (24, 5))
    texts = tuple(f"{HOSTILE} {k}" + " long" * (400 if k % 2 else 0) for k in range(24))
    data = Data(x, torch.arange(24) % 2, ("<i>no</i>", "yes & no"), texts=texts)
    with explained_in_rounds(1):
        return run(model, {"a": start, "b": end}, data, InspectConfig(samples=20, nodes=2, fit_operations=1))


EXTRA = {"command": "adaptive-tangents inspect", "model": "m", "data_file": "<u>texts</u>.csv"}


def page_of(found: RunResult, folder: Path, change: Any = lambda results, arrays: None) -> str:
    told, arrays = copy.deepcopy(found.results) | EXTRA, dict(found.arrays)
    change(told, arrays)
    write_results(told, arrays, folder)
    with plain_figures("inspect"):
        return report.build_report(folder, PAGES).read_text("utf-8")


@pytest.fixture(scope="module")
def page(made: RunResult, tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(made, tmp_path_factory.mktemp("page"))


def test_layers_and_blocks_of_a_run_share_out_the_kernels_change(made: RunResult) -> None:
    layers, blocks = made.results["layers"], made.results["blocks"]
    assert [layer["name"] for layer in layers] == ["embeddings", "parts", "head"]
    for rows in (layers, blocks.values()):
        assert sum(each["change_share"] for each in rows) == pytest.approx(1, abs=1e-9)
        assert sum(each["trace_change_share"] for each in rows) == pytest.approx(1, abs=1e-6)
    for layer in layers:
        assert layer["change_share"] == pytest.approx(sum(blocks[name]["change_share"] for name in layer["blocks"]))
        (name,) = layer["blocks"]  # of one block each, so that all numbers are the block's own
        for key in ("alignment", "trace_share", "growth", "cka", "rank_90", "change_norm"):
            assert layer[key] == pytest.approx(blocks[name][key]), key
        assert layer["explain"]["two_sided"] == pytest.approx(blocks[name]["explain"]["two_sided"])


def test_only_the_texts_that_are_shown_are_stored_and_these_clipped(made: RunResult) -> None:
    data = made.results["data"]
    most, least = order_of(made.arrays["change"])
    assert data["texts_of"] == most + least
    assert len(data["texts"]) == 12
    chosen = made.arrays["sample"]
    for text, k in zip(data["texts"], data["texts_of"], strict=True):
        assert text.startswith(f"{HOSTILE} {chosen[k]}")
        assert len(text) <= 600
    norms = np.linalg.norm(made.arrays["change"], axis=1)
    assert norms[most].min() >= np.delete(norms, most).max()
    assert order_of(np.ones((3, 1))) == ([0, 1], [2])
    assert run_texts(Data(torch.randn(4, 2))) is None
    assert run_texts(Data(torch.randn(4, 2), texts=("a", "b", "c", "d"))) == ("d", "b")


def run_texts(data: Data) -> tuple[str, ...] | None:
    return data.take(torch.tensor([3, 1])).texts


def test_hostile_texts_names_and_classes_are_shown_as_they_are_and_do_nothing(page: str) -> None:
    assert html.escape(HOSTILE, quote=False).split(" & ")[0].split('"')[0] in page
    assert "<img src=x" not in page
    assert "<b>bold" not in page
    assert "<i>no" not in page
    assert "<u>texts" not in page
    assert "alert(2)</script>" not in page
    assert page.count("<script") == 1
    assert "{{ 7 * 7 }}" in page
    assert "49" not in re.findall(r"quoted&#34; (\S+)", page)
    assert "&lt;b&gt;bold&lt;/b&gt;&amp;" in page


def test_the_page_begins_with_the_sentence_the_tiles_and_the_legend(page: str, made: RunResult) -> None:
    places = [
        page.index(part)
        for part in ('class="sentence"', 'class="tiles"', 'class="legend"', 'class="strip"', "<details")
    ]
    assert places == sorted(places)
    plain = re.sub(r"<(style|script)\b.*?</\1>|<[^>]*>", "", page, flags=re.DOTALL)
    first = first_sentence(made.results)
    assert plain.replace("\u00a0", " ").index(first) < plain.index("How to read this")
    assert not re.search(r"[KθφT]_?[0T]\b|K̄", plain[: plain.index("How to read this")])  # no sign before its legend
    assert findings(made.results)[0] == first


def test_the_page_loads_nothing_from_outside(page: str) -> None:
    assert not re.search(r'(?:src|href|action|poster|srcset)="(?!#|data:)', page)
    assert not re.search(r"https?://|@import|url\((?!#)", page.replace("http://www.w3.org/", ""))


def test_tables_are_read_without_a_script_and_downloaded_as_they_are(page: str, made: RunResult) -> None:
    found = load_csv(page, "layers")
    assert found[0][:2] == ["layer", "change_share"]
    shares = [float(line[1]) for line in found[1:]]
    assert shares == pytest.approx([layer["change_share"] for layer in made.results["layers"]])
    blocks = load_csv(page, "blocks")
    assert [line[0] for line in blocks[1:]] == list(made.results["blocks"])
    assert page.count('<table class="sortable">') == 2
    assert page.count('<tr><th scope="row"') == 3 + 3


def load_csv(page: str, name: str) -> list[list[str]]:
    import csv
    from urllib.parse import unquote

    (text,) = re.findall(rf'download="{name}\.csv" href="data:text/csv;charset=utf-8,([^"]*)"', page)
    return list(csv.reader(unquote(html.unescape(text)).splitlines()))


def test_a_table_keeps_its_values_beside_its_words() -> None:
    table = DataTable(
        "t", ("a", "b"), ("a", "b"), [(Cell('x,"y"', 'x,"y"'), Cell("12 %", 0.1234)), (Cell("z", "z"), Cell("—", None))]
    )
    assert table.csv == 'a,b\n"x,""y""",0.1234\nz,\n'


def test_of_very_many_blocks_the_largest_are_in_the_table() -> None:
    base = {
        "trace_share": {"initial": 0.1, "average": None, "final": 0.1}, "growth": {"average": None, "final": 1.0},
        "alignment": {"initial": 0.1, "final": 0.2}, "cka": 1.0, "change_norm": 1.0, "change_relative": 0.1,
        "effective_rank": {"participation": 2.0}, "shape": [4, 4], "explain": {},
    }  # fmt: skip
    blocks = {f"layers.{k}.fc": copy.deepcopy(base) for k in range(MOST_ROWS + 5)}
    blocks["layers.0.fc"]["trace_share"]["final"] = 0.0
    found = results([]) | {"blocks": blocks}
    table = block_table(found)
    assert len(table.rows) == MOST_ROWS
    assert table.rows[0][0].text == "layers.1.fc"
    assert f"Of {MOST_ROWS + 5} blocks" in table.note


def older(told: Numbers, arrays: dict[str, Any]) -> None:
    """What results lack that were written before layers were rolled up."""
    told.pop("layers")
    for key in ("texts", "texts_of"):
        told["data"].pop(key)
    for numbers in told["blocks"].values():
        for key in ("change_share", "trace_change_share", "rank_90", "start"):
            numbers.pop(key)
    for key in ("sample", "predicted.start"):
        arrays.pop(key)


def test_older_results_are_still_drawn(made: RunResult, tmp_path: Path) -> None:
    text = page_of(made, tmp_path, older)
    told, _ = load_results(tmp_path)
    assert [layer["name"] for layer in layer_rows_of(told)] == ["embeddings", "parts", "head"]
    shares = [layer["trace_share"]["final"] for layer in layer_rows_of(told)]
    assert sum(shares) == pytest.approx(1)
    assert first_sentence(told).startswith("The kernel ")
    assert "share of the change" not in [re.sub(r"<[^>]*>", "", head) for head in layer_table(told).head]
    assert "Most of the change" not in text
    assert "sample " in text


def test_results_without_an_average_or_labels_are_drawn(made: RunResult, tmp_path: Path) -> None:
    def cut(told: Numbers, arrays: dict[str, Any]) -> None:
        for key in [
            key for key in arrays if ".average" in key or key in ("y", "target", "predicted", "predicted.start")
        ]:
            arrays.pop(key)
        told["growth"]["average"] = None
        told["data"]["labels"] = told["data"]["classes"] = None
        told["alignment"].pop("labels")
        told["performance"] = {"start": None, "end": None}
        for point in told["trajectory"]:
            point["performance"] = None

    text = page_of(made, tmp_path, cut)
    assert "measured, without labels" in text
    assert json.dumps(json.loads((tmp_path / "results.json").read_text())["growth"]["average"]) == "null"


def test_pictures_are_files_that_keep_their_values() -> None:
    import base64
    import io

    from matplotlib.image import imread

    def read(uri: str) -> np.ndarray:
        return np.asarray(
            imread(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))), format="png")
        )

    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    np.testing.assert_allclose(read(image(pixels))[..., :3] * 255, pixels, atol=0.5)
    np.testing.assert_allclose(read(image(pixels[..., :1])) * 255, pixels[..., 0], atol=0.5)
    warm, cold = read(heat_map(np.array([[1.0, -1.0], [-1.0, 1.0]])))[0, :2]
    assert warm[0] > warm[2]
    assert cold[2] > cold[0]
    assert read(heat_map(np.random.default_rng(0).normal(size=(500, 500)))).shape[0] <= 160
    assert read(heat_map(np.zeros((3, 3)))).shape[:2] == (3, 3)


# in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed")


def browse(folder: Path, text: str) -> str:
    """The page's document once its scripts have run."""
    (folder / "shown.html").write_text(text, "utf-8")
    quiet = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
             "disable-component-update", "disable-sync", "window-size=1400,1000", "dump-dom"]  # fmt: skip
    command = [str(CHROMIUM), *(f"--{flag}" for flag in quiet), f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run([*command, (folder / "shown.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_chromium
def test_a_click_on_a_heading_sorts_by_value(page: str, made: RunResult, tmp_path: Path) -> None:
    click = "<script>document.querySelector('table.sortable thead').rows[0].cells[1].querySelector('button').click()</script>"
    document = browse(tmp_path, page.replace("</body>", click + "</body>"))
    (table, *_) = re.findall(r'<table class="sortable">.*?</table>', document, re.DOTALL)
    found = re.findall(r'<th scope="row"[^>]*>([^<]*)</th>', table)
    assert found == [row["name"] for row in sorted(made.results["layers"], key=lambda row: -row["change_share"])]
    assert 'aria-sort="descending"' in table


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_never_scrolls_sideways_with_all_sections_open(page: str, tmp_path: Path, width: int) -> None:
    measure = "const p = this.contentDocument.documentElement; document.title = p.clientWidth + ' of ' + p.scrollWidth"
    source = (
        page.replace('<details class="fold"', '<details open class="fold"').replace("&", "&amp;").replace('"', "&quot;")
    )
    frame = f'<iframe style="width:{width}px;height:900px;border:0" onload="{measure}" srcdoc="{source}"></iframe>'
    shown, needed = map(int, re.findall(r"<title>(\d+) of (\d+)</title>", browse(tmp_path, frame))[0])
    assert width - 20 <= shown <= width
    assert needed == shown
