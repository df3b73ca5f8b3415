"""Adapters of the peft library: their base, their parameters as states, and the names to show them by."""

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading.checkpoints import read_state
from adaptive_tangents.loading.hugging_face import (
    CONFIG,
    head_names,
    is_network,
    network_of,
    quiet,
    read_json,
    state_of,
)
from adaptive_tangents.loading.words import listed_names, optional, told

ADAPTER = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
_INNER = "base_model.model."
_DRAWN, _ZERO = ("lora_A", "lora_embedding_B"), ("lora_B", "lora_embedding_A")  # the sides of LoRA before training
_REPEATED = (".modules_to_save.", ".original_module.", "prompt_embeddings")  # what peft saves, or sets, a second time


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return os.path.isfile(folder / ADAPTER)


def adapter_tensors(folder: Path, call: str) -> dict[str, Tensor]:
    """The tensors that an adapter's folder holds, by the names in its file."""
    path = next((folder / name for name in _WEIGHTS if os.path.isfile(folder / name)), None)
    if path is None:
        raise TangentError(
            f"{call}: {folder} has {ADAPTER}, but neither {' nor '.join(_WEIGHTS)}; save it again with "
            "model.save_pretrained"
        )
    content = read_state(path, torch.device("cpu"), call)
    if not isinstance(content, Mapping):
        raise TangentError(f"{call}: {path} holds a {type(content).__name__}, not tensors by name; save it again")
    return dict(content)


def base_folder(folder: Path, base: Path | None, call: str) -> Path:
    """The folder of the network that an adapter was trained on.

    Raises TangentError unless it is given, or the adapter names one on this disk.
    """
    if base is not None:
        if not is_network(base):
            raise TangentError(
                f"{call}: the base {base} is no folder with {CONFIG} and weights; give the folder of the network that "
                f"{folder} was trained on"
            )
        return base
    named = read_json(folder / ADAPTER, call).get("base_model_name_or_path")
    for path in (Path(str(named)), folder / str(named)) if named else ():
        if is_network(path):
            return path
    raise TangentError(
        f"{call}: the base of the adapter {folder} is missing: {ADAPTER} "
        + (f"names {named!r}, which is no folder here with {CONFIG} and weights" if named else "names none")
        + ", and nothing is downloaded; give --base DIR (base= in Python), the folder of the network that it was trained on"
    )


def base_network(folder: Path, base: Path, call: str) -> nn.Module:
    """The network at the base's weights, with the head that the adapter was trained with.

    The head may be the adapter's own; Raises TangentError if neither has it.
    """
    config, tensors = read_json(folder / ADAPTER, call), adapter_tensors(folder, call)
    heads = [value for name, value in tensors.items() if name.endswith(_HEADS) and value.ndim == 2]
    task = config.get("task_type")
    labels = len(heads[0]) if task in ("SEQ_CLS", "TOKEN_CLS") and heads else None
    model = network_of(base, call, task=task, labels=labels)
    # A head that the adapter brings takes the place of the base's, which need not have one, nor one of this size.
    brought = {name.removeprefix(_INNER) for name in tensors}
    own = {name for name in head_names(model) if name in brought}
    model.load_state_dict(state_of(base, model, call, may_miss=own), strict=False)
    return model


def wrapped(model: nn.Module, folder: Path, call: str) -> nn.Module:
    """A network with an adapter's layers put in, which peft makes, at their first values; only these require gradients.

    Raises TangentError if peft cannot make them.
    """
    peft = optional("peft", f"{folder}, an adapter,", call)
    with quiet():
        try:
            config = peft.PeftConfig.from_pretrained(str(folder))
            config.inference_mode = False
            made: nn.Module = peft.get_peft_model(model, config)
        except Exception as error:
            raise TangentError(
                f"{call}: peft cannot put the adapter {folder} into the {type(model).__name__} ({told(error)}); give the "
                "base that it was trained on"
            ) from error
    return made.eval()


def drop_replaced(adapted: nn.Module) -> None:
    """Take out the base's copies of modules that the adapter brings itself; nothing uses them."""
    for module in list(adapted.modules()):
        if isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict):
            module.original_module = nn.Identity()


def inner(adapted: nn.Module) -> nn.Module:
    """The network in peft's, whose names lack peft's prefix; peft's own where it adds to the inputs."""
    base = getattr(adapted, "base_model", None)
    within = getattr(base, "model", None)
    prompts = any(getattr(each, "is_prompt_learning", False) for each in getattr(adapted, "peft_config", {}).values())
    return adapted if prompts or not isinstance(within, nn.Module) else within


def is_adapted(model: Any) -> bool:
    """Whether it is a network with an adapter, made by peft."""
    return isinstance(model, nn.Module) and hasattr(model, "peft_config") and hasattr(model, "base_model")


