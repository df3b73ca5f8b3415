"""Every example in a docstring of the package runs.

Docstrings are read from the source, not from imported objects: in the tests, functions are wrapped for the shape checks,
and doctest's own finder skips functions that seem to come from another module.
"""

import ast
import contextlib
import dataclasses
import doctest
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptive_tangents
from study_cases import made_up_data

pytestmark = pytest.mark.xdist_group("docstrings")

# The wings whose names users call.
DESCRIBED = (
    "features",
    "capture",
    "penalties",
    "structures",
    "sketching",
    "kernels",
    "storage",
    "measures",
    "solvers",
    "nn",
    "tracking",
)
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(node: ast.AST, name: str) -> list[tuple[str, str, int]]:
    """Name, docstring and line number of a node and all that it contains."""
    found = []
    if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node, clean=False)):
        found.append((name, text, node.body[0].lineno - 1))
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            continue
        inner = f"{name}.{child.name}" if isinstance(child, DOCUMENTED) and hasattr(child, "name") else name
        found += docstrings(child, inner)
    return found


@functools.cache
def examples() -> list[doctest.DocTest]:
    """The examples of the package by module, still without globals."""
    modules = ["adaptive_tangents"]
    modules += [m.name for m in pkgutil.walk_packages(adaptive_tangents.__path__, "adaptive_tangents.")]
    tests = []
    for module in modules:
        path = Path(str(importlib.util.find_spec(module).origin))
        for name, text, line in docstrings(ast.parse(path.read_text("utf-8"), str(path)), module):
            test = doctest.DocTestParser().get_doctest(text, {"__module__": module}, name, str(path), line)
            tests += [test] if test.examples else []
    return tests


@pytest.mark.parametrize("test", examples(), ids=lambda test: test.name.removeprefix("adaptive_tangents."))
def test_the_example_runs(test: doctest.DocTest) -> None:
    test.globs = dict(vars(importlib.import_module(test.globs["__module__"])))
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    # What examples show depends neither on the images of an experiment nor on how many rounds its explanations take.
    smaller = made_up_data() if ".experiments." in test.name else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), smaller:
        torch.manual_seed(0)
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)
    assert runner.tries == len(test.examples), "an example under +SKIP proves nothing: make it run, or show it in prose"


def test_examples_are_found_in_functions_that_the_shape_checks_wrap() -> None:
    assert {"adaptive_tangents.datasets.images.load_digits", "adaptive_tangents.datasets.images.normalize_digits"} <= {
        test.name for test in examples()
    }


# ----------------------------------------------------------------------------------------------------------- arguments


def described(text: str) -> list[str]:
    """The names that the section Args (or Attributes, of a record) of a docstring describes, in its order."""
    lines = inspect.cleandoc(text).splitlines()
    start = next((k for k, line in enumerate(lines) if line in ("Args:", "Attributes:")), len(lines))
    names: list[str] = []
    for line in lines[start + 1 :]:
        if line and not line.startswith("    "):
            break
        if head := re.match(r"    (\w+(?:, \w+)*): \S", line):
            names += head[1].split(", ")
    return names


def wanted(value: Any) -> list[str]:
    """The arguments of a function or constructor, or the fields of a dataclass (keyword-only ones last)."""
    if dataclasses.is_dataclass(value):
        fields = sorted(dataclasses.fields(value), key=lambda field: bool(field.kw_only))
        return [field.name for field in fields if not field.name.startswith("_")]
    if inspect.isclass(value) and "__init__" not in vars(value):
        return []
    names = list(inspect.signature(value.__init__ if inspect.isclass(value) else value).parameters)
    return [name for name in names if name not in ("self", "cls")]


@functools.cache
def documented() -> dict[str, Any]:
    """Every public function and class by its dotted name, and the public methods of the classes."""
    found: dict[str, Any] = {}
    for wing in (adaptive_tangents, *(getattr(adaptive_tangents, name) for name in DESCRIBED)):
        for name in wing.__all__:
            value = getattr(wing, name)
            if not (inspect.isfunction(value) or inspect.isclass(value)):
                continue
            home = f"{value.__module__}.{value.__qualname__}".removeprefix("adaptive_tangents.")
            found[home] = value
            for method, held in vars(value).items() if inspect.isclass(value) else ():
                plain = held.__func__ if isinstance(held, classmethod | staticmethod) else held
                if inspect.isfunction(plain) and not method.startswith("_") and plain.__doc__:
                    found[f"{home}.{method}"] = plain
    return found


def test_a_public_docstring_describes_every_argument_and_nothing_else() -> None:
    for name, value in documented().items():
        assert described(value.__doc__ or "") == wanted(value), name


def test_a_docstring_that_leaves_an_argument_out_or_adds_one_is_found() -> None:
    assert described("""One line.

    Args:
        x, y: two of them; and what
            goes on: further.
        z: another.

    Raises:
        ValueError: never.
    """) == ["x", "y", "z"]
