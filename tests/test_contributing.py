"""What CONTRIBUTING.md says of files, lists and wings is so."""

import re
from pathlib import Path

import pytest

from test_architecture import WINGS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
NAMED = sorted(
    name for name in set(re.findall(r"`((?:src|tests|docs|benchmarks)/[\w/.]*\w)`", PAGE)) if "NAME" not in name
)
LISTS = sorted(set(re.findall(r"`(\w+)` of\s+`([\w/]+\.py)`", PAGE)))
STEPS = PAGE.partition("## How to add")[2].partition("## How tests are written")[0]


@pytest.mark.parametrize("name", NAMED)
def test_files_that_are_to_be_opened_are_there(name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize(("name", "path"), LISTS)
def test_lists_to_enrol_in_are_there(name: str, path: str) -> None:
    assert re.search(rf"^(?:{name}\b|(?:def|class) {name}\b)", (ROOT / path).read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)", PAGE))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_the_map_names_all_wings_in_their_order() -> None:
    told = PAGE.partition("## The house")[2].partition("## How to add")[0]
    lines = re.findall(r"^\d+\. ((?:`\w+`(?:, )?)+):", told, re.MULTILINE)
    assert tuple(name for line in lines for name in re.findall(r"`(\w+)`", line)) == WINGS
    assert len(lines) == 10


def test_every_addition_has_its_steps_with_a_file_to_open_and_a_test_that_holds_it() -> None:
    sections = {part.split("\n")[0]: part for part in STEPS.split("\n### ")[1:]}
    wanted = ("layer rule", "structure", "penalty", "study", "measure", "guarantee", "benchmark")
    assert list(sections) == [f"A {name}" for name in wanted]
    for name, text in sections.items():
        assert re.search(r"`(?:src|tests|docs|benchmarks)/|\]\(docs/", text), name
        assert "tests/test_" in text or re.search(r"tests/\w+/test_", text) or name == "A benchmark", name


@pytest.mark.parametrize("command", re.findall(r"^\$ make (\w+)|`make (\w+)", PAGE, re.MULTILINE))
def test_make_has_the_targets_that_are_named(command: tuple[str, str]) -> None:
    assert re.search(rf"^{''.join(command)}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