def adapter_state(adapted: nn.Module, tensors: Mapping[str, Tensor], source: str, call: str) -> dict[str, Tensor]:
    """The state of a network with its adapter at the values saved in a source; peft's network is left as it was.

    Tensors of the base are the network's own, not copies.
    """
    peft = optional("peft", source, call)
    network = inner(adapted)
    tensors = {name: value.detach().clone() for name, value in tensors.items()}  # they may be the network's own
    before = {name: value.detach().clone() for name, value in network.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name in before:
                value.fill_(torch.nan)  # shows what the source does not set
    try:
        with quiet():
            left = peft.set_peft_model_state_dict(adapted, tensors)
        state = {
            name: value.detach().clone() if name in before else value.detach()
            for name, value in network.state_dict().items()
        }
    except Exception as error:
        raise TangentError(
            f"{call}: {source} does not fit ({told(error)}); give adapters of one configuration, or --merged to "
            "compare the weights that they make"
        ) from error
    finally:
        with torch.no_grad():
            for name, value in network.named_parameters():
                if name in before:
                    value.copy_(before[name])
    unset = [name for name in before if not bool(torch.isfinite(state[name]).all())]
    over = [name for name in left.unexpected_keys if not any(part in name for part in _REPEATED)]
    if unset or over:
        parts = [f"not finite or missing {listed_names(unset)}"] if unset else []
        parts += [f"unexpected {listed_names(over)}"] if over else []
        raise TangentError(
            f"{call}: {source} does not fit: {'; '.join(parts)}; give adapters of one configuration, or --merged "
            "to compare the weights that they make"
        )
    return state


def first_state(adapted: nn.Module, end: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter before training: its first values, but the sides that were drawn at random as at the end.

    If an adapter does not begin with a side of zeros (PiSSA, OLoRA), its first values follow from the base, and stand.
    """
    network = inner(adapted)
    trained = {name: value for name, value in network.named_parameters() if value.requires_grad}

    def of(name: str, sides: Iterable[str]) -> bool:
        return any(side in name.split(".") for side in sides)

    begun = any(bool(value.any()) for name, value in trained.items() if of(name, _ZERO))
    drawn = set() if begun else {name for name in trained if of(name, _DRAWN)}
    return {
        name: end[name] if name in drawn else value.detach().clone() if name in trained else value.detach()
        for name, value in network.state_dict().items()
    }


def merged_state(model: nn.Module, folder: Path, call: str) -> dict[str, Tensor]:
    """The state of a network with an adapter merged into its weights, W + BA; the network is left as it was."""
    adapted = wrapped(copy.deepcopy(model), folder, call)
    within = inner(adapted)
    if within is adapted:
        raise TangentError(f"{call}: the adapter {folder} adds to the inputs and cannot be merged; leave out --merged")
    state = adapter_state(adapted, adapter_tensors(folder, call), f"the adapter {folder}", call)
    within.load_state_dict(state, strict=False)
    with quiet():
        try:
            plain = adapted.merge_and_unload()  # type: ignore[operator]
        except Exception as error:
            raise TangentError(
                f"{call}: peft cannot merge the adapter {folder} ({told(error)}); leave out --merged"
            ) from error
    return {name: value.detach() for name, value in plain.state_dict().items()}


def short_names(model: nn.Module) -> dict[str, str]:
    """The names of a network's parameters and modules that peft made longer, each with the name to show it by.

    Peft's prefix, the adapter's name where there is one adapter, and its words for what it replaced are left out. A name
    stays as it is where the short one means something else.
    """
    if not any(
        hasattr(module, "adapter_layer_names") or hasattr(module, "modules_to_save") for module in model.modules()
    ):
        return {}
    shorter: dict[str, str] = {}
    for path, module in model.named_modules():
        at = f"{path}." if path else ""
        for kind in (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ())):
            held = getattr(module, kind, None)
            if isinstance(held, nn.ModuleDict | nn.ParameterDict) and len(held) == 1:
                shorter[f"{at}{kind}.{next(iter(held))}"] = f"{at}{kind}"
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            shorter[f"{at}base_layer"] = path
        saved = getattr(module, "modules_to_save", None)
        if isinstance(saved, nn.ModuleDict) and len(saved) == 1:
            shorter[f"{at}modules_to_save.{next(iter(saved))}"] = path
    parameters = [name for name, _ in model.named_parameters()]
    every = [*parameters, *(name for name, _ in model.named_modules() if name)]
    found = {name: _shortened(name, shorter) for name in every}
    taken: dict[str, int] = {}
    for name in parameters:
        taken[found[name]] = taken.get(found[name], 0) + 1
    return {old: new for old, new in found.items() if new != old and new and taken.get(new, 1) == 1}


def _shortened(name: str, shorter: Mapping[str, str]) -> str:
    for old in sorted(shorter, key=len, reverse=True):
        if name == old or name.startswith(f"{old}."):
            name = shorter[old] + name[len(old) :]
    return name.removeprefix(_INNER)


def same_base(folders: Iterable[Path], call: str) -> None:
    """Raise TangentError if adapters name different bases."""
    named = {str(read_json(folder / ADAPTER, call).get("base_model_name_or_path")): folder for folder in folders}
    if len(named) > 1:
        (one, first), (two, second), *_ = named.items()
        raise TangentError(
            f"{call}: the adapters were trained on different bases, {first} on {one} and {second} on {two}; give adapters of "
            "one base, or say with --base that both are the same network"
        )
