"""A model on loan: run at other parameters for a while, and then given back as it was, whatever happens meanwhile.

The model's own parameters are what autograd differentiates by. During the loan each points at a copy of its values. So
whatever holds a parameter uses the right one (a closure, a list, a traced function, a backward pass that runs a module
again), and what the model writes never reaches the user's memory.

Some changes hold for the whole process, such as attention in elementary operations. One lock, which a thread may take
again, covers all loans, and each loan puts back what it found.
"""

import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import _lru_cache_wrapper, cached_property, partial
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad

from adaptive_tangents.capture.belongings import Belongings, Put, belongings, classes
from adaptive_tangents.capture.process_state import (
    leave_dual_levels,
    make_elementary,
    note_process,
    note_thread,
    random_state,
    set_random_state,
)
from adaptive_tangents.runtime.cleanup import ensured

LOCK = threading.RLock()
"""Held while a model is on loan, and while what a model holds is read."""

_TRIES = 5  # of a step that fails; then the others go on, lest the loan never end
_LATER = 1_000_000  # writes that no user has made to a parameter
_LARGE = 1 << 28  # bytes of a plain tensor above which it is not copied for every pass
_Made = TypeVar("_Made")
_Step = Callable[[], None]
_loans: list["Loan"] = []


class _Notes:
    """A model as it is: its tensors by name, where its parameters are, what passes must not see, and all that it holds."""

    def __init__(self, model: nn.Module) -> None:
        paths = dict(model.named_modules(remove_duplicate=False))
        self.homes = {name: module for name, module, _ in _entries(paths, "_buffers")}
        self.buffers = {name: tensor for name, _, tensor in _entries(paths, "_buffers")}
        self.tensors = {name: tensor for name, _, tensor in _entries(paths, "_parameters")} | self.buffers
        self.without_versions = {name for name, tensor in self.tensors.items() if tensor.is_inference()}
        self.own = list({id(tensor): tensor for tensor in self.tensors.values()}.values())
        self.recurrent = any(isinstance(module, nn.RNNBase) for module in paths.values())
        self.held = belongings(model)
        modules = list(dict.fromkeys(paths.values()))
        once = {
            kind: frozenset(name for name, value in vars(kind).items() if isinstance(value, cached_property))
            for kind in {base for kind in map(type, modules) for base in kind.__mro__}
        }
        self.overrides = [step for kind in classes(modules) for step in _unmemoized(kind)]
        self.slots: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter | None, str]] = []
        first = {id(module): path for path, module in reversed(paths.items())}
        for module in modules:
            self.overrides += _overrides(module, frozenset().union(*(once[kind] for kind in type(module).__mro__)))
            if not isinstance(module, torch.jit.ScriptModule):
                prefix = first[id(module)] and first[id(module)] + "."
                self.slots += [(module._parameters, key, p, prefix + key) for key, p in module._parameters.items()]

    @cached_property
    def places(self) -> dict[int, list[Put]]:
        """Where each tensor is held, by its id."""
        return self.held.places(self.own)


def _entries(modules: Mapping[str, nn.Module], kind: str) -> Iterable[tuple[str, nn.Module, Tensor]]:
    """The name of each parameter or buffer, the module that holds it, and itself."""
    for path, module in modules.items():
        for key, tensor in getattr(module, kind).items():
            if tensor is not None:
                yield f"{path}.{key}" if path else key, module, tensor


class _Kept:
    """The notes of a private model; part of it, so that they go with it, but not of copies."""

    def __init__(self) -> None:
        self._notes: _Notes | None = None

    def notes(self, model: nn.Module) -> _Notes:
        """The notes of before, unless something has changed."""
        if self._notes is None or not self._notes.held.as_noted():
            self._notes = _Notes(model)
        return self._notes

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Kept":
        return _Kept()

    def __reduce__(self) -> tuple[type["_Kept"], tuple[()]]:
        return _Kept, ()


def keep_private(model: nn.Module) -> None:
    """Keep notes of a model with it, for a copy that is the library's own: few of its loans find changes."""
    vars(model)["_kept"] = _Kept()


def current(model: nn.Module) -> "Loan | None":
    """The loan of a model that is in progress, if there is one."""
    return next((loan for loan in reversed(_loans) if loan.model is model), None)


