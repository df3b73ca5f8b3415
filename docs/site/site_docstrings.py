"""How the package writes docstrings, for griffe's Google parser.

Three habits of the package are put as that parser reads them: several names on one line of Args or Attributes get a line each;
examples that end a docstring get the section Examples; and a page of the docs that is named becomes a link.
"""

import re
from typing import Any

from griffe import Extension, Object

SECTION = re.compile(r"^(Args|Attributes):$")
SEVERAL = re.compile(r"^    (\w+(?:, \w+)+): (.*)$")
PAGE = re.compile(r"\bdocs/(\w+)\.md\b")
THEORY = re.compile(r"\btheory in the docs\b")


def rewritten(text: str) -> str:
    """A docstring as griffe's Google parser wants it."""
    made: list[str] = []
    within = examples = False
    lines = text.splitlines()
    k = 0
    while k < len(lines):
        line = lines[k]
        if SECTION.match(line):
            within = True
        elif line and not line.startswith(" "):
            within = False
        if line.startswith(">>> ") and not examples:
            examples = True
            made += ["Examples:"]
        several = SEVERAL.match(line) if within else None
        if several:
            more = []
            while k + 1 < len(lines) and lines[k + 1].startswith("        "):
                k += 1
                more.append(lines[k])
            for name in several[1].split(", "):
                made += [f"    {name}: {several[2]}", *more]
        else:
            made.append(f"    {line}" if examples and line else line)
        k += 1
    text = PAGE.sub(r"[\1](../\1.md)", "\n".join(made))
    return THEORY.sub("[theory](../theory.md)", text)


class Docstrings(Extension):
    """Rewrites every docstring of the package before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:  # type: ignore[override]
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)
