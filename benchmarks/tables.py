"""Puts the tables of the last runs of the benchmarks into docs/benchmarks.md, each where the page names its script.

python benchmarks/tables.py [FOLDER]   # the last step of make bench; FOLDER is runs/benchmarks unless given

A table stands between <!-- bench_NAME --> and <!-- /bench_NAME -->; where FOLDER has no bench_NAME.json it stays as it is.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from common import OUT

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
REGION = re.compile(r"<!-- (bench_\w+) -->\n.*?<!-- /\1 -->", re.DOTALL)


def markdown(script: str, kept: dict[str, Any]) -> str:
    """What was measured, on what, by which command, and the table.

    >>> print(markdown("bench_a", {"title": "t", "date": "d", "machine": {"cores": 2}, "table": [["", "s"], ["x", "1"]]}))
    **t** (d; 2 cores; `python benchmarks/bench_a.py`)
    <BLANKLINE>
    | | s |
    |---|---|
    | x | 1 |
    """
    machine = dict(kept["machine"])
    told = [f"{machine.pop(name)} {name}" for name in ("cores", "threads") if name in machine]
    told += [f"{name} {value}" for name, value in machine.items()]
    headings, *rows = kept["table"]
    lines = [f"| {' | '.join(row + [''] * (len(headings) - len(row)))} |" for row in (headings, *rows)]
    lines = [re.sub(r"  +", " ", line) for line in lines]
    command = f"`python benchmarks/{script}.py`"
    title = f"**{kept['title']}** ({kept['date']}; {', '.join(told)}; {command})"
    return "\n".join([title, "", lines[0], "|" + "---|" * len(headings), *lines[1:]])


def filled(page: str, folder: Path) -> str:
    """The page with the tables that the folder has results for."""

    def region(found: re.Match[str]) -> str:
        name = found[1]
        path = folder / f"{name}.json"
        if not path.exists():
            return found[0]
        return f"<!-- {name} -->\n{markdown(name, json.loads(path.read_text('utf-8')))}\n<!-- /{name} -->"

    return REGION.sub(region, page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text("utf-8"), Path(sys.argv[1]) if len(sys.argv) > 1 else OUT), "utf-8")
    print(f"tables: {PAGE}")