def on_loan(model: nn.Module, body: Callable[["Loan"], _Made]) -> _Made:
    """``body(loan)``, with the model and the process as they were afterwards; a loan of the model in progress goes on."""
    with LOCK:
        there = current(model)
        if there is not None:
            return body(there)
        loan = Loan(model)

        def lent() -> _Made:
            loan.begin()
            made = body(loan)
            loan.completed = True
            return made

        return ensured(lent, loan.end)


def _in_child() -> None:
    """A process forked while another thread had models on loan has them as they were, and the lock."""
    if not LOCK._is_owned():  # type: ignore[attr-defined]
        for loan in reversed(list(_loans)):
            loan.end()
        LOCK._at_fork_reinit()  # type: ignore[attr-defined]


os.register_at_fork(after_in_child=_in_child)


class Loan:
    """A model during a loan: ``put`` brings tensors in force, the rest is about noting and putting back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._thread = threading.get_ident()
        self._undo: list[_Step] = []
        self._undo_in_thread: list[_Step] = []
        self._held = Belongings()
        self._random = random_state()
        self._copied: list[tuple[Tensor, Tensor]] = []
        self._aliases: list[tuple[Tensor, Tensor, int | torch.SymInt]] = []
        self._versions: dict[str, int] = {}
        self._counted: dict[str, int] = {}
        self._at: dict[str, int] = {}
        self.instead: Mapping[str, Tensor] = {}
        self._failures: Counter[int] = Counter()
        self._ended = False
        self._level = forward_ad._current_level
        self.completed = False

    def begin(self) -> None:
        """Note everything, and set the process so that models run as written, in operations that autograd records."""
        _loans.append(self)
        note_process(self._undo, self._random)
        note_thread(self._undo_in_thread)
        kept = vars(self.model).get("_kept")
        self._notes = kept.notes(self.model) if isinstance(kept, _Kept) else _Notes(self.model)
        self._undo += [_tensor_undo(tensor) for tensor in self._notes.own]
        self._held = self._notes.held
        make_elementary(recurrent=self._notes.recurrent)
        owners = {tensor.data_ptr(): tensor for tensor in self._notes.own if _has_storage(tensor)}
        for tensor in filter(_has_storage, self._held.tensors):
            self._undo.append(_tensor_undo(tensor))
            start = tensor.untyped_storage().data_ptr()
            if start in owners:
                self._aliases.append((tensor, owners[start], tensor.storage_offset()))
            elif tensor.nbytes < _LARGE:
                self._copied.append((tensor, tensor.data))
        self._versions = {
            name: _version(tensor) + (0 if name in self._notes.buffers else _LATER)
            for name, tensor in self.tensors.items()
        }
        for tensor in self._notes.own:
            tensor._backward_hooks = None  # a hook on a gradient is no part of the function
            tensor.grad = None

    def end(self) -> None:
        """Put everything back; may be called again."""
        if self._ended:
            return
        self._held.restore()
        if not self.completed:
            leave_dual_levels(self._level)
        own = self._undo_in_thread if self._thread == threading.get_ident() else ()
        for step in (*reversed(self._undo), *reversed(own)):
            if self._failures[id(step)] < _TRIES:
                self._failures[id(step)] += 1  # until it is done, as an interrupt may come meanwhile
                step()
                self._failures[id(step)] = 0
        if self in _loans:
            _loans.remove(self)
        self._ended = True

    def put(self, values: Mapping[str, Tensor], instead: Mapping[str, Tensor]) -> None:
        """Bring tensors in force, by name, in a model as it was at the beginning.

        A parameter points at its value of ``values``, a buffer at a copy. A tensor of ``instead`` takes its place wherever
        it is held, for what a parameter cannot be: a tensor with a history, one inside a transform, a dual number.
        """
        self.instead = instead
        self._held.restore()
        set_random_state(self._random)
        for override in self._notes.overrides:
            override()
        with torch._C._DisableFuncTorch():  # a copy made inside a transform is no plain tensor
            for tensor, value in self._copied:
                tensor.data = value.clone()
            for name, value in values.items():
                own = self.tensors[name]
                if name not in self._notes.buffers:
                    own.data = _as_held(value, own)
                elif instead.get(name, own) is own:
                    own.data = _as_held(value, own).clone()
            for tensor, owner, offset in self._aliases:
                with suppress(RuntimeError):
                    tensor.data = owner.data.as_strided(tensor.shape, tensor.stride(), offset)
        # Other versions than outside of the loan: what was computed from a parameter there is stale.
        for name in values:
            _set_version(self.tensors[name], self._versions[name])
        self._counted = {name: _version(self.tensors[name]) for name in values}
        self._at = {name: self.tensors[name].data_ptr() for name in values if _has_storage(self.tensors[name])}
        for name, value in instead.items():
            own = self.tensors[name]
            if value is not own:
                for put in self._held_by(own):
                    put(_as_held(value, own))

    def written(self, names: Iterable[str]) -> str | None:
        """One of some parameters that was written to in place, made to point elsewhere, or replaced since ``put``."""
        replaced = {id(self.tensors[name]) for name, value in self.instead.items() if value is not self.tensors[name]}
        for held, key, p, name in self._notes.slots:
            if held.get(key) is not p and id(p) not in replaced:
                return name
        for name in names:
            own = self.tensors[name]
            if name in self.without_versions:
                continue
            if _version(own) != self._counted[name] or (name in self._at and own.data_ptr() != self._at[name]):
                return name
        return None

    def hidden(self, names: Iterable[str]) -> None:
        """Make parameters of tensors that the model holds as buffers, for a model that asks for its parameters."""
        for name in dict.fromkeys(names):
            if name in self._notes.buffers:
                module, last = self._notes.homes[name], name.rpartition(".")[2]
                if last in module._buffers:
                    module._parameters[last] = module._buffers.pop(last)  # type: ignore[assignment]

    def _held_by(self, own: Tensor) -> list[Put]:
        return self._notes.places[id(own)]

    @property
    def accumulated(self) -> bool:
        """Whether a backward pass added to the gradient of a parameter."""
        return any(tensor.is_leaf and tensor.grad is not None for tensor in self._notes.own)

    @property
    def derived(self) -> list[Tensor]:
        """Tensors the model holds that were computed from others before the loan."""
        return self._held.derived

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The model's parameters and buffers by all their names."""
        return self._notes.tensors

    @property
    def without_versions(self) -> set[str]:
        """The names of tensors made in inference mode, whose writes are not counted."""
        return self._notes.without_versions


