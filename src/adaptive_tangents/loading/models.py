"""The user's network, made by a factory or by timm, and a first run of it."""

import ast
import difflib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from adaptive_tangents.capture.batches import arguments, take, tensors
from adaptive_tangents.capture.lease import Loan, on_loan
from adaptive_tangents.capture.recording import recorded_if_needed
from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading.data import Data
from adaptive_tangents.loading.words import INSPECT, listed_names, optional, told

_TIMM = "timm:"


def load_function(spec: str, call: str = INSPECT, option: str = "--output") -> Callable[..., Any]:
    """The function `package.module:function` or `path/to/file.py:function`. Raises TangentError if there is none."""
    source, separator, name = spec.rpartition(":")
    if not separator or not source or not name:
        raise TangentError(
            f"{call}: {option} is package.module:function or path/to/file.py:function, got {spec!r}; name the function after "
            "a colon"
        )
    module = _module(source, call)
    found = getattr(module, name, None)
    if not callable(found):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise TangentError(
            f"{call}: {source} has no function {name!r}; it holds {listed_names(public) or 'no functions'}; name one of these"
        )
    return found  # type: ignore[no-any-return]


def load_model(spec: str, call: str = INSPECT) -> nn.Module:
    """The network made by a factory, `package.module:factory` or `path/to/file.py:factory`, in evaluation mode.

    `timm:NAME?num_classes=10&in_chans=1` is a network of timm, without pretrained weights. Raises TangentError if the module
    cannot be imported or lacks the function, or if that returns no `nn.Module`.

    >>> load_model("torch.nn:Identity")
    Identity()
    """
    if spec.startswith(_TIMM):
        return _timm(spec, call)
    source, separator, name = spec.rpartition(":")
    if not separator or not source or not name:
        raise TangentError(
            f"{call}: --model is package.module:factory or path/to/file.py:factory, got {spec!r}; name the function that "
            "makes the network after a colon"
        )
    module = _module(source, call)
    factory = getattr(module, name, None)
    if factory is None:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise TangentError(
            f"{call}: {source} has no {name!r}; it holds {listed_names(public) or 'no functions'}; name one that makes "
            "the network"
        )
    if not callable(factory) or isinstance(factory, nn.Module):
        raise TangentError(
            f"{call}: {spec} is a {type(factory).__name__}, not a function; name a function without arguments that "
            "returns the network"
        )
    try:
        model = factory()
    except (Exception, SystemExit) as error:
        raise TangentError(
            f"{call}: {spec} raised {told(error)}; it is called without arguments; write a function that fills them in"
        ) from error
    if not isinstance(model, nn.Module):
        raise TangentError(f"{call}: {spec} returned {type(model).__name__}, not a torch.nn.Module; return the network")
    return model.eval()


def _timm(spec: str, call: str) -> nn.Module:
    """A network of timm by its name and options, with torch's random numbers as before."""
    name, _, query = spec.removeprefix(_TIMM).partition("?")
    pairs = [part.partition("=") for part in query.split("&") if part]
    if not re.fullmatch(r"[\w.]+", name) or any(not key or not value for key, _, value in pairs):
        raise TangentError(f"{call}: --model {spec!r} is not of the form timm:NAME?num_classes=10&in_chans=1")
    options = {key: _value(value) for key, _, value in pairs}
    loads = [key for key in options if key.startswith(("pretrained", "checkpoint"))]
    if loads:
        raise TangentError(
            f"{call}: --model {spec!r} asks timm for weights ({', '.join(loads)}), and nothing is downloaded; give the "
            "weights as a checkpoint"
        )
    timm = optional("timm", f"--model {spec}", call)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise TangentError(
            f"{call}: timm has no network {name!r}; "
            + (f"the nearest are {', '.join(near)}" if near else "timm.list_models() lists them")
        )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = timm.create_model(name, pretrained=False, **options)
    except Exception as error:
        raise TangentError(
            f"{call}: timm cannot make {name} with {query or 'no options'} ({told(error)}); give options that it takes"
        ) from error
    return model.eval()


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _module(source: str, call: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        path = Path(source).resolve()
        if not os.path.isfile(path):
            raise TangentError(f"{call}: there is no file {source}; --model is path/to/file.py:factory")
        found = importlib.util.spec_from_file_location(path.stem, path)
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.path.insert(0, str(path.parent))  # the script's neighbors must be importable, as when it runs
        found.loader.exec_module(module)
        return module
    except TangentError:
        raise
    except (Exception, SystemExit) as error:
        raise TangentError(
            f"{call}: importing {source} failed with {told(error)}; run {call} where it can be imported, "
            "or give path/to/file.py:factory"
        ) from error


def check_runs(model: nn.Module, data: Data, path: Path, call: str = INSPECT) -> None:
    """Run the network on two samples. Raises TangentError if that fails, with their shapes and the network's message."""
    x = take(data.x, slice(0, 2))
    keywords = arguments(model, x)[1]

    def run(recorded: bool) -> None:
        given, named = arguments(model, take(x, None))
        model(*given, **named)

    def runs(loan: Loan) -> None:
        with torch.no_grad():
            recorded_if_needed(run)

    try:
        on_loan(model, runs)
    except TangentError:
        raise
    except Exception as error:
        shapes = [f"{tuple(t.shape[1:])} {str(t.dtype).removeprefix('torch.')}" for t in tensors(x)]
        named = [f"{name} {shape}" for name, shape in zip(keywords, shapes, strict=True)] if keywords else shapes
        remedy = _remedy(error, model, any(t.is_floating_point() for t in tensors(x)))
        raise TangentError(
            f"{call}: the network cannot take the samples of {path}, each {' and '.join(named)} "
            f"({told(error)}); {remedy}, or write a factory whose network takes these"
        ) from error


def _remedy(error: Exception, model: nn.Module, real: bool) -> str:
    """What to do about samples, real or integers, that a network does not take."""
    config = getattr(model, "config", None)
    if "padding token" in str(error) and getattr(config, "pad_token_id", None) is None:
        return (
            "say which token pads, as its pad_token_id: in the config.json of its folder, or in Python "
            "model.config.pad_token_id = tokenizer.pad_token_id"
        )
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        return "name them x, or as the network's forward names its arguments (and the labels y)"
    if not real:
        return "give tokens of its own tokenizer, and no more of them than it takes"
    return "save them in the shape that it was trained on, with channels first, (1, 28, 28) for gray images"
