"""Every example in a docstring of the package runs.

The docstrings are read off the source rather than off the imported objects: under the tests, functions are wrapped for
the shape checks, and doctest's own finder passes over a function that seems to come from another module.
"""

import ast
import doctest
import importlib
import importlib.util
import pkgutil
from pathlib import Path

import pytest
import torch

import adaptive_tangents

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(node: ast.AST, name: str) -> list[tuple[str, str, int]]:
    """Name, docstring and line number of a node and all that it contains."""
    found = []
    if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node, clean=False)):
        found.append((name, text, node.body[0].lineno - 1))
    for child in ast.iter_child_nodes(node):
        inner = f"{name}.{child.name}" if isinstance(child, DOCUMENTED) and hasattr(child, "name") else name
        found += docstrings(child, inner)
    return found


def examples() -> list[doctest.DocTest]:
    """The examples of the package, module by module, without globals as yet."""
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)
    assert runner.tries == len(test.examples), "an example under +SKIP proves nothing: make it run, or show it in prose"


def test_examples_are_found_in_functions_that_the_shape_checks_wrap() -> None:
    assert {"adaptive_tangents.data.load_digits", "adaptive_tangents.data.normalize_digits"} <= {
        test.name for test in examples()
    }
