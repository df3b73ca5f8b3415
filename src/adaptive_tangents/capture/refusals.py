"""What is no model, or one that cannot be evaluated at other parameters: errors that say what to pass instead."""

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_tangents.errors import TangentError


def check_is_module(call: str, model: object) -> None:
    """Raise TangentError unless ``model`` is a module that Python runs."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TangentError(f"{call}: the model is wrapped in {type(model).__name__}; pass its .module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TangentError(f"{call}: the model is a TorchScript module; pass the Python module it was made from")
    if not isinstance(model, nn.Module):
        raise TangentError(f"{call}: the model is a torch.nn.Module, got {_instead(model)}")


def _instead(model: object) -> str:
    """What was passed for a model, and what to pass."""
    if inspect.isclass(model):
        return f"the class {model.__name__}; pass an instance of it"
    if isinstance(model, torch.optim.Optimizer):
        return f"the optimizer {type(model).__name__}; pass the model whose parameters it holds"
    if isinstance(model, Mapping):
        return "a state dict or another mapping; pass the model, and a state dict as params="
    if isinstance(model, Tensor):
        return "a tensor; pass the model first and the batch x after it"
    if callable(model) and not hasattr(model, "model"):
        return "a function; pass a module that holds its parameters and calls it in forward"
    held = "; pass the module that it holds, such as its .model" if hasattr(model, "model") else "; pass a module"
    return f"{type(model).__name__}{held}"


def check_parameters(call: str, model: nn.Module, selected: tuple[str, ...]) -> None:
    """Raise TangentError for selected parameters without features in coordinates: integers, sparse, quantized ones."""
    for name, p in model.named_parameters():
        if name not in selected:
            continue
        if not (p.is_floating_point() or p.is_complex()):
            raise TangentError(
                f"{call}: parameter {name!r} is {p.dtype}, and features are of floating parameters; leave it out with wrt"
            )
        if p.layout != torch.strided or p.is_nested:
            raise TangentError(
                f"{call}: parameter {name!r} is sparse or nested, and features are of dense parameters; make it dense with "
                ".to_dense(), or leave it out with wrt"
            )


def check_copies(call: str, model: nn.Module) -> None:
    """Raise TangentError for modules of which no copy with frozen parameters can be made."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TangentError(
                f"{call}: {name!r} is a TorchScript module, whose parameters cannot be frozen; use the Python module it was "
                "made from"
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.layout != torch.strided or tensor.is_nested:
            raise TangentError(
                f"{call}: {name!r} is sparse or nested, and cannot be copied; make it dense with .to_dense()"
            )


def check_tensors(call: str, model: nn.Module) -> None:
    """Raise TangentError for parameters and buffers that hold no values here: not initialized, on meta, or sharded."""
    check_sharding(call, model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise TangentError(f"{call}: {name!r} is not initialized yet; run the model on one batch first")
        if tensor.device.type == "meta":
            raise TangentError(f"{call}: {name!r} is on the meta device and holds no values; load the weights first")
        if _is_sharded(tensor):
            raise TangentError(
                f"{call}: {name!r} is a DTensor, shared among processes (FSDP, tensor parallelism); load the full state dict "
                "into a model that is not sharded, and pass that"
            )


def check_sharding(call: str, model: nn.Module) -> None:
    """Raise TangentError for modules that gather their parameters in hooks (FSDP)."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: that takes a second
    kinds = tuple(getattr(fsdp, kind) for kind in ("FullyShardedDataParallel", "FSDPModule") if hasattr(fsdp, kind))
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            raise TangentError(
                f"{call}: {repr(name) if name else 'the model'} is sharded by FSDP; load the full state dict into a model "
                "that is not sharded, and pass that"
            )


def _is_sharded(tensor: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # not imported: that takes a second
    return module is not None and isinstance(tensor, module.DTensor)
