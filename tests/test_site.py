"""The site: it builds without a warning, asks no other host for anything, its links hold, and it has every public name."""

import contextlib
import hashlib
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest
import torch

import adaptive_tangents as at

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CONFIG = (ROOT / "mkdocs.yml").read_text("utf-8")
NEEDED = ("mkdocs", "material", "mkdocstrings", "mkdocs_jupyter")
PAGES = ("get_started.md", "concepts.md", "fit.md")  # those of this file; the other pages have tests of their own
WINGS = (
    "capture",
    "features",
    "forecasting",
    "inspection",
    "integrations",
    "kernels",
    "measures",
    "nn",
    "penalties",
    "sketching",
    "solvers",
    "storage",
    "structures",
    "tracking",
)
LOADING = {"stylesheet", "icon", "shortcut icon", "preload", "preconnect", "prefetch", "modulepreload", "manifest"}
pytestmark = pytest.mark.xdist_group("site")  # one process builds it
# As ``python -m mkdocs``. Looking for garbage would be a fifth of the work.
BUILD = "import gc; gc.disable(); from mkdocs.__main__ import cli; cli()"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def in_navigation() -> list[str]:
    """The files that the navigation names."""
    return re.findall(r"^ +- (?:[^:\n]+: )?([\w/]+\.(?:md|ipynb))$", CONFIG[CONFIG.index("\nnav:") :], re.MULTILINE)


@dataclass(frozen=True)
class Built:
    """A site in a folder, and what was printed while it was made."""

    folder: Path
    printed: str
    code: int


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Built:
    for name in NEEDED:
        pytest.importorskip(name, reason="the site is made by what the extra 'docs' installs")
    folder = tmp_path_factory.mktemp("site")
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", BUILD, "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    return Built(folder, done.stdout + done.stderr, done.returncode)


