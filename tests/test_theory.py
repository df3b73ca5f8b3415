"""The theory page is generated from its source, which names only existing code and tests."""

import dataclasses
import importlib
import inspect
import re
from html import escape
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from matplotlib.mathtext import MathTextParser

import adaptive_tangents as at
from docs_scripts import ROOT, script

make_theory = script("make_theory")
SOURCE = make_theory.SOURCE.read_text("utf-8")
TEXT = make_theory.COMMENT.sub("", SOURCE)
STATEMENTS = make_theory.statements(SOURCE)
CODE = sorted({name for statement in STATEMENTS for name in statement.reference.code})
TESTS = sorted({name for statement in STATEMENTS for name in statement.reference.tests})
DISPLAYED = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
DISPLAYED_FORMULAS = [formula.strip() for formula in DISPLAYED.findall(TEXT)]
INLINE = [formula for line in DISPLAYED.sub("", TEXT).splitlines() for formula in re.findall(r"\$([^$]+)\$", line)]

# Public names that compute no formula.
WITHOUT_FORMULA = {
    "BlockSolution": "a record of what a structure's methods give",
    "Round": "a record of one point of the search",
    "Solution": "a record of what a structure's methods give",
    "TangentError": "an error",
    "TangentWarning": "a warning",
    "adaptation": "a module, its functions are named",
    "load_fit": "reads what a fit has written",
    "transforms": "a module, its classes are named",
}


