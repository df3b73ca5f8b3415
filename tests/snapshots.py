"""What a call could leave behind: everything reachable from a model or a batch, and what the process shares."""

import contextlib
import functools
import random
import signal
import sys
import types
import warnings
from collections.abc import Iterator, Mapping, Set
from typing import Any

import beartype
import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
CODE = (type, types.ModuleType, types.BuiltinFunctionType, types.MethodWrapperType, property)


def raw(tensor: Tensor) -> Any:
    """The values as bytes."""
    with torch.no_grad():
        plain = tensor.detach()
        if plain.is_nested:
            plain = plain.values()
        return plain.clone().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


class Snapshot:
    """Identities and values by path. It keeps what it saw alive, so that an identity is not given to something new."""

    def __init__(self, *roots: Any) -> None:
        self.found: dict[str, Any] = {}
        self._kept: dict[int, Any] = {}
        for k, root in enumerate(roots):
            self._walk(f"{k}", root)

    def changes(self, later: "Snapshot") -> list[str]:
        """Paths at which another snapshot differs."""
        paths = {**self.found, **later.found}
        return [path for path in paths if self.found.get(path, "absent") != later.found.get(path, "absent")]

    def _walk(self, path: str, thing: Any) -> None:
        if isinstance(thing, ATOMS):
            self.found[path] = repr(thing)
            return
        self.found[path] = (type(thing).__name__, id(thing))
        if id(thing) in self._kept or isinstance(thing, CODE):
            return
        self._kept[id(thing)] = thing
        if isinstance(thing, Tensor):
            self._tensor(path, thing)
        elif isinstance(thing, torch.Generator):
            self.found[f"{path}/state"] = raw(thing.get_state())
        elif isinstance(thing, np.random.Generator):
            self.found[f"{path}/state"] = str(thing.bit_generator.state)
        elif isinstance(thing, np.random.RandomState):
            self.found[f"{path}/state"] = str(thing.get_state())
        elif isinstance(thing, np.ndarray):
            self.found[f"{path}/values"] = thing.tobytes()
        elif isinstance(thing, Mapping):
            self.found[f"{path}/keys"] = [k if isinstance(k, ATOMS) else id(k) for k in thing]
            for k, value in list(thing.items()):
                self._walk(f"{path}[{k if isinstance(k, ATOMS) else id(k)}]", value)
                self._walk(f"{path}/key{id(k)}", k)
                self.found.pop(f"{path}/key{id(k)}")
        elif isinstance(thing, Set):
            self.found[f"{path}/members"] = sorted(repr(m) if isinstance(m, ATOMS) else str(id(m)) for m in thing)
            for member in thing:
                if not isinstance(member, ATOMS):
                    self._walk(f"{path}/member{id(member)}", member)
        elif isinstance(thing, types.MethodType):
            self.found[path] = (id(thing.__func__), id(thing.__self__))
            self._walk(f"{path}/self", thing.__self__)
        elif isinstance(thing, types.FunctionType):
            for k, cell in enumerate(thing.__closure__ or ()):
                with contextlib.suppress(ValueError):  # an empty cell
                    self._walk(f"{path}/cell{k}", cell.cell_contents)
            self._walk(f"{path}/defaults", list(thing.__defaults__ or ()) + list((thing.__kwdefaults__ or {}).values()))
            self.found.pop(f"{path}/defaults")
            self._walk(f"{path}/dict", thing.__dict__)
        elif isinstance(thing, functools.partial):
            for name, part in (("func", thing.func), ("args", thing.args), ("keywords", thing.keywords)):
                self._walk(f"{path}/{name}", part)
            self.found.pop(f"{path}/args"), self.found.pop(f"{path}/keywords")
        else:
            self._object(path, thing)

    def _tensor(self, path: str, tensor: Tensor) -> None:
        grad = tensor.grad if tensor.is_leaf else None
        held = None if tensor.is_inference() else tensor._version
        self.found[f"{path}/flags"] = (tensor.requires_grad, tensor.is_leaf, tensor.dtype, tuple(tensor.shape), held)
        self.found[f"{path}/hooks"] = [(k, id(hook)) for k, hook in (tensor._backward_hooks or {}).items()]
        self.found[f"{path}/values"] = raw(tensor)
        if not tensor.is_nested:
            self.found[f"{path}/place"] = tensor.data_ptr()
        self._walk(f"{path}/grad", grad)
        for name, value in vars(tensor).items():
            self._walk(f"{path}.{name}", value)

    def _object(self, path: str, thing: Any) -> None:
        if isinstance(thing, list | tuple) or hasattr(thing, "popleft"):
            for k, value in enumerate(list(thing)):
                self._walk(f"{path}[{k}]", value)
        if isinstance(thing, nn.Module):
            shared = {k: v for k, v in vars(type(thing)).items() if isinstance(v, list | set | Mapping)}
            for name, value in shared.items():
                if not name.startswith("__"):
                    self._walk(f"{path}.{type(thing).__name__}.{name}", value)
        for kind in (*type(thing).__mro__, type(type(thing))):
            if kind.__module__.startswith("hostile"):
                held = {name: repr(value) for name, value in vars(kind).items() if isinstance(value, ATOMS)}
                self.found[f"{path}/{kind.__name__}"] = held
        attributes = dict(getattr(thing, "__dict__", {}))
        for kind in type(thing).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            for name in [slots] if isinstance(slots, str) else slots:
                with contextlib.suppress(AttributeError):
                    attributes.setdefault(name, getattr(thing, name))
        self.found[f"{path}/attributes"] = list(attributes)
        for name, value in attributes.items():
            if not name.startswith("__"):
                self._walk(f"{path}.{name}", value)


