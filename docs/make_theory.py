"""Write docs/theory.md from docs/theory.in.md, with its references turned into links to source lines and tests.

    python docs/make_theory.py            # or: make theory
    python docs/make_theory.py --check    # check that the page is up to date; write nothing

It finds names by reading the source and imports nothing of the package, so any Python will do.
"""

import ast
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "docs" / "theory.in.md"
PAGE = ROOT / "docs" / "theory.md"
PACKAGE = "adaptive_tangents"
REFERENCE = re.compile(r"^\[\[(.*?)\]\]$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!--.*?-->\s*", re.DOTALL)
NOTICE = "<!-- Made by docs/make_theory.py from docs/theory.in.md: change that one, then run make theory. -->\n\n"


class UnknownName(Exception):
    """A reference names code or a test that is not there."""


@dataclass(frozen=True)
class Reference:
    """The line after a statement: dotted names of the code that computes it, and tests that check it."""

    code: tuple[str, ...]
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Statement:
    """The text between a reference and the reference or heading before it, and its section."""

    section: str
    text: str
    reference: Reference


def read(body: str) -> Reference:
    """The reference between double brackets: words with :: are tests, all others code."""
    words = body.split()
    return Reference(tuple(word for word in words if "::" not in word), tuple(word for word in words if "::" in word))


def statements(source: str) -> list[Statement]:
    """Every statement of the source with its reference."""
    found, section, start = [], "", 0
    marks = re.compile(r"^#+ [^\n]*$|^\[\[.*?\]\]$", re.DOTALL | re.MULTILINE)
    source = COMMENT.sub("", source)
    for mark in marks.finditer(source):
        if mark[0].startswith("#"):
            section = mark[0].lstrip("# ")
        else:
            found.append(Statement(section, source[start : mark.start()].strip(), read(mark[0][2:-2])))
        start = mark.end()
    return found


@cache
def tree(path: Path) -> ast.Module:
    """A parsed file."""
    return ast.parse(path.read_text("utf-8"), str(path))


def member(body: list[ast.stmt], name: str) -> ast.stmt | None:
    """The class, function or annotated field of that name; of overloads the last, which is the implementation."""
    found = None
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            found = node
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            found = node
    return found


def place_of_code(name: str) -> tuple[Path, int]:
    """File and line of a dotted name within the package: module, then class or function, then method or field."""
    parts = name.split(".")
    folder = ROOT / "src" / PACKAGE
    while parts and (folder / parts[0]).is_dir():
        folder = folder / parts.pop(0)
    path = folder / f"{parts[0]}.py" if parts else folder
    if not path.is_file():
        raise UnknownName(f"{name}: there is no module {path.relative_to(ROOT)}")
    body, line = tree(path).body, 1
    for part in parts[1:]:
        node = member(body, part)
        if node is None:
            raise UnknownName(f"{name}: {path.relative_to(ROOT)} has no {part}")
        body, line = getattr(node, "body", []), node.lineno
    return path, line


def place_of_test(name: str) -> tuple[Path, int]:
    """File and line of a test named as test_file::test_name, in whatever folder of the tests the file lies."""
    file, _, function = name.partition("::")
    path = next((ROOT / "tests").rglob(f"{file}.py"), None)
    if path is None:
        raise UnknownName(f"{name}: there is no {file}.py in tests/")
    node = member(tree(path).body, function)
    if not isinstance(node, ast.FunctionDef) or not function.startswith("test_"):
        raise UnknownName(f"{name}: {path.relative_to(ROOT)} has no test {function}")
    return path, node.lineno


def link(text: str, place: tuple[Path, int]) -> str:
    """A link from the page to a line of a file."""
    path, line = place
    return f"[{text}](../{path.relative_to(ROOT).as_posix()}#L{line})"


def written(reference: Reference) -> str:
    """A reference as it stands on the page."""
    code = ", ".join(link(f"`{name}`", place_of_code(name)) for name in reference.code)
    tests = [
        link(name.partition("::")[2].removeprefix("test_").replace("_", " "), place_of_test(name))
        for name in reference.tests
    ]
    return "\n".join([f"> Code: {code}  ", f"> Checked: {'; '.join(tests)}"])


def page(source: str) -> str:
    """The page made from a source."""
    return NOTICE + REFERENCE.sub(lambda found: written(read(found[1])), COMMENT.sub("", source)).strip() + "\n"


def main(arguments: list[str]) -> int:
    """Write the page, or compare it with --check; returns the exit status."""
    try:
        made = page(SOURCE.read_text("utf-8"))
    except UnknownName as error:
        print(f"{SOURCE.relative_to(ROOT)}: {error}", file=sys.stderr)
        return 1
    if arguments == ["--check"]:
        current = PAGE.is_file() and PAGE.read_text("utf-8") == made
        print("up to date" if current else "out of date: run make theory")
        return 0 if current else 1
    if arguments:
        print("usage: make_theory.py [--check]", file=sys.stderr)
        return 2
    PAGE.write_text(made, "utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}: {len(statements(SOURCE.read_text('utf-8')))} statements")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
