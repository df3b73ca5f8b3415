"""Check shapes at run time, in tests only, and provide the folder with real data if one is named."""

import dataclasses
import functools
import gc
import inspect
import os
import runpy
import sys
import threading
import types
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Here and in processes that tests start, torchvision must be importable (see the file in that folder).
_operators = str(Path(__file__).parent / "torchvision_operators")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_operators, os.environ.get("PYTHONPATH"))))
runpy.run_path(f"{_operators}/sitecustomize.py")
# The package may already be imported without checks: pytest does so for a warning filter in pyproject.toml that names one
# of its classes. Drop that copy, so that the tests import the checked one.
for _module in [name for name in sys.modules if name.partition(".")[0] == "adaptive_tangents"]:
    del sys.modules[_module]
# Checking small functions, which are called a million times, would take longer than running them. So a call is checked
# only if the form of its arguments or result is new: their types and, if annotations name shapes, also dtypes, shapes and
# strings. Which calls are checked does not depend on how tests are spread over processes. The first one compiles the check.
_jaxtyped = jaxtyping.jaxtyped


class _Calls(threading.local):
    """The functions whose checks are running."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []


_calls = _Calls()


class _Check:
    """The compiled check of one function, and the result forms seen for each form of arguments."""

    def __init__(self, made: Any, options: dict[str, Any]) -> None:
        calls = _calls

        def run(*arguments: Any, **keywords: Any) -> Any:
            return calls.waiting.pop()(*arguments, **keywords)

        # String annotations are looked up in the function's own globals.
        run = types.FunctionType(run.__code__, made.__globals__, closure=run.__closure__)
        self._checked = _jaxtyped(functools.update_wrapper(run, made), **options)
        del run.__wrapped__  # does not keep closure variables alive
        self.code = made.__code__
        self.form = _form if any("jaxtyping" in repr(kind) for kind in made.__annotations__.values()) else type
        self.seen: dict[Any, set[Any]] = {}

    def __call__(self, call: Any, arguments: Any, keywords: Any) -> Any:
        """The result of ``call``, with arguments checked before and the result after."""
        depth = len(_calls.waiting)
        _calls.waiting.append(call)
        try:
            return self._checked(*arguments, **keywords)
        finally:
            del _calls.waiting[depth:]


_checks: dict[int, _Check] = {}  # by code object: a nested function is a new object at every call


def _form(value: Any) -> Any:
    kind = type(value)
    if kind in _ARRAYS:
        return kind, value.dtype, value.shape
    if kind in _WORDS:
        return value
    if kind is tuple or kind is list:
        return kind, len(value), *map(_form, value[:3])
    if kind is dict:
        return (kind, *map(_form, next(iter(value.items())))) if value else kind
    return kind


def _checked_where_new(made: Any = jaxtyping.jaxtyped, **options: Any) -> Any:
    """``jaxtyped``, except that a call form is checked only once."""
    if made is _jaxtyped:
        return functools.partial(_checked_where_new, **options)
    if inspect.isclass(made):
        if dataclasses.is_dataclass(made) and not hasattr(made.__init__, "__wrapped__"):
            made.__init__ = _checked_where_new(made.__init__, **options)
        return made
    if not inspect.isfunction(made):
        return _jaxtyped(made, **options)
    check = _checks.get(id(made.__code__))

    @functools.wraps(made)
    def sampled(*arguments: Any, **keywords: Any) -> Any:
        nonlocal check
        if check is None:
            check = _checks[id(made.__code__)] = _Check(made, options)
        form = check.form
        given = tuple(map(form, arguments))
        if keywords:
            given += (*keywords, *map(form, keywords.values()))
        results = check.seen.get(given)
        if results is None:
            result = check(made, arguments, keywords)
            check.seen.setdefault(given, set()).add(form(result))
            return result
        result = made(*arguments, **keywords)
        found = form(result)
        if found not in results:
            check(lambda *_, **__: result, arguments, keywords)
            results.add(found)
        return result

    return sampled


jaxtyping.jaxtyped = _checked_where_new
# An int counts as a float, as for the type checker.
install_import_hook("adaptive_tangents", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import torch  # noqa: E402  (after the hook, lest anything it starts import the package)

if not torch.accelerator.is_available():
    # torch's own formats the stack thrice, for devices that are not there, and keeps the text: milliseconds a call.
    torch.manual_seed = torch.default_generator.manual_seed

_ARRAYS = frozenset({torch.Tensor, torch.nn.Parameter, np.ndarray})
_WORDS = frozenset({str, bool})

# Few and fixed examples in every run; `make explore` draws ten times as many new ones.
settings.register_profile("ci", deadline=None, max_examples=40, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, max_examples=400, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

DATA_VARIABLE = "ADAPTIVE_TANGENTS_DATA"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data-dir", help=f"folder with real data, MNIST/raw/*-ubyte[.gz] in it (or set {DATA_VARIABLE})", default=None
    )


def pytest_configure(config: pytest.Config) -> None:
    # The final colon keeps pytest from reusing the class that it resolved for the same text before this hook.
    config.addinivalue_line("filterwarnings", "error::adaptive_tangents.errors.TangentWarning:")


def pytest_collection_finish() -> None:
    """What is imported and collected stays: no garbage collection need look through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def data_dir(request: pytest.FixtureRequest) -> Path:
    """The folder with real data; tests that need it are skipped if none is named."""
    named = request.config.getoption("--data-dir") or os.environ.get(DATA_VARIABLE)
    if not named:
        pytest.skip(f"no folder with real data: give --data-dir or set {DATA_VARIABLE}")
    folder = Path(named)
    if not folder.is_dir():
        pytest.fail(f"the folder with real data, {named!r}, does not exist")
    return folder
