"""`compare`: two inspections side by side."""

from pathlib import Path

from adaptive_tangents.commands.checks import check_folder, tell_earlier
from adaptive_tangents.commands.console import typed
from adaptive_tangents.commands.report import PAGES, finish
from adaptive_tangents.errors import TangentError
from adaptive_tangents.inspection.compared import NAME
from adaptive_tangents.inspection.comparison import compare as compared
from adaptive_tangents.runs.results import write_results


def compare(first: Path, second: Path, out: Path, *, names: str | None) -> None:
    """Compare, write the results and print the findings."""
    check_folder(NAME, out, PAGES[NAME]().figures)
    if {folder.resolve() for folder in (first, second)} & {out.resolve()}:
        raise TangentError(f"{NAME}: --out {out} is one of the inspections; give another folder")
    tell_earlier(out)
    found = compared(first, second, names=_names(first, second, names))
    write_results({**found.results, "command": typed()}, found.arrays, out)
    finish(out)


def _names(first: Path, second: Path, given: str | None) -> list[str]:
    """Names as given, or the folders' own where they differ."""
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        if len(names) != 2:
            raise TangentError(f"{NAME}: --names is two words with a comma between, e.g. full,LoRA, got {given!r}")
        return names
    names = [folder.resolve().name for folder in (first, second)]
    return names if len(set(names)) == 2 and all(names) else ["A", "B"]
