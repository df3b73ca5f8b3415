"""A network and its states along training, from files, folders or Python."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_tangents.capture.state_names import own_state, unwrapped
from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading import adapters
from adaptive_tangents.loading.adapters import ADAPTER, adapter_tensors, is_adapter
from adaptive_tangents.loading.checkpoint_order import Order, ordered, swapped
from adaptive_tangents.loading.checkpoints import (
    WEIGHTS,
    find_checkpoints,
    fit_state,
    is_series,
    load_checkpoint,
    no_weights,
    weights_in,
)
from adaptive_tangents.loading.hugging_face import (
    CONFIG,
    Tokenizer,
    classes_of,
    is_causal,
    is_network,
    network_of,
    state_of,
)
from adaptive_tangents.loading.models import load_model
from adaptive_tangents.loading.words import listed_names

Point = str | Path | Mapping[str, Any] | nn.Module
"""A checkpoint: a file, a folder, a state dict in memory, or a network whose parameters are taken."""

State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Series:
    """A network in evaluation mode and its states in order of training.

    Args:
        model: the network; its own parameters are those that it was made with.
        states: state dicts by title, in order of training.
        tokenizer: turns texts into the network's arguments; None if no folder can have one.
        classes: the labels' names; None if the checkpoint has none.
        causal: whether it is a causal language model.
        order: the checkpoints and what they were put in order by; None if start and end were given.
        doubts: sentences on what may be wrong with the series.
        folders: where a tokenizer or a preprocessor may lie beside the weights.
        names: parameters and modules that peft made longer, with the names to show them by.
        source: what the network was made from, in words.
    """

    model: nn.Module
    states: Mapping[str, State]
    tokenizer: Callable[..., dict[str, Tensor]] | None = None
    classes: tuple[str, ...] | None = None
    causal: bool = False
    order: Order | None = None
    doubts: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict, repr=False)
    source: str = ""

    def selected(self, wrt: Sequence[str] | None) -> tuple[str, ...] | None:
        """Name patterns as they are; of a network with an adapter the parameters whose long or short name matches."""
        if not wrt or not self.names:
            return tuple(wrt) if wrt else None
        every = [name for name, _ in self.model.named_parameters() if ".original_module." not in name]
        found: list[str] = []
        for pattern in wrt:
            matching = [n for n in every if fnmatchcase(n, pattern) or fnmatchcase(self.names.get(n, n), pattern)]
            found += matching or [pattern]
        return tuple(dict.fromkeys(found))


def open_series(
    call: str,
    *,
    model: str | nn.Module | None = None,
    start: Point | None = None,
    end: Point | None = None,
    checkpoints: str | Path | Sequence[str | Path] | None = None,
    base: str | Path | None = None,
    merged: bool = False,
    device: str = "cpu",
) -> Series:
    """Open a network and its checkpoints, from whatever training left.

    Args:
        call: what errors name.
        model: a network; `package.module:factory`, `path/to/file.py:factory`, `timm:NAME?num_classes=10`, or a folder with a
            `config.json`. None takes the network that the checkpoints describe: folders of transformers and of peft do.
        start: the first checkpoint: a file of weights (`.safetensors`, `.pt`, Lightning's `.ckpt`), a folder of
            transformers or peft, a state dict, or a network. Alone it may be a folder that holds `checkpoint-N`.
        end: the last checkpoint, in any of these forms.
        checkpoints: instead of start and end: a pattern, a folder that holds `checkpoint-N`, or several paths. They are put
            in order by the steps that they store.
        base: the folder of the network that adapters were trained on; None is the one that they name.
        merged: whether adapters are merged into the weights, W + BA, so that these are measured.
        device: where the network is put.

    Raises:
        TangentError: when something is missing, does not fit, would need code or a pickle to be loaded, or is no checkpoint.

    >>> series = open_series("inspect", model=nn.Linear(2, 1), start={"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
    >>> series.states["start"]["weight"]
    tensor([[1., 1.]])
    """
    start, end = _named(start, call, "start"), _named(end, call, "end")
    if checkpoints is None and end is None and isinstance(start, Path) and os.path.isdir(start) and is_series(start):
        checkpoints, start = start, None
    order: Order | None = None
    doubts: tuple[str, ...] = ()
    if checkpoints is not None:
        if start is not None or end is not None:
            raise TangentError(f"{call}: give start and end, or checkpoints, not both")
        order = ordered(_several(checkpoints, call), call)
        points, doubts = _titled({str(path): path for path in order.paths}), order.doubts
    else:
        points = _titled({title: each for title, each in (("start", start), ("end", end)) if each is not None})
        if isinstance(start, Path) and isinstance(end, Path):
            if start.resolve() == end.resolve():
                raise TangentError(f"{call}: start and end are the same, {start}; give two different checkpoints")
            doubt = swapped(start, end)
            doubts = (doubt,) if doubt else ()
    folders = [point for point in points.values() if isinstance(point, Path)]
    based = None if base is None else Path(base)
    if based is not None and not any(map(is_adapter, folders)):
        raise TangentError(
            f"{call}: a base is for adapters, and none of the checkpoints is one (a folder with {ADAPTER}); leave out --base"
        )
    if model is None:
        model = next((point for point in reversed(points.values()) if isinstance(point, nn.Module)), None)
    network, source = _network(model, folders, based, device, call)
    more: dict[str, Any] = {}
    if any(map(is_adapter, folders)):
        network, states, words = _adapted(network, points, merged, model is None, call)
        doubts = (*doubts, *words)
        more["names"] = adapters.short_names(network)
    else:
        states = {title: as_state(point, network, call, title) for title, point in points.items()}
        if adapters.is_adapted(network):
            network, states = _within(network, states)
            more["names"] = adapters.short_names(network)
    places = (*(folder for folder in reversed(folders) if os.path.isdir(folder)), *_base_of(folders, based, call))
    places += (Path(model),) if isinstance(model, str) and os.path.isdir(model) else ()
    return Series(
        network, states, tokenizer=Tokenizer(places, network, call) if places else None, classes=classes_of(network),
        causal=is_causal(network), order=order, doubts=doubts, folders=places, source=source, **more,
    )  # fmt: skip


def as_state(thing: Point, model: nn.Module, call: str, what: str = "the state dict") -> State:
    """A state dict by the model's names, from a state dict, a network, or the path of a file or folder.

    ``what`` names one in memory. Raises TangentError if it does not fit the model.

    >>> as_state({"module.weight": torch.ones(1, 2), "module.bias": torch.zeros(1)}, nn.Linear(2, 1), "inspect")["weight"]
    tensor([[1., 1.]])
    """
    if isinstance(thing, nn.Module):
        thing = own_state(thing)
    if isinstance(thing, Mapping):
        found = unwrapped(thing)
        if found is not None and adapters.is_adapted(model) and _is_part(found[0], model):
            return adapters.adapter_state(model, found[0], "the adapter's state dict", call)
        return fit_state(thing, model, what, call)
    path = _checked(Path(thing), call)
    if is_adapter(path):
        if not adapters.is_adapted(model):
            raise TangentError(
                f"{call}: {path} is an adapter, and the {type(model).__name__} has none; give the network that peft made, or "
                "no model at all"
            )
        return adapters.adapter_state(model, adapter_tensors(path, call), f"the adapter {path}", call)
    return state_of(path, model, call) if os.path.isdir(path) else load_checkpoint(path, model, call)


def _is_part(state: Mapping[str, Tensor], model: nn.Module) -> bool:
    """Whether a state holds an adapter alone, as peft saves it."""
    return len(state) <= sum(parameter.requires_grad for parameter in model.parameters())


def _named(point: Any, call: str, what: str) -> Any:
    """A checkpoint, paths as paths; a file of weights in a folder that says what they are is that folder."""
    if not isinstance(point, str | Path):
        if point is None or isinstance(point, Mapping | nn.Module):
            return point
        raise TangentError(
            f"{call}: {what} is a {type(point).__name__}; give the path of a file or folder, a state dict, or a network"
        )
    path = Path(point)
    if os.path.isfile(path) and path.name in (*WEIGHTS, "adapter_model.safetensors") and (
        os.path.isfile(path.parent / CONFIG) or is_adapter(path.parent)
    ):  # fmt: skip
        return path.parent
    return path


def _several(checkpoints: str | Path | Sequence[str | Path], call: str) -> list[Path]:
    if isinstance(checkpoints, str | Path):
        return find_checkpoints(str(checkpoints), call)
    if len(checkpoints) < 2:
        raise TangentError(f"{call}: at least two checkpoints are needed, start and end; got {len(checkpoints)}")
    return [Path(path) for path in checkpoints]


def _titled(points: Mapping[str, Any]) -> dict[str, Any]:
    """Checkpoints by their names, with their folders if two names are equal; what is in memory by what it was given as."""
    short = {
        title: (point.stem if point.suffix.lstrip(".").isalpha() else point.name) if isinstance(point, Path) else title
        for title, point in points.items()
    }
    alike = len(set(short.values())) < len(short)
    return {str(point) if alike and isinstance(point, Path) else short[title]: point for title, point in points.items()}


def _checked(path: Path, call: str) -> Path:
    if os.path.isdir(path) and not is_adapter(path) and weights_in(path) is None:
        raise no_weights(path, call)
    if not os.path.exists(path):
        raise TangentError(f"{call}: there is no checkpoint {path}; check the name")
    return path


def _base_of(folders: Sequence[Path], base: Path | None, call: str) -> tuple[Path, ...]:
    adapted = [folder for folder in folders if is_adapter(folder)]
    if not adapted:
        return ()
    try:
        return (adapters.base_folder(adapted[-1], base, call),)
    except TangentError:  # the network was given
        return ()


def _network(
    model: str | nn.Module | None, folders: Sequence[Path], base: Path | None, device: str, call: str
) -> tuple[nn.Module, str]:
    """The network, and what it was made from; of adapters the base, at the base's weights."""
    for folder in folders:
        _checked(folder, call)
    if isinstance(model, nn.Module):
        return model, type(model).__name__
    if isinstance(model, str):
        if os.path.isdir(model):
            return network_of(Path(model), call).to(device), model
        made = load_model(model, call).to(device)
        if base is not None:
            made.load_state_dict(load_checkpoint(base, made, call))
        return made, model
    adapted = [folder for folder in folders if is_adapter(folder)]
    if adapted:
        if base is None:
            adapters.same_base(adapted, call)
        found = adapters.base_folder(adapted[-1], base, call)
        network = adapters.base_network(adapted[-1], found, call).to(device)
        return network, f"{type(network).__name__} of {found} with the adapter {adapted[-1]}"
    telling = [folder for folder in folders if is_network(folder)]
    if not telling:
        held = (
            f"{listed_names(map(str, folders))} {'do' if len(folders) > 1 else 'does'} not say"
            if folders
            else "nothing says"
        )
        raise TangentError(
            f"{call}: {held} what network the weights are of; give --model "
            "package.module:factory, path/to/file.py:factory or timm:NAME, or folders with config.json, as save_pretrained "
            "writes them"
        )
    network = network_of(telling[-1], call).to(device)
    return network, f"{type(network).__name__} of {telling[-1]}"


def _adapted(
    network: nn.Module, points: Mapping[str, Any], merged: bool, own: bool, call: str
) -> tuple[nn.Module, dict[str, State], tuple[str, ...]]:
    """The network with its adapter, the states, and what there is to say; with ``merged`` the network without it."""
    paths = {title: point for title, point in points.items() if isinstance(point, Path) and is_adapter(point)}
    others = [title for title in points if title not in paths]
    last = paths[list(paths)[-1]]
    if merged:
        if adapters.is_adapted(network):
            raise TangentError(
                f"{call}: the model has an adapter already, so nothing is merged; give the base as the model"
            )
        plain = {
            title: adapters.merged_state(network, point, call) if title in paths else as_state(point, network, call)
            for title, point in points.items()
        }
        return network, plain, ()
    for title in others:
        _check_base(title, points, network, call)
    adapted = network
    if not adapters.is_adapted(network):
        adapted = adapters.wrapped(network if own else copy.deepcopy(network), last, call)
        adapters.drop_replaced(adapted)
        adapted.to(next(network.parameters()).device)
    states = {
        title: adapters.adapter_state(adapted, adapter_tensors(point, call), f"the adapter {point}", call)
        for title, point in paths.items()
    }
    if not others:
        return adapters.inner(adapted), states, ()
    start = {others[0]: adapters.first_state(adapted, states[list(paths)[-1]])}
    doubt = (
        f"the start {others[0]} is the base without an adapter, so the adapter is taken as it is before training, with "
        "B = 0, and with the A of the end, since the first A is not stored; save the adapter before training to have both"
        if any("lora_" in name for name in states[list(paths)[-1]])
        else f"the start {others[0]} is the base without an adapter, so the adapter is taken as peft makes it"
    )
    return adapters.inner(adapted), start | states, (doubt,)


def _check_base(title: str, points: Mapping[str, Any], network: nn.Module, call: str) -> None:
    """Raise TangentError unless a checkpoint beside adapters is the start, and their base."""
    point = points[title]
    first = title == next(iter(points))
    if first and isinstance(point, Path) and is_network(point) and not adapters.is_adapted(network):
        held = state_of(point, network, call)
        if all(torch.equal(value, held[name]) for name, value in network.state_dict().items()):
            return
    raise TangentError(
        f"{call}: {title} is no adapter, but others are, and it is not the base that they were trained on; give adapters "
        "alone, their base's folder as the start, or --merged to compare the weights"
    )


def _within(adapted: nn.Module, states: Mapping[str, State]) -> tuple[nn.Module, dict[str, State]]:
    """The network in peft's, and states by its names."""
    within = adapters.inner(adapted)
    if within is adapted:
        return adapted, dict(states)
    return within, {title: fit_state(state, within, title, "series") for title, state in states.items()}
