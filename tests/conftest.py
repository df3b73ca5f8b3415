"""Check shapes at run time, in tests only, and provide the folder with real data if one is named."""

import contextlib
import dataclasses
import functools
import gc
import inspect
import os
import random
import runpy
import sys
import tempfile
import threading
import types
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

gc.disable()  # while all is imported and collected
# Every worker imports all tests and the package, with checks compiled in, and so do many processes that tests start: all read
# what the first one compiles, also where Python was told to keep nothing (folders that Git ignores hold it).
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# What a user's folders hold (a list of fonts, settings, kernels) changes no test: one fresh folder stands for all of them.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers take the folder of the process that starts them
    _settings = tempfile.TemporaryDirectory(prefix="settings-of-tests-")
    for _name in ("MPLCONFIGDIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        os.environ[_name] = str(Path(_settings.name, _name.lower()))
    os.environ.pop("MATPLOTLIBRC", None)
# Here and in processes that tests start, torchvision must be importable (see the file in that folder).
_operators = str(Path(__file__).parent / "torchvision_operators")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_operators, os.environ.get("PYTHONPATH"))))
runpy.run_path(f"{_operators}/sitecustomize.py")
# The package may already be imported without checks: pytest does so for a warning filter in pyproject.toml that names one
# of its classes. Drop that copy, so that the tests import the checked one.
for _module in [name for name in sys.modules if name.partition(".")[0] == "adaptive_tangents"]:
    del sys.modules[_module]
# Checking small functions, which are called a million times, would take longer than running them. So a call is checked
# only if the form of its arguments or result is new: types, dtypes, shapes and strings. Which calls are checked does not
# depend on how tests are spread over processes. The first one compiles the check. Functions whose annotations name no shapes
# are not checked here: types alone are the type checker's.
_jaxtyped = jaxtyping.jaxtyped


class _Calls(threading.local):
    """The functions whose checks are running."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []


_calls = _Calls()
# The look-up of a form takes the function's own parameters, so that nothing is packed and each one is looked at as its
# annotation asks: most of what the tests call takes no longer than this. Names begin so that no parameter has one of them.
_LOOK_UP = """
def bind(_checked_made, _checked_seen, _checked_form, _checked_new, _checked_again, _checked_defaults):
    def sampled({signature}):
        _checked_key = None
        try:
            _checked_results = _checked_seen[_checked_key := {key}]
        except (KeyError, AttributeError, TypeError):
            return _checked_new(_checked_made, _checked_key, {values})
        _checked_result = _checked_made({passed})
        try:
            if {result} in _checked_results:
                return _checked_result
        except AttributeError:  # no array
            pass
        return _checked_again(_checked_result, _checked_results, {values})
    return sampled