def resolved(name: str) -> list[object]:
    """The objects along a dotted name, starting with the module's member; a dataclass field gives its annotation."""
    parts, module = name.split("."), "adaptive_tangents"
    while parts and importlib.util.find_spec(f"{module}.{parts[0]}") is not None:
        module = f"{module}.{parts.pop(0)}"
        if not hasattr(importlib.import_module(module), "__path__"):
            break
    found: list[object] = [importlib.import_module(module)]
    for part in parts:
        owner = found[-1]
        fields = {f.name: f.type for f in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else {}
        found.append(fields[part] if part in fields else getattr(owner, part))
    return found[1:]


def test_the_page_is_what_its_source_makes() -> None:
    made, committed = make_theory.page(SOURCE), make_theory.PAGE.read_text("utf-8")
    assert made == committed, "docs/theory.md is out of date (source lines moved, or its text): run `make theory`"


def test_code_that_the_page_names_can_be_imported() -> None:
    for name in CODE:
        assert resolved(name), name
        path, line = make_theory.place_of_code(name)
        assert name.rpartition(".")[2] in path.read_text("utf-8").splitlines()[line - 1], name


def test_tests_that_the_page_names_are_collected() -> None:
    for name in TESTS:
        path, line = make_theory.place_of_test(name)
        assert path.read_text("utf-8").splitlines()[line - 1].startswith(f"def {name.partition('::')[2]}(")


def test_every_statement_has_a_formula_code_and_a_test() -> None:
    for statement in STATEMENTS:
        assert "$" in statement.text, statement.text
        assert statement.reference.code, statement.text
        assert statement.reference.tests, statement.text


def test_every_public_name_that_computes_something_is_on_the_page() -> None:
    found = [value for code in CODE for value in resolved(code)]
    for name in at.__all__:
        value = getattr(at, name)
        named = any(value is each for each in found)
        if name in WITHOUT_FORMULA:
            assert not named, f"{name} is on the page: take it off the list of exceptions"
            continue
        assert inspect.isclass(value) or callable(value), name
        assert named, (
            f"at.{name} is not on the theory page: add its statement to docs/theory.in.md (its first lines say how) and "
            "run `make theory`, or list it in WITHOUT_FORMULA with the reason"
        )


def test_mathematics_is_closed_on_its_own_line() -> None:
    for paragraph in re.split(r"\n\s*\n", DISPLAYED.sub("", TEXT)):
        for line in paragraph.splitlines():
            assert line.count("$") % 2 == 0, f"a formula is not closed on its line, which Markdown needs: {line}"


def test_mathematics_survives_markdown() -> None:
    """A Markdown parser without mathematics leaves every formula unchanged: no emphasis, escapes or tables."""
    html = MarkdownIt("commonmark").enable("table").render(make_theory.page(SOURCE))
    for formula in (*DISPLAYED_FORMULAS, *INLINE):
        assert escape(formula, quote=False) in html, (
            f"Markdown changes {formula}: write \\lVert for \\|, \\ast for a star, and no _ after a bracket"
        )
    for formula in INLINE:
        assert formula == formula.strip(), f"a dollar sign before a blank opens no formula: {formula}"


def test_mathematics_is_well_formed() -> None:
    parser, other_names = MathTextParser("path"), {"lVert": "Vert", "rVert": "Vert", "le": "leq", "ge": "geq"}
    for formula in sorted({*DISPLAYED_FORMULAS, *INLINE}):
        known = re.sub(r"\\([A-Za-z]+)", lambda name: "\\" + other_names.get(name[1], name[1]), formula)
        parser.parse(f"${' '.join(known.replace(chr(92) + 'top', 'T').split())}$")


def test_sections_that_docstrings_cite_are_on_the_page() -> None:
    numbered = {int(number) for number in re.findall(r"^## (\d+)\.", TEXT, re.MULTILINE)}
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    cited = [
        (path.name, int(number))
        for path in files
        for words in re.findall(r"\btheory\b[^.()]{0,14}?((?:§\d,? ?)+)", path.read_text("utf-8"))
        for number in re.findall(r"\d", words)
    ]
    assert len(cited) > 10
    assert [where for where in cited if where[1] not in numbered] == []


def test_the_page_is_reached_from_the_readme_and_the_architecture() -> None:
    assert "(docs/theory.md)" in (ROOT / "README.md").read_text("utf-8")
    assert "(theory.md)" in (ROOT / "docs" / "architecture.md").read_text("utf-8")


# ------------------------------------------------------------------------------------------------ the script


def test_a_statement_and_a_line_that_names_code_and_test_are_all_it_takes() -> None:
    named = "penalties.closed_forms.Quadratic.dual\n  test_theory::test_the_page_is_what_its_source_makes"
    source = f"<!-- how\n\nto -->\n# T\n\nSo $a = b$.\n\n[[{named}]]\n"
    (statement,) = make_theory.statements(source)
    assert (statement.section, statement.text) == ("T", "So $a = b$.")
    page = make_theory.page(source)
    assert "how" not in page.replace(make_theory.NOTICE, "")
    assert re.search(
        r"> Code: \[`penalties\.closed_forms\.Quadratic\.dual`\]"
        r"\(\.\./src/adaptive_tangents/penalties/closed_forms\.py#L\d+\)  \n"
        r"> Checked: \[the page is what its source makes\]\(\.\./tests/test_theory\.py#L\d+\)\n$",
        page,
    )


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("nowhere.fit", r"nowhere\.fit: there is no module src/adaptive_tangents/nowhere\.py"),
        ("solvers.fit.fitt", r"solvers\.fit\.fitt: src/adaptive_tangents/solvers/fit\.py has no fitt"),
        ("solvers.results.Fit.nothing", r"has no nothing"),
        ("test_nowhere::test_a", r"there is no test_nowhere\.py in tests/"),
        ("test_theory::test_a", r"test_theory::test_a: tests/test_theory\.py has no test test_a"),
        ("test_theory::resolved", r"has no test resolved"),
    ],
)
def test_a_name_that_is_not_there_is_refused(reference: str, words: str, tmp_path, monkeypatch, capsys) -> None:
    with pytest.raises(make_theory.UnknownName, match=words):
        make_theory.page(f"[[{reference}]]\n")
    source = ROOT / "docs" / "made_up.md"
    monkeypatch.setattr(make_theory, "SOURCE", _Given(source, f"[[{reference}]]\n"))
    monkeypatch.setattr(make_theory, "PAGE", tmp_path / "theory.md")
    assert make_theory.main([]) == 1
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "theory.md").exists()


class _Given:
    """A file that is not there."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text

    def read_text(self, encoding: str) -> str:
        return self.text

    def relative_to(self, root: Path) -> Path:
        return self.path.relative_to(root)


def test_the_script_checks_and_writes(tmp_path, monkeypatch, capsys) -> None:
    assert make_theory.main(["--check"]) == 0
    copy = tmp_path / "theory.md"
    monkeypatch.setattr(make_theory, "PAGE", copy)
    monkeypatch.setattr(make_theory, "ROOT", ROOT)
    assert make_theory.main(["--check"]) == 1
    assert "run make theory" in capsys.readouterr().out
    assert make_theory.main(["--verbose"]) == 2
