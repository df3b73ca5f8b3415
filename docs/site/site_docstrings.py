"""How the package writes docstrings, for griffe's Google parser.

Three habits of the package are put as that parser reads them: several names on one line of Args or Attributes get a line
each; examples that end a docstring get the section Examples; and a page of the docs that is named becomes a link. Names of
types that stand for a few choices are replaced by the choices.
"""

import re
from typing import Any

from griffe import Attribute, Class, ExprName, ExprSubscript, Extension, Function, GriffeError, Module, Object

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


def told(expression: Any) -> Any:
    """What a type or a default value says: the choices of a Literal, and the value of a constant, instead of their names."""
    if not isinstance(expression, ExprName):
        return expression
    try:
        found = expression.parent[expression.name] if isinstance(expression.parent, Object) else None
        found = found.final_target if found is not None and found.is_alias else found  # type: ignore[union-attr]
    except (GriffeError, KeyError):
        return expression
    value = found.value if isinstance(found, Attribute) else None
    choices = isinstance(value, ExprSubscript) and str(value.left) == "Literal"
    constant = expression.name.isupper() and value is not None and len(str(value)) <= 24
    return value if choices or constant else expression


def tell(inside: Module | Class) -> None:
    """Tell the types and defaults of all functions of a module or class."""
    for member in inside.members.values():
        if isinstance(member, Function):
            for parameter in member.parameters:
                parameter.annotation, parameter.default = told(parameter.annotation), told(parameter.default)
        elif isinstance(member, Module | Class):
            tell(member)


class Docstrings(Extension):
    """Rewrites every docstring of the package before it is parsed, and the types of arguments where a name hides them."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:  # type: ignore[override]
        tell(pkg)

    def on_object(self, *, obj: Object, **_: Any) -> None:  # type: ignore[override]
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)
