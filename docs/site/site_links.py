"""Links that work in a clone, made to work on the site: to pages of the site, else to the repository."""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[2]
# Pages that lie outside docs/, by their place on the site.
OUTSIDE = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
CODE = re.compile(r"(^ *```.*?^ *```\s*?$|`+[^`\n]+`+)", re.DOTALL | re.MULTILINE)
TARGET = re.compile(r"""(?P<before>\]\(|\b(?:src|href|srcset)=")(?P<path>[^)\s"#]*)(?P<anchor>#[^)\s"]*)?""")
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)


def in_repository(page: str) -> str:
    """The path in the repository of a page of the site."""
    if page in OUTSIDE:
        return OUTSIDE[page]
    return page if page.startswith("examples/") else f"docs/{page}"


def on_site(path: str) -> str:
    """The place on the site that a path of the repository would have."""
    back = {source: page for page, source in OUTSIDE.items()}
    return back.get(path) or path.removeprefix("docs/")


def in_prose(change: Callable[[str], str], text: str) -> str:
    """The text of a page with all but its code changed."""
    parts = CODE.split(text)
    return "".join(part if k % 2 else change(part) for k, part in enumerate(parts))


def rewritten(text: str, page: str, files: Files, repository: str, *, html: bool = False) -> str:
    """The text of a page with its relative links as the site needs them; html says that they lead to built pages."""

    def leads(found: re.Match[str]) -> str:
        path, anchor = found["path"], found["anchor"] or ""
        if not path or ELSEWHERE.match(path):
            return found[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository(page)), path))
        file = files.get_file_from_path(on_site(place))
        if file is not None and file.inclusion.is_included() and place == in_repository(file.src_uri):
            start = posixpath.dirname(page) or "."
            there = file.url if html else file.src_uri
            return f"{found['before']}{posixpath.relpath(there, start)}{anchor}"
        if (ROOT / place).exists():
            kind = "tree" if (ROOT / place).is_dir() else "blob"
            return f"{found['before']}{repository}/{kind}/main/{place}{anchor}"
        return found[0]

    def change(prose: str) -> str:
        return TARGET.sub(leads, prose)

    return change(text) if html else in_prose(change, text)
