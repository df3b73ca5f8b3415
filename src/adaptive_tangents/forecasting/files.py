"""A forecast on disk: one safetensors file of the two states, with everything else as JSON in its header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.runtime.tensor_files import ReadError, read_metadata, read_tensors, write_tensors

_KIND, _FORMAT = "adaptive-tangents forecast", 1
States = Mapping[str, Mapping[str, Tensor]]


def write_forecast(path: Path, states: States, numbers: Mapping[str, Any]) -> None:
    """Write states by name, and numbers; raises TangentError where that is not possible."""
    tensors, pairs = dict[str, Tensor](), list[str]()
    for kind, state in states.items():
        for name, value in state.items():
            key = f"{kind}.{name}"
            if value.is_complex():
                pairs.append(key)
            tensors[key] = (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).clone()
    head = {"kind": _KIND, "format": _FORMAT, "complex": pairs, **numbers}
    try:
        write_tensors(path, tensors, {"forecast": json.dumps(head)})
    except OSError as error:
        raise TangentError(f"save: {path} cannot be written ({error}); give another path") from error


def read_forecast(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The states and the numbers of a file; raises TangentError if it is no forecast."""
    try:
        head, tensors = read_metadata(path), read_tensors(path)
    except ReadError as error:
        raise TangentError(
            f"load_forecast: {path} cannot be read ({error}); give a file that Forecast.save wrote"
        ) from error
    try:
        numbers = json.loads(head["forecast"])
        known = (numbers.pop("kind"), numbers.pop("format")) == (_KIND, _FORMAT)
        pairs = set(numbers.pop("complex"))
    except (KeyError, TypeError, AttributeError, ValueError):
        known = False
    if not known:
        raise TangentError(
            f"load_forecast: {path} is no forecast of this version; give a file that Forecast.save wrote"
        )
    states = dict[str, dict[str, Tensor]]()
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        states.setdefault(kind, {})[name] = torch.view_as_complex(value) if key in pairs else value
    return states, numbers
