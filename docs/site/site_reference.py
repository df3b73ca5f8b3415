"""The reference: where each public name is defined, and the page of the command line."""

import ast
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "adaptive_tangents"
SOURCE = ROOT / "src" / PACKAGE
ENTRY = re.compile(r"^::: (?P<record>record )?at\.(?P<name>[\w.]+)$", re.MULTILINE)
SIGNATURE = r'(<h2 id="{}".*?</h2>\s*)<div class="[^"]*doc-signature.*?</div>'
NAMED = re.compile(
    r"<(a|h\d|pre|script|style|summary)\b.*?</\1>|<code>(?P<name>[\w.]+)(?P<call>\([^<]*\))?</code>", re.DOTALL
)
COMMANDS = re.compile(r"^::: command line$", re.MULTILINE)


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax of a file."""
    return ast.parse(path.read_text("utf-8"))


@cache
def imported(path: Path) -> dict[str, str]:
    """The module that each name of an ``__init__`` or its stub is imported from, as a dotted name."""
    found = {}
    for node in parsed(path).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            module = f"{PACKAGE}.{node.module}" if node.level else node.module
            found |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
    return found


def defined(name: str) -> str:
    """The dotted name under which ``at.NAME`` is defined: it follows imports from the front door through the wings."""
    *wing, last = name.split(".")
    dotted = ".".join([PACKAGE, *wing, last])
    for _ in range(4):
        module, _, last = dotted.rpartition(".")
        folder = SOURCE.joinpath(*module.split(".")[1:])
        inits = [folder / "__init__.pyi", folder / "__init__.py"]
        target = next((imported(path)[last] for path in inits if path.exists() and last in imported(path)), None)
        if target is None:
            return dotted
        dotted = target
    return dotted


@cache
def placed() -> dict[str, str]:
    """The page of the site, and the place on it, of every name of the reference."""
    found = {}
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        for entry in ENTRY.finditer(page.read_text("utf-8")):
            found[entry["name"]] = f"reference/{page.name}#{defined(entry['name'])}"
    return found


def inherits(dotted: str) -> bool:
    """Whether a class has a base that is in the reference itself, so that what it inherits is described there."""
    module, _, last = dotted.rpartition(".")
    file = SOURCE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    classes = {node.name: node for node in parsed(file).body if isinstance(node, ast.ClassDef)}
    bases = {ast.unparse(base).rpartition(".")[2] for base in classes[last].bases} if last in classes else set()
    above = any(inherits(f"{module}.{base}") for base in bases & classes.keys())
    return above or bool(bases & {name.rpartition(".")[2] for name in placed()})


def expanded(text: str) -> str:
    """The text of a page with each ``::: at.NAME`` as mkdocstrings takes it."""

    def entry(found: re.Match[str]) -> str:
        name = f"at.{found['name']}"
        dotted = defined(found["name"])
        options = {"heading": name, "toc_label": name, "inherited_members": str(not inherits(dotted)).lower()}
        return f"::: {dotted}\n    options:\n" + "\n".join(f"      {key}: {value}" for key, value in options.items())

    text = ENTRY.sub(entry, text)
    return COMMANDS.sub(lambda _: commands(), text) if COMMANDS.search(text) else text


def without_constructors(html: str, page: str) -> str:
    """A page of the reference without the signatures of its records: calls return them, and nobody makes one."""
    for entry in ENTRY.finditer((ROOT / "docs" / page).read_text("utf-8")):
        if entry["record"]:
            html = re.sub(SIGNATURE.format(re.escape(defined(entry["name"]))), r"\1", html, count=1, flags=re.DOTALL)
    return html


def with_names_linked(html: str, page: str, address: Callable[[str], str]) -> str:
    """A page on which each name of the reference in running text leads to its entry; ``at.`` may be left out there."""
    short = {name.rpartition(".")[2]: name for name in placed()} if page.startswith("reference/") else {}

    def leads(found: re.Match[str]) -> str:
        name = found["name"] or ""
        known = name.removeprefix("at.") if name.startswith("at.") else short.get(name)
        if known not in placed():
            return found[0]
        return f'<a href="{address(placed()[known])}">{found[0]}</a>'

    return NAMED.sub(leads, html)


def commands() -> str:
    """Every command with its arguments and options, as its own help tells them."""
    from typer import Context
    from typer.main import get_command

    from adaptive_tangents.cli import app

    group = get_command(app)
    parts = []
    for name in group.list_commands(Context(group)):  # type: ignore[attr-defined]
        command = group.get_command(Context(group), name)  # type: ignore[attr-defined]
        told = Context(command, info_name=f"adaptive-tangents {name}")
        words = " ".join(command.collect_usage_pieces(told))
        parts.append(f"## {name}\n\n{command.help}\n\n```console\n$ adaptive-tangents {name} {words}\n```\n")
        records = [parameter.get_help_record(told) for parameter in command.get_params(told)]
        rows = [f"| `{record[0]}` | {_cell(record[1])} |" for record in records if record is not None]
        parts.append("\n".join(["| argument or option | what it is |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    """Help as the cell of a table."""
    return text.replace("|", "\\|").replace("[", "\\[").replace("*", "\\*").replace("<", "&lt;")