def _as_held(value: Tensor, own: Tensor) -> Tensor:
    """Real pairs as the complex tensor that the model holds."""
    return torch.view_as_complex(value) if own.is_complex() and not value.is_complex() else value


def _has_storage(tensor: Tensor) -> bool:
    """Whether a tensor is a plain one; those that a transform such as vmap left behind are none."""
    return (
        type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        and tensor.layout == torch.strided
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _tensor_undo(tensor: Tensor) -> _Step:
    """Puts back where a tensor's values are, its gradient and its hooks."""
    data, needs, hooks, version = tensor.data, tensor.requires_grad, tensor._backward_hooks, _version(tensor)
    gradient = tensor.grad if tensor.is_leaf else None

    def undo() -> None:
        tensor.data = data
        if tensor.is_leaf:
            tensor.grad = gradient
            if tensor.requires_grad != needs:
                tensor.requires_grad_(needs)
        if tensor._backward_hooks is not hooks:
            tensor._backward_hooks = hooks
        _set_version(tensor, version)

    return undo


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _set_version(tensor: Tensor, version: int) -> None:
    if not tensor.is_inference():
        torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))


def _overrides(module: nn.Module, once: frozenset[str]) -> list[_Step]:
    """Steps that hide what a module keeps for training or from earlier calls: backward hooks, values computed ``once``."""
    held = vars(module)
    steps: list[_Step] = [
        partial(_without_hooks, held, name) for name in ("_backward_hooks", "_backward_pre_hooks") if held.get(name)
    ]
    steps += [partial(held.pop, name, None) for name in once & held.keys()]
    cached = {name: value for name, value in held.items() if isinstance(value, _lru_cache_wrapper)}
    return steps + [partial(held.__setitem__, name, value.__wrapped__) for name, value in cached.items()]


def _without_hooks(held: dict[str, Any], name: str) -> None:
    held[name] = OrderedDict()


def _unmemoized(kind: type) -> list[_Step]:
    """Steps that replace the cached methods of a class by plain ones; they are put back with all that a class holds."""
    cached = {name: value for name, value in vars(kind).items() if isinstance(value, _lru_cache_wrapper)}
    return [partial(setattr, kind, name, value.__wrapped__) for name, value in cached.items()]
