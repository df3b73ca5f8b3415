"""What ``inspect`` is given in Python: a network, its states and samples, in any of their forms."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_tangents.capture.batches import tensors
from adaptive_tangents.errors import TangentError
from adaptive_tangents.inspection.run import NAME
from adaptive_tangents.loading import Data, load_checkpoint, load_data, load_model
from adaptive_tangents.loading.checkpoint_order import swapped

IN_MEMORY = "data in memory"


@dataclass(frozen=True)
class Opened:
    """A network with its states by title, in order of training; ``name`` says what it is, ``doubts`` what its order lacks."""

    model: nn.Module
    name: str
    states: dict[str, dict[str, Tensor]]
    doubts: tuple[str, ...] = ()


def opened(model: nn.Module | str, start: Any, end: Any, between: Mapping[str, Any] | Sequence[Any] | None) -> Opened:
    """The network and the states of start, checkpoints and end."""
    name = model if isinstance(model, str) else type(model).__name__
    network = load_model(model) if isinstance(model, str) else model
    if isinstance(between, Mapping):
        middle = dict(between)
    else:
        middle = {f"checkpoint {k}": state for k, state in enumerate(between or (), start=1)}
    given = {"start": start, **middle, "end": network if end is None else end}
    if len(given) != len(middle) + 2:
        raise TangentError(f"{NAME}: checkpoints are named 'start' or 'end', as the two ends are; give other titles")
    titles = _titles(given, named=isinstance(between, Mapping))
    states = {titles[key]: state_of(each, network, key) for key, each in given.items()}
    paths = [Path(each) for each in (start, end) if _is_path(each)]
    doubt = swapped(*paths) if len(paths) == 2 and not middle else None
    return Opened(network, name, states, (doubt,) if doubt else ())


def _titles(given: Mapping[str, Any], *, named: bool) -> dict[str, str]:
    """What each state is called: files by their names, as for the command."""
    paths = {key: Path(each) for key, each in given.items() if _is_path(each)}
    if named:
        paths = {key: path for key, path in paths.items() if key in ("start", "end")}
    short = len({path.stem for path in paths.values()}) == len(paths)
    titles = {key: (paths[key].stem if short else str(paths[key])) if key in paths else key for key in given}
    return titles if len(set(titles.values())) == len(given) else {key: key for key in given}


def _is_path(thing: Any) -> bool:
    return isinstance(thing, str | os.PathLike)


def state_of(thing: Any, model: nn.Module, title: str) -> dict[str, Tensor]:
    """A state dict with the model's names, in memory of its own."""
    if _is_path(thing):
        return load_checkpoint(Path(thing), model)
    held = thing.state_dict() if isinstance(thing, nn.Module) else thing
    if not isinstance(held, Mapping):
        raise TangentError(
            f"{NAME}: {title} is a {type(thing).__name__}; give a state dict, a module that holds the parameters, or the "
            "path of a checkpoint"
        )
    wanted = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    missing = [name for name in wanted if name not in held]
    wrong = [name for name in wanted if name in held and held[name].shape != wanted[name].shape]
    extra = [name for name in held if name not in wanted]
    if missing or wrong or extra:
        words = (("missing", missing), ("of another shape", wrong), ("unexpected", extra))
        told = "; ".join(f"{what} {', '.join(names[:4])}" for what, names in words if names)
        raise TangentError(f"{NAME}: {title} does not fit the model: {told}; give a state dict of this network")
    return {name: held[name].detach().to(value).clone() for name, value in wanted.items()}


def data_of(data: Any) -> tuple[Data, str]:
    """Samples in the form that an inspection takes, and what they are called."""
    if isinstance(data, Data):
        return data, IN_MEMORY
    if _is_path(data):
        return load_data(Path(data)), Path(data).name
    x, y = data if isinstance(data, tuple) and len(data) == 2 else (data, None)
    if y is not None:
        y = torch.as_tensor(np.asarray(y) if isinstance(y, list | tuple) else y)
    found = Data(torch.as_tensor(x) if isinstance(x, np.ndarray) else x, y)
    counts = {len(each) for each in (*tensors(found.x), *([] if y is None else [y]))}
    if len(counts) != 1:
        raise TangentError(
            f"{NAME}: x and y of data hold different numbers of samples, {sorted(counts)}; give data=(x, y) with one label "
            "or target for every sample"
        )
    return found, IN_MEMORY