"""


@functools.cache
def _compiled(text: str) -> Any:
    space: dict[str, Any] = {}
    exec(compile(text, __file__, "exec"), space)
    return space["bind"]


class _Check:
    """The check of one function, compiled when first needed, and the result forms seen for each form of arguments."""

    def __init__(self, made: Any, options: dict[str, Any]) -> None:
        self.code, self.made, self.options = made.__code__, made, options
        self.seen: dict[Any, set[Any]] = {}
        self.parameters = [*inspect.signature(made).parameters.values()]
        kinds = made.__annotations__
        looks = {p.name: _look(p.name, kinds.get(p.name)) for p in self.parameters}
        result = f"({_look('_checked_result', kinds.get('return', ()))})"
        self.form_of_result = eval(f"lambda _checked_result: {result}", {"_checked_form": _form})
        self.bind = _compiled(self._look_up(looks, result))

    def _look_up(self, looks: dict[str, str], result: str) -> str:
        signature, key, passed, before = [], [], [], None
        for p in self.parameters:
            if before is p.POSITIONAL_ONLY is not p.kind:
                signature.append("/")
            if p.kind is p.KEYWORD_ONLY and before not in (p.VAR_POSITIONAL, p.KEYWORD_ONLY):
                signature.append("*")
            before = p.kind
            star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
            signature.append(star + p.name + ("" if p.default is p.empty else f"=_checked_defaults[{p.name!r}]"))
            passed.append(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else star + p.name)
            if p.kind is p.VAR_KEYWORD:
                key.append(f"*{p.name}, *map(_checked_form, {p.name}.values()), ")
            else:
                key.append(f"*map(_checked_form, {p.name}), " if star else f"{looks[p.name]}, ")
        if before is inspect.Parameter.POSITIONAL_ONLY:
            signature.append("/")
        return _LOOK_UP.format(
            signature=", ".join(signature), key=f"({''.join(key)})", passed=", ".join(passed),
            values=f"({''.join(p.name + ', ' for p in self.parameters)})",
            result=result,
        )  # fmt: skip

    def bound(self, made: Any) -> Any:
        """A function of this code, checked where the form of a call is new."""
        defaults = made.__kwdefaults__ or {}
        if made.__defaults__:
            positional = made.__code__.co_varnames[: made.__code__.co_argcount]
            defaults = {**defaults, **dict(zip(reversed(positional), reversed(made.__defaults__), strict=False))}
        return self.bind(made, self.seen, _form, self._new, self._again, defaults)

    def _new(self, made: Any, key: Any, values: tuple[Any, ...]) -> Any:
        """The result of a call of a new form, with arguments checked before and the result after."""
        result = self._run(made, values)
        with contextlib.suppress(TypeError):  # a size that is a symbol has no hash
            self.seen.setdefault(key, set()).add(self.form_of_result(result))
        return result

    def _again(self, result: Any, results: set[Any], values: tuple[Any, ...]) -> Any:
        """The result, checked since its form is new."""
        self._run(lambda *_, **__: result, values)
        results.add(self.form_of_result(result))
        return result

    @functools.cached_property
    def _checked(self) -> Any:
        calls, made = _calls, self.made

        def run(*arguments: Any, **keywords: Any) -> Any:
            return calls.waiting.pop()(*arguments, **keywords)

        # String annotations are looked up in the function's own globals.
        run = types.FunctionType(run.__code__, made.__globals__, closure=run.__closure__)
        checked = _jaxtyped(functools.update_wrapper(run, made), **self.options)
        del run.__wrapped__, self.made  # does not keep closure variables alive
        return checked

    def _run(self, call: Any, values: tuple[Any, ...]) -> Any:
        arguments, keywords = self._given(values)
        depth = len(_calls.waiting)
        _calls.waiting.append(call)
        try:
            return self._checked(*arguments, **keywords)
        finally:
            del _calls.waiting[depth:]

    def _given(self, values: tuple[Any, ...]) -> tuple[list[Any], dict[str, Any]]:
        """Arguments by position and by name, without defaults: these may be stand-ins, as for the lists of a dataclass."""
        arguments: list[Any] = []
        keywords: dict[str, Any] = {}
        starred = any(p.kind is p.VAR_POSITIONAL and value for p, value in zip(self.parameters, values, strict=True))
        for p, value in zip(self.parameters, values, strict=True):
            if p.kind is p.VAR_POSITIONAL:
                arguments += value
            elif p.kind is p.VAR_KEYWORD:
                keywords |= value
            elif p.kind is p.POSITIONAL_ONLY or (
                p.kind is p.POSITIONAL_OR_KEYWORD and (starred or p.default is p.empty)
            ):
                arguments.append(value)
            elif value is not p.default:
                keywords[p.name] = value
        return arguments, keywords


_checks: dict[int, _Check] = {}  # by code object: a nested function is a new object at every call


def _names_shapes(kind: Any) -> bool:
    return "jaxtyping" in repr(kind) or (isinstance(kind, str) and "Tensor, " in kind)


def _look(name: str, kind: Any) -> str:
    """What of an argument tells its form, given its annotation: arrays most often, and values of classes have no more."""
    if getattr(kind, "array_type", None) in _ARRAYS:
        return f"type({name}), {name}.dtype, {name}.shape"
    if isinstance(kind, types.UnionType) and len(kind.__args__) == 2 and kind.__args__[1] is types.NoneType:
        return f"(None if {name} is None else ({_look(name, kind.__args__[0])}))"
    if kind is None or kind is Any or (isinstance(kind, type) and kind not in (str, tuple, list, dict)):
        return f"type({name})"
    return f"_checked_form({name})"


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
    if not any(map(_names_shapes, made.__annotations__.values())):
        return made
    check = _checks.get(id(made.__code__))
    if check is None:
        check = _checks[id(made.__code__)] = _Check(made, options)
    return functools.update_wrapper(check.bound(made), made)


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
settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, max_examples=250, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

DATA_VARIABLE = "ADAPTIVE_TANGENTS_DATA"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", help="seed of the random numbers that each test starts with", type=int, default=0)
    parser.addoption(
        "--data-dir", help=f"folder with real data, MNIST/raw/*-ubyte[.gz] in it (or set {DATA_VARIABLE})", default=None
    )


def pytest_configure(config: pytest.Config) -> None:
    # The final colon keeps pytest from reusing the class that it resolved for the same text before this hook.
    config.addinivalue_line("filterwarnings", "error::adaptive_tangents.errors.TangentWarning:")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under ``--dist loadgroup``, count what waits from the units handed out last: xdist looks through all of them."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadGroupScheduling

    class Scheduling(LoadGroupScheduling):
        def _pending_of(self, workload: dict[str, dict[str, bool]]) -> int:
            pending = 0
            for unit in reversed(workload.values()):  # a process runs units in the order in which it gets them
                waiting = sum(not done for done in unit.values())
                if not waiting:
                    break
                pending += waiting
            return pending

    return Scheduling(config, log)


def pytest_plugin_registered(plugin: object, manager: pytest.PytestPluginManager) -> None:
    """A process of xdist tells once what came of a test: that it starts, is set up and ends is shown only where asked for.

    Each message is turned into text and read again, which would take as long as a small test.
    """
    if type(plugin).__name__ != "WorkerInteractor":
        return
    option = plugin.config.option  # type: ignore[attr-defined]
    if option.verbose > 0 or option.durations is not None or option.xmlpath is not None:
        return
    send = plugin.pytest_runtest_logreport  # type: ignore[attr-defined]

    def told(report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed or report.sections:
            send(report)

    def untold(nodeid: str, location: object) -> None:
        pass

    hooks = manager.hook
    for hook, function in (
        (hooks.pytest_runtest_logreport, told),
        (hooks.pytest_runtest_logstart, untold),
        (hooks.pytest_runtest_logfinish, untold),
    ):
        for implementation in hook.get_hookimpls():
            if implementation.plugin is plugin:
                implementation.function = function


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the groups of tests where the scheduler reads them: xdist sets an attribute that pytest 9.2 no longer reads."""
    for item in items:
        named = getattr(item, "_nodeid", item.nodeid)
        if named != item.nodeid:
            item._id = type(item._id).parse(named)


_kept_modules = 0  # those that no garbage collection looks through


def _keep() -> None:
    """What is imported and collected stays: no garbage collection need look through it."""
    global _kept_modules
    _kept_modules = len(sys.modules)
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before fixtures draw
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Random numbers do not depend on the tests that ran before in the same process."""
    seed = item.config.getoption("--seed")
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    if len(sys.modules) > _kept_modules + 200:  # a large library more
        _keep()


def pytest_collection_finish() -> None:
    _keep()
    gc.set_threshold(5_000, 10, 10)
    gc.enable()


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
