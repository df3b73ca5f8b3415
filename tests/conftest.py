"""Shapes are checked at run time under the tests only, and real data comes from a folder that is named or absent."""

import collections
import functools
import inspect
import itertools
import os
import sys
import types
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Whoever imported the package before this line (pytest does, to resolve a warning filter of pyproject.toml that names
# its class) has an unchecked copy: drop it, so that the tests import the checked one.
for _module in [name for name in sys.modules if name.partition(".")[0] == "adaptive_tangents"]:
    del sys.modules[_module]
# Checking takes longer than what many of the smallest functions do, which are called a million times: of each function the
# first calls are checked in every process, and one in many after that. So it is of a dataclass made.
# A function within another is made anew, and its check compiled anew, at every call of that one: fewer of those are checked.
_ALWAYS, _THEN_ONE_IN = 100, 50
_ALWAYS_WITHIN, _THEN_ONE_IN_WITHIN = 10, 200
_jaxtyped = jaxtyping.jaxtyped
_made: collections.Counter[types.CodeType] = collections.Counter()


def _often_enough(made: Any = jaxtyping.jaxtyped, **options: Any) -> Any:
    """``jaxtyped``, but for functions called very often only now and then."""
    if made is _jaxtyped:
        return functools.partial(_often_enough, **options)
    if inspect.isclass(made):
        plain = made.__init__
        _jaxtyped(made, **options)
        if made.__init__ is not plain:
            made.__init__ = _now_and_then(plain, made.__init__)
        return made
    if not inspect.isfunction(made) or inspect.isgeneratorfunction(made):
        return _jaxtyped(made, **options)
    if "<locals>" not in made.__qualname__:
        return _now_and_then(made, _jaxtyped(made, **options))
    count = _made[made.__code__]
    _made[made.__code__] += 1
    due = count < _ALWAYS_WITHIN or count % _THEN_ONE_IN_WITHIN == 0
    return _jaxtyped(made, **options) if due else made


def _now_and_then(made: Any, checked: Any) -> Any:
    calls = itertools.count()

    @functools.wraps(checked)
    def sampled(*arguments: Any, **keywords: Any) -> Any:
        count = next(calls)
        due = count < _ALWAYS or count % _THEN_ONE_IN == 0
        return (checked if due else made)(*arguments, **keywords)

    sampled.__wrapped__ = made  # as of what jaxtyping makes: for tests of what a caller without checks sees
    return sampled


jaxtyping.jaxtyped = _often_enough
# An int is a float, as the type checker reads it too.
install_import_hook("adaptive_tangents", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import torch  # noqa: E402  (after the hook, lest anything it starts import the package)

settings.register_profile("adaptive-tangents", deadline=None)
settings.load_profile("adaptive-tangents")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

DATA_VARIABLE = "ADAPTIVE_TANGENTS_DATA"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data-dir", help=f"folder with real data, MNIST/raw/*-ubyte[.gz] in it (or set {DATA_VARIABLE})", default=None
    )


def pytest_configure(config: pytest.Config) -> None:
    # The closing colon keeps pytest from reusing the class it resolved for the same words before the hook.
    config.addinivalue_line("filterwarnings", "error::adaptive_tangents.errors.TangentWarning:")


@pytest.fixture(scope="session")
def data_dir(request: pytest.FixtureRequest) -> Path:
    """The folder with real data; tests that ask for it are skipped where none is named."""
    named = request.config.getoption("--data-dir") or os.environ.get(DATA_VARIABLE)
    if not named:
        pytest.skip(f"no folder with real data: give --data-dir or set {DATA_VARIABLE}")
    folder = Path(named)
    if not folder.is_dir():
        pytest.fail(f"the folder with real data, {named!r}, does not exist")
    return folder