@dataclass
class Read(HTMLParser):
    """What a page loads, where its links lead, and the places in it."""

    loads: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    places: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        self.loads += [given[name] for name in ("src", "data", "poster") if name in given]
        self.loads += [part.split()[0] for part in given.get("srcset", "").split(",") if part.strip()]
        if tag == "link" and given.get("rel", "") in LOADING:
            self.loads.append(given.get("href", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        self.loads += re.findall(r"url\(['\"]?([^'\")]+)", given.get("style", ""))


@pytest.fixture(scope="module")
def pages(site: Built) -> dict[Path, Read]:
    found = {}
    for path in sorted(site.folder.rglob("*.html")):
        found[path] = Read()
        found[path].feed(path.read_text("utf-8"))
    return found


def test_the_site_is_built_without_a_warning(site: Built) -> None:
    assert site.code == 0, site.printed
    assert "WARNING" not in site.printed


def test_every_page_of_the_navigation_is_there(site: Built) -> None:
    named = in_navigation()
    assert len(named) > 50
    assert {page for page in named if not (site.folder / page).with_suffix(".html").exists()} == set()


def test_no_page_loads_anything_from_another_host(site: Built, pages: dict[Path, Read]) -> None:
    elsewhere = re.compile(r"(?:[a-z]+:)?//", re.IGNORECASE)
    assert {load for page in pages.values() for load in page.loads if elsewhere.match(load)} == set()
    for path in [*site.folder.rglob("*.css"), *site.folder.rglob("*.html")]:
        text = path.read_text("utf-8")
        assert not re.findall(
            r"@import\s+(?:url\()?['\"]?(?:https?:)?//[^'\")]+|url\(['\"]?(?:https?:)?//[^'\")]+", text
        ), path


def test_no_page_gives_the_theme_a_reason_to_ask_another_host(pages: dict[Path, Read]) -> None:
    """The theme's script asks for the repository's stars, and for Mermaid, where these attributes are."""
    for path in pages:
        text = path.read_text("utf-8")
        assert 'data-md-component="source"' not in text, path
        assert not re.search(r'class="[^"]*\bmermaid\b', text), path
        assert "cdnjs" not in text, path


def test_links_and_anchors_of_built_pages_hold(site: Built, pages: dict[Path, Read]) -> None:
    missing = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links begin at the site's address
            continue
        for link in page.links:
            if re.match(r"[a-z][a-z0-9+.-]*:", link, re.IGNORECASE):
                continue
            target, _, anchor = link.partition("#")
            there = (path.parent / unquote(target)).resolve() if target else path
            there = there / "index.html" if there.is_dir() else there
            known = there.exists() and (not anchor or there not in pages or unquote(anchor) in pages[there].places)
            missing += [] if known else [f"{path.relative_to(site.folder)}: {link}"]
        missing += [f"{path.name}: {load}" for load in page.loads if not _loaded(path, load)]
    assert missing == []


def _loaded(path: Path, load: str) -> bool:
    """Whether a page's script, style or picture is there, or part of the page."""
    return load.startswith("data:") or (path.parent / unquote(load.partition("?")[0])).exists()


def test_links_to_files_that_are_not_on_the_site_lead_to_the_repository(pages: dict[Path, Read]) -> None:
    repository = re.search(r"^repo_url: (\S+)$", CONFIG, re.MULTILINE)[1]
    inside = [link for page in pages.values() for link in page.links if link.startswith(f"{repository}/")]
    assert len(inside) > 100
    for link in set(inside):
        found = re.match(r"/(?:blob|tree)/main/([^#]*)", link.removeprefix(repository))
        assert found is None or (ROOT / found[1]).exists(), link


def test_search_knows_names_and_prose(site: Built) -> None:
    texts = json.loads((site.folder / "search" / "search_index.json").read_text("utf-8"))["docs"]
    assert any(text["title"] == "at.tangent_kernel" for text in texts)
    assert any("alignment" in text["text"] and text["location"].startswith("concepts") for text in texts)


@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
def test_search_answers_in_a_page_opened_from_a_file(site: Built, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path}",
            "--virtual-time-budget=8000", "--dump-dom", f"{(site.folder / 'fit.html').as_uri()}?q=representability",
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert re.search(r'class="md-search-result__item".*?reference/measures\.html', done.stdout, re.DOTALL)


# ----------------------------------------------------------------------------------------------------------- reference


def placed() -> set[str]:
    """The names that the pages of the reference place, without ``at.``."""
    texts = [page.read_text("utf-8") for page in (DOCS / "reference").glob("*.md")]
    return {name for text in texts for name in re.findall(r"^::: (?:record )?at\.([\w.]+)$", text, re.MULTILINE)}


def test_every_public_name_has_a_place_in_the_reference() -> None:
    assert set(at.__all__) - placed() == set()
    last = {name.rpartition(".")[2] for name in placed()}
    assert {f"{wing}.{name}" for wing in WINGS for name in getattr(at, wing).__all__ if name not in last} == set()


def test_no_name_has_two_places() -> None:
    texts = [page.read_text("utf-8") for page in (DOCS / "reference").glob("*.md")]
    names = [name for text in texts for name in re.findall(r"^::: (?:record )?at\.([\w.]+)$", text, re.MULTILINE)]
    assert sorted(names) == sorted(set(names))


def test_every_name_of_the_reference_is_what_the_package_has(monkeypatch: pytest.MonkeyPatch) -> None:
    defined = helper("site_reference", monkeypatch).defined
    for name in placed():
        value = at
        for part in name.split("."):
            value = getattr(value, part)
        module, _, last = defined(name).rpartition(".")
        assert getattr(importlib.import_module(module), last) is value, name


def test_every_entry_of_the_reference_is_built_with_its_arguments(site: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    where = helper("site_reference", monkeypatch).placed()
    assert set(where) == placed()
    texts = {path: path.read_text("utf-8") for path in (site.folder / "reference").glob("*.html")}
    for place in where.values():
        page, _, anchor = place.partition("#")
        assert f'id="{anchor}"' in texts[(site.folder / page).with_suffix(".html")], place
    fits = texts[site.folder / "reference" / "fits.html"]
    assert re.search(r"<code>max_rounds</code>.*?stop after this many steps", fits, re.DOTALL)
    assert "Literal" in fits


def test_the_page_of_the_command_line_has_every_command_and_option(site: Built) -> None:
    cli = importlib.import_module("adaptive_tangents.cli")
    text = (site.folder / "reference" / "command_line.html").read_text("utf-8")
    assert len(cli.app.registered_commands) == 6
    for command in cli.app.registered_commands:
        assert f'id="{command.callback.__name__}"' in text
    for option in ("--held-out", "--memory-limit", "--checkpoints"):
        assert option in text


# ------------------------------------------------------------------------------------------------------------- helpers


def helper(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of docs/site/."""
    monkeypatch.syspath_prepend(DOCS / "site")
    return importlib.import_module(name)


def test_formulas_become_mathml_and_an_unknown_command_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("markdown", reason="the site is made by what the extra 'docs' installs")
    math = helper("site_math", monkeypatch)
    made = math.mathml(r"\frac{v^2}{z_1^2} \le \min_{z \ge 1} \tilde\omega''(v)", display=True)
    assert made.startswith('<math display="block">')
    assert "<mfrac><mrow><msup><mi>v</mi><mn>2</mn></msup></mrow>" in made
    assert "<munder><mo" in made
    assert "″" in made
    with pytest.raises(math.UnknownCommand, match=r"\\unheard is unknown"):
        math.mathml(r"\unheard{x}")
    with pytest.raises(math.UnknownCommand, match="ends too early"):
        math.mathml(r"\frac{1}")


def test_docstrings_are_put_as_the_parser_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("griffe", reason="the site is made by what the extra 'docs' installs")
    rewritten = helper("site_docstrings", monkeypatch).rewritten
    given = "One line.\n\nArgs:\n    x, y: two; as in\n        docs/theory.md.\n    z: third.\n\n"
    given += ">>> 1\n1\n\nMore.\n\n>>> 2\n2"
    two = "two; as in\n        [theory](../theory.md).\n"
    assert rewritten(given) == (
        f"One line.\n\nArgs:\n    x: {two}    y: {two}    z: third.\n\n"
        "Examples:\n    >>> 1\n    1\n\n    More.\n\n    >>> 2\n    2"
    )


def test_the_map_was_drawn_from_the_present_source() -> None:
    (source,) = re.findall(
        r"^```mermaid\n(.*?)^```$", (DOCS / "architecture.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    drawn = (DOCS / "images" / "map.svg").read_text("utf-8")
    assert hashlib.sha256(source.encode()).hexdigest() in drawn, "docs/site/draw_map.py says how to draw it again"


# --------------------------------------------------------------------------------------------------------------- pages


def words(text: str) -> str:
    """Text without its numbers, which differ in their last digits from machine to machine."""
    return re.sub(r"\s+", " ", re.sub(r"[+−-]?\d[\d.,]*(?:e[+-]\d+)?", "#", text)).strip()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_runs_and_shows_what_it_prints(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if name == "get_started.md":
        for package in ("sklearn", "matplotlib", "jinja2"):
            pytest.importorskip(package, reason=f"{package} is in the extra 'report'")
        from study_cases import in_outline

        drawn = in_outline()  # figures of the page that is saved are drawn in full elsewhere
    monkeypatch.chdir(tmp_path)
    parts = re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / name).read_text("utf-8"), re.DOTALL | re.MULTILINE)
    made: dict[str, object] = {"__name__": "docs"}
    shown, printed = "", ""
    with torch.random.fork_rng(devices=[]), drawn:
        for kind, text in parts:
            if kind != "python":
                shown += text if not kind else ""
                continue
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, f"docs/{name}", "exec"), made)
            printed += out.getvalue()
    assert words(printed) == words(shown)
    assert len(shown) > 100
    for before, after in zip(*(re.findall(r"\b0\.\d\d\b(?! s)", text) for text in (shown, printed)), strict=True):
        assert abs(float(before) - float(after)) <= 0.05
    if name == "get_started.md":
        assert (tmp_path / "runs" / "digits" / "report.html").exists()
