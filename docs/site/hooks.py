"""What mkdocs does for this site beyond its settings: pages from outside docs/, links, formulas, the reference, the map."""

import hashlib
import logging
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from site_links import OUTSIDE, ROOT, rewritten
from site_math import Formulas
from site_reference import expanded, with_names_linked, without_constructors

MERMAID = re.compile(r"^```mermaid\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MAP = "images/map.svg"
SCRIPT = re.compile(r"<script\b.*?</script>", re.DOTALL)
log = logging.getLogger("mkdocs.hooks.site")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Formulas are part of every page's Markdown."""
    config.markdown_extensions.append(Formulas())  # type: ignore[arg-type]
    return config


@event_priority(100)  # before mkdocs-jupyter, which looks for notebooks among the files
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages that lie outside docs/: the front page, how to contribute, the changes, and the notebooks."""
    for page, source in OUTSIDE.items():
        if (ROOT / source).exists():
            files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    for notebook in sorted((ROOT / "examples").glob("*.ipynb")):
        place = f"examples/{notebook.name}"
        files.append(File(place, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page's text with its links, its entries of the reference, and its drawing as the site needs them."""
    if page.parent is None:
        page.meta["hide"] = ["navigation"]  # a page alone under its tab
    repository = str(config.repo_url).rstrip("/")
    return expanded(rewritten(MERMAID.sub(_drawn, markdown), page.file.src_uri, files, repository))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page with the names of the reference as links; a notebook also without scripts, which ask other hosts for MathJax."""
    place = page.file.src_uri

    def address(there: str) -> str:
        target, _, anchor = there.partition("#")
        file = files.get_file_from_path(target)
        return f"{file.url_relative_to(page.file) if file else target}#{anchor}"

    if place.endswith(".ipynb"):
        repository = str(config.repo_url).rstrip("/")
        html = rewritten(SCRIPT.sub("", html), place, files, repository, html=True)
    elif place.startswith("reference/"):
        html = without_constructors(html, place)
    return with_names_linked(html, place, address)


def _drawn(found: re.Match[str]) -> str:
    """The drawing that was made from this source, or the source if there is none."""
    if (made := drawing_of(found[1])) is None:
        log.warning("docs/%s was not drawn from this source; docs/site/draw_map.py says how to draw it again", MAP)
        return found[0].replace("```mermaid", "```text")
    return f"[![The wings, and which imports from which]({made})]({made})"


def drawing_of(source: str) -> str | None:
    """The image in docs/ that was drawn from a Mermaid source, if it is there."""
    path = ROOT / "docs" / MAP
    mark = hashlib.sha256(source.encode()).hexdigest()
    return MAP if path.exists() and mark in path.read_text("utf-8") else None
