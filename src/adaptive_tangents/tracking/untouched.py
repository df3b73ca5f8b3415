"""A model in the middle of training, measured in evaluation mode and left as found."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from adaptive_tangents.runtime.cleanup import ensured

_Made = TypeVar("_Made")


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module: without wrappers of torch.compile and of data-parallel training."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def in_evaluation(model: nn.Module, body: Callable[[], _Made]) -> _Made:
    """``body()`` in evaluation mode, without autocast and inference mode; modes are put back, generators by each loan."""
    modes = [(module, module.training) for module in model.modules()]

    def measured() -> _Made:
        for module, _ in modes:
            module.training = False  # train() may be overridden, e.g. to merge weights
        with torch.inference_mode(False), torch.autocast(device_of(model).type, enabled=False):
            return body()

    def put_back() -> None:
        for module, training in modes:
            module.training = training

    return ensured(measured, put_back)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def wait_for(device: torch.device) -> None:
    """Wait for work that is queued on a GPU, so that it counts as training."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