WATCHED = (torch, torch.Tensor, torch.nn.functional, torch.utils.checkpoint, nn.Module, nn.modules.module)
DRAWING = ("seed", "getstate", "setstate", "random", "gauss", "uniform", "randint", "choice", "shuffle", "getrandbits")


def shared_state() -> dict[str, Any]:
    """What one process has once: flags, random states, patched functions, handlers."""
    cuda, tensors_kept = torch.backends.cuda, torch._C._autograd
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    found: dict[str, Any] = {
        "flags": (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic, torch.backends.mha.get_fastpath_enabled(),
            torch.backends.opt_einsum.enabled, torch.get_float32_matmul_precision()),
        "attention": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled()),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled(),
            torch.is_autocast_enabled("cpu"), torch.are_deterministic_algorithms_enabled()),
        "defaults": (torch.get_default_dtype(), str(torch.get_default_device()), torch.get_num_threads()),
        "saved": tensors_kept._saved_tensors_hooks_is_enabled(),
        "process": (sys.getrecursionlimit(), [signal.getsignal(k) for k in signal.valid_signals()], list(warnings.filters)),
        "torch's draws": torch.get_rng_state().numpy().tobytes(),
        "numpy's draws": (kind, keys.tobytes(), *rest),
        "Python's draws": random.getstate(),
    }  # fmt: skip
    for place in WATCHED:
        kept = {k: value for k, value in vars(place).items() if not (isinstance(value, ATOMS) or k.startswith("__"))}
        found[f"of {place.__name__}"] = {name: id(value) for name, value in kept.items()}
    hooks = {name: list(value) for name, value in vars(nn.modules.module).items() if name.startswith("_global")
        and isinstance(value, dict)}  # fmt: skip
    return {**found, "hooks of all modules": hooks}


@beartype.beartype
def _one_check(x: list[int]) -> None:
    """With its first check, beartype takes a function of ``random``: before one of those below stands in for it."""


@contextlib.contextmanager
def python_draws_of_its_own() -> Iterator[None]:
    """Give ``random`` a generator that the run-time type checks of the tests do not draw from."""
    own = random.Random(0)
    with pytest.MonkeyPatch.context() as patch:
        for name in DRAWING:
            patch.setattr(random, name, getattr(own, name))
        yield


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Undo what a model itself does to shared state."""
    flags = (torch.backends.mkldnn.enabled, torch.get_float32_matmul_precision(), sys.getrecursionlimit(),
        torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype())  # fmt: skip
    cuda = torch.backends.cuda
    attention = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled())
    drawn, mode = np.random.get_state(), torch.is_grad_enabled()  # noqa: NPY002
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        with torch.random.fork_rng(devices=[]), python_draws_of_its_own(), warnings.catch_warnings():
            yield
    finally:
        torch.backends.mkldnn.enabled = flags[0]
        torch.set_float32_matmul_precision(flags[1])
        sys.setrecursionlimit(flags[2])
        torch.use_deterministic_algorithms(flags[3])
        torch.set_default_dtype(flags[4])
        for switch, on in zip((cuda.enable_flash_sdp, cuda.enable_mem_efficient_sdp, cuda.enable_math_sdp), attention,
            strict=True):  # fmt: skip
            switch(on)
        torch.backends.mha.set_fastpath_enabled(fast)
        np.random.set_state(drawn)  # noqa: NPY002
        torch.set_grad_enabled(mode)
