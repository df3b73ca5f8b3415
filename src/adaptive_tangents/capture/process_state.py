"""What a process and a thread have once, such as torch's flags: noted, set so that models run as written, and put back."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from adaptive_tangents.capture.recording import with_even_gradient
from adaptive_tangents.runtime.recursion import set_users_limit, users_limit

_Step = Callable[[], None]


def note_process(undo: list[_Step], random_numbers: tuple[Any, ...]) -> None:
    """Note how to put back what holds for the process, and random numbers to a state of ``random_state``."""
    cuda: Any = torch.backends.cuda
    functorch: Any = torch._C._functorch
    checkpoint = torch.utils.checkpoint
    attributes = [
        (checkpoint, "CheckpointFunction"), (checkpoint, "_checkpoint_without_reentrant_generator"),
        (nn.functional, "scaled_dot_product_attention"), (torch, "embedding"),
        (torch, "batch_norm"), (torch, "instance_norm"),
        (parametrize, "_cache_enabled"), (parametrize, "_cache"),
    ]  # fmt: skip
    settings: list[tuple[Callable[[Any], Any], Any]] = [
        (cuda.enable_flash_sdp, cuda.flash_sdp_enabled()),
        (cuda.enable_mem_efficient_sdp, cuda.mem_efficient_sdp_enabled()),
        (cuda.enable_math_sdp, cuda.math_sdp_enabled()),
        (cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled()),
        (torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()),
        (torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled()),
        (torch._C._set_cudnn_enabled, torch._C._get_cudnn_enabled()),
        (functorch._set_vmap_fallback_enabled, functorch._is_vmap_fallback_enabled()),
        (torch._C._set_graph_executor_optimize, torch._C._get_graph_executor_optimize()),
        (_set_matmul_precision, _matmul_precision()),
        (torch.set_default_dtype, torch.get_default_dtype()),
        (set_users_limit, users_limit()),
        (set_random_state, random_numbers),
    ]
    if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and the import takes a second
        frames = sys.modules["torch._dynamo.eval_frame"]
        settings.append((frames._set_stance, frames._stance))
    undo += [
        partial(setattr, holder, name, getattr(holder, name)) for holder, name in attributes if hasattr(holder, name)
    ]
    undo += [partial(put, value) for put, value in settings]


def note_thread(undo: list[_Step]) -> None:
    """Note how to put back what holds for the thread."""
    functorch, hooks = torch._C._functorch, torch._C._autograd
    settings: list[tuple[Callable[[Any], Any], Any]] = [
        (torch._C._set_grad_enabled, torch.is_grad_enabled()),
        (torch._C._set_multithreading_enabled, torch._C._is_multithreading_enabled()),
        (_leave_modes, _modes()),
        (_leave_transforms, functorch.get_dynamic_layer_stack_depth()),
        (_drop_saved_tensor_hooks, hooks._top_saved_tensors_default_hooks(True)),
    ]
    undo += [partial(put, value) for put, value in settings]
    if torch.is_inference_mode_enabled():
        normal = torch.inference_mode(False)
        undo.append(partial(_leave, normal))
        normal.__enter__()


def make_elementary(*, recurrent: bool) -> None:
    """Attention, recurrence and checkpointing as plain operations; a fused kernel has no forward mode or no saved inputs."""
    cuda = torch.backends.cuda
    cuda.enable_flash_sdp(False)
    cuda.enable_mem_efficient_sdp(False)
    cuda.enable_cudnn_sdp(False)
    cuda.enable_math_sdp(True)
    # In this thread, as those of a device may wait for the lock: a backward pass of a TangentModule takes it.
    torch._C._set_multithreading_enabled(False)
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_graph_executor_optimize(False)  # what TorchScript fuses has no forward mode
    if recurrent:
        torch._C._set_mkldnn_enabled(False)
        torch._C._set_cudnn_enabled(False)
    if "torch._dynamo" in sys.modules:
        torch.compiler.set_stance("force_eager")
    parametrize._cache_enabled, parametrize._cache = 0, {}
    torch.batch_norm, torch.instance_norm = map(with_even_gradient, (torch.batch_norm, torch.instance_norm))
    checkpoint: Any = torch.utils.checkpoint
    checkpoint.CheckpointFunction = _Plain
    checkpoint._checkpoint_without_reentrant_generator = _plain


class _Plain:
    """Checkpointing with reentrant backward passes, as a plain call."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *arguments: Any) -> Any:
        return function(*arguments)


def _plain(*arguments: Any, **keywords: Any) -> Iterator[None]:
    yield


def _leave(normal: torch.inference_mode) -> None:
    """Go back to inference mode now, and not when a traceback lets go of the context, after the user left the mode."""
    if not torch.is_inference_mode_enabled():
        normal.__exit__(None, None, None)


def _matmul_precision() -> str | None:
    """None where the user set precisions by ``torch.backends``; torch refuses to say then."""
    with suppress(RuntimeError):
        return torch.get_float32_matmul_precision()
    return None


def _set_matmul_precision(precision: str | None) -> None:
    if precision is not None and _matmul_precision() != precision:  # setting it may warn
        torch.set_float32_matmul_precision(precision)


def _leave_transforms(depth: int) -> None:
    """Leave transforms such as vmap that an interrupt left open."""
    functorch = torch._C._functorch
    if functorch.get_dynamic_layer_stack_depth() > depth:
        functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


def _modes() -> tuple[int, int]:
    return torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()


def _leave_modes(depths: tuple[int, int]) -> None:
    """Leave modes, such as those of torch.overrides, that an interrupt left on their stacks."""
    while torch._C._len_torch_function_stack() > depths[0]:
        torch._C._pop_torch_function_stack()
    while torch._C._len_torch_dispatch_stack() > depths[1]:
        torch._C._pop_torch_dispatch_stack(None)


def leave_dual_levels(level: int) -> None:
    """Leave forward mode where an interrupt left it open, in torch's Python part, its core, or both."""
    for there in range(max(forward_ad._current_level, level + 1), level, -1):
        with suppress(RuntimeError):  # it was left already
            torch._C._exit_dual_level(level=there)
    forward_ad._current_level = level


def _drop_saved_tensor_hooks(top: Any) -> None:
    """Remove hooks on saved tensors that an interrupt left."""
    hooks = torch._C._autograd
    while (now := hooks._top_saved_tensors_default_hooks(True)) is not None and now != top:
        hooks._pop_saved_tensors_default_hooks()


def random_state() -> tuple[Any, ...]:
    """The states of the generators that all share: torch's, NumPy's and Python's."""
    cuda: Any = torch.cuda
    on_devices = cuda.get_rng_state_all() if cuda.is_initialized() else ()
    return torch.get_rng_state(), np.random.get_state(), random.getstate(), on_devices  # noqa: NPY002


def set_random_state(state: tuple[Any, ...]) -> None:
    """Put a state of ``random_state`` back."""
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    random.setstate(state[2])
    if state[3]:
        torch.cuda.set_rng_state_all(state[3])
