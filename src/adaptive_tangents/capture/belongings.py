"""Everything that a model can reach and change: attributes, containers, arrays, generators; as it was, to put back."""

import copy
import functools
import random
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from operator import is_, methodcaller
from types import CellType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_tangents.errors import TangentError
from adaptive_tangents.runtime.recursion import deep_copy

_ATOMS = frozenset(
    {type(None), bool, int, float, complex, str, bytes, range, slice, torch.dtype, torch.device, torch.Size}
)
# Objects that hold others but belong to no model, and a model's graph or compiled code.
_FOREIGN = (
    ModuleType, weakref.ref, torch.optim.Optimizer, torch.utils.data.Dataset, torch.utils.data.DataLoader,
)  # fmt: skip
_FOREIGN_PACKAGES = frozenset(
    {
        "abc", "adaptive_tangents", "asyncio", "builtins", "concurrent", "datasets", "enum", "io", "lightning", "logging",
        "multiprocessing", "pathlib", "queue", "re", "pytorch_lightning", "socket", "subprocess", "tensorboard",
        "threading", "tokenizers", "wandb", "weakref",
    }
)  # fmt: skip
_PLAIN = (dict, OrderedDict)
_WEAK = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
_CALLABLES = (FunctionType, functools.partial, functools._lru_cache_wrapper)
_SHARED = (FunctionType, functools._lru_cache_wrapper, weakref.ref)  # by Python's deep copy
_CONTAINERS = (dict, list, tuple, set, deque, nn.Module)
_MOST = 50_000  # containers; a model that reaches more than this holds a data set or a trainer
_LONG = 20_000  # entries; a longer list is put back, but what its entries hold is not
_SMALL = 1 << 24  # bytes of an array that is copied

_slots_of: "weakref.WeakKeyDictionary[type, tuple[str, ...]]" = weakref.WeakKeyDictionary()

_Made = TypeVar("_Made")
Put = Callable[[Any], None]
"""Puts a value in one place."""


@dataclass(frozen=True)
class Belongings:
    """What some modules hold, as found: ``restore`` puts it back, and ``places`` says where a tensor is held.

    ``tensors`` are those that are neither parameters nor buffers nor made by an operation that autograd recorded;
    ``derived`` are those that were.
    """

    dicts: list[tuple[dict[Any, Any], tuple[Any, ...], tuple[Any, ...]]] = field(default_factory=list)
    lists: list[tuple[list[Any], list[Any]]] = field(default_factory=list)
    others: list[Callable[[], Any]] = field(default_factory=list)
    cells: list[tuple[CellType, Any]] = field(default_factory=list)
    defaults: list[tuple[FunctionType, tuple[Any, ...]]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    derived: list[Tensor] = field(default_factory=list)

    @functools.cached_property
    def _entries(self) -> tuple[list[dict[Any, Any]], list[int], list[Any], list[Any]]:
        """All dictionaries, their lengths, and all their keys and values."""
        return (
            [held for held, _, _ in self.dicts],
            [len(keys) for _, keys, _ in self.dicts],
            [key for _, keys, _ in self.dicts for key in keys],
            [value for _, _, values in self.dicts for value in values],
        )

    def _changed(self) -> Iterable[tuple[dict[Any, Any], tuple[Any, ...], tuple[Any, ...]]]:
        """The dictionaries, unless all are as they were: they are compared in one go, as this is done for every pass."""
        dicts, lengths, keys, values = self._entries
        same = (
            list(map(len, dicts)) == lengths
            and all(map(is_, chain.from_iterable(dicts), keys))
            and all(map(is_, chain.from_iterable(map(methodcaller("values"), dicts)), values))
        )
        return () if same else self.dicts

    def restore(self) -> None:
        """Put every entry of every container back; entries are compared by identity."""
        for held, keys, values in self._changed():
            if not held and not keys:
                continue
            if len(held) == len(keys) and all(map(is_, held.values(), values)) and tuple(held) == keys:
                continue
            for key in [key for key in held if key not in keys]:
                del held[key]
            before = dict(zip(keys, values, strict=True))
            _put(held, before)
            if tuple(held) != keys:
                for key in keys:
                    held[key] = held.pop(key)
        for entries, kept in self.lists:
            if not _same(entries, kept):
                entries[:] = kept
        for cell, value in self.cells:
            if cell.cell_contents is not value:
                cell.cell_contents = value
        for function, values in self.defaults:
            if function.__defaults__ is not values:
                function.__defaults__ = values
        for put_back in self.others:
            put_back()

    def as_noted(self) -> bool:
        """Whether all is as found; False where only putting it back would tell."""
        return (
            not self._changed()
            and all(_same(entries, kept) for entries, kept in self.lists)
            and all(cell.cell_contents is value for cell, value in self.cells)
            and all(function.__defaults__ is values for function, values in self.defaults)
            and all(isinstance(put, functools.partial) and _in_place(put) for put in self.others)
        )

    def places(self, tensors: Iterable[Tensor]) -> dict[int, list[Put]]:
        """By the id of each of some tensors: how to put something else where it is held."""
        found: dict[int, list[Put]] = {id(tensor): [] for tensor in tensors}
        for held, keys, values in self.dicts:
            for key, value in zip(keys, values, strict=True):
                if id(value) in found:
                    found[id(value)].append(functools.partial(held.__setitem__, key))
        for entries, kept in self.lists:
            for k, value in enumerate(kept):
                if id(value) in found:
                    found[id(value)].append(functools.partial(entries.__setitem__, k))
        for cell, value in self.cells:
            if id(value) in found:
                found[id(value)].append(functools.partial(setattr, cell, "cell_contents"))
        for function, values in self.defaults:
            for k, value in enumerate(values):
                if id(value) in found:
                    found[id(value)].append(functools.partial(_set_default, function, k))
        return found


def copied(call: str, model: nn.Module) -> nn.Module:
    """A deep copy of a model whose functions close over the copy; Python's own deep copy shares them with the model.

    Raises TangentError if modules or tensors are shared all the same, as those are that copy themselves another way.
    """
    with torch.enable_grad():  # a copy of what was computed from parameters is known for that
        memo: dict[int, Any] = {id(t): t.detach().requires_grad_().clone() for t in belongings(model).derived}
    made = _rewired(deep_copy(call, model, memo), memo)
    own = {key for module in model.modules() for key in _parts(module)}
    for name, module in made.named_modules():
        if not own.isdisjoint(_parts(module)):
            raise TangentError(
                f"{call}: a deep copy of {repr(name) if name else 'the model'}, of class {type(module).__name__}, shares its "
                "parameters, buffers or submodules with the original, so what is done to the copy would change your model; "
                "let __deepcopy__ of its class or of its parameters copy them, or remove it"
            )
    return made


def _parts(module: nn.Module) -> set[int]:
    """The ids of a module, of what holds its tensors and submodules, and of the tensors."""
    holders = (module._parameters, module._buffers, module._modules)
    tensors = [t for held in holders[:2] for t in held.values() if t is not None]
    return {*map(id, (module, *holders, *tensors))}


def _rewired(made: _Made, memo: dict[int, Any]) -> _Made:
    """Python's deep copy ``made`` of something, after replacing every function in it by one that holds copies."""
    there = _noted([made], set(), closures=False)
    for held, keys, values in there.dicts:
        _put(held, {key: _own_callable(value, memo) for key, value in zip(keys, values, strict=True)})
    for entries, kept in there.lists:
        entries[:] = [_own_callable(value, memo) for value in kept]
    return made


def _own_callable(value: Any, memo: dict[int, Any]) -> Any:
    """What stands in a deep copy for a function, or for something around one, which Python's deep copy shares."""
    if isinstance(value, functools.partial):  # itself and its arguments are copies already
        return functools.partial(_own_callable(value.func, memo), *value.args, **value.keywords)
    if isinstance(value, tuple) and any(isinstance(part, _CALLABLES) for part in value):
        own = [_own_callable(part, memo) for part in value]
        return type(value)(*own) if hasattr(value, "_fields") else tuple(own)
    return _copy_of(value, memo) if isinstance(value, _SHARED) else value


def _copy_of(value: Any, memo: dict[int, Any]) -> Any:
    """The copy of what a function holds; what belongs to no model is shared, as by Python's own deep copy."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, weakref.ref):
        return weakref.ref(memo[id(value())]) if id(value()) in memo else value
    if isinstance(value, functools.partial):
        given = [_copy_of(part, memo) for part in value.args]
        return functools.partial(_copy_of(value.func, memo), *given, **_copies(value.keywords, memo))
    if isinstance(value, functools._lru_cache_wrapper):
        return functools.lru_cache(**value.cache_parameters())(_copy_of(value.__wrapped__, memo))
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _copy_of(value.__self__, memo))
    if isinstance(value, FunctionType):
        return _copy_of_function(value, memo)
    if isinstance(value, _CONTAINERS):
        return _rewired(copy.deepcopy(value, memo), memo)
    if isinstance(value, (CellType, type, *_FOREIGN)) or _is_foreign(type(value)) or not hasattr(value, "__dict__"):
        return value
    try:
        return _rewired(copy.deepcopy(value, memo), memo)
    except Exception:  # an object that cannot be copied holds more than parts of the model
        return value


def _copy_of_function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    if not (function.__closure__ or function.__defaults__ or function.__kwdefaults__ or function.__dict__):
        return function
    cells = tuple(CellType() for _ in function.__closure__ or ())
    made = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    memo[id(function)] = made  # before what it holds, which may be the function itself
    for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
        setattr(made, name, getattr(function, name))
    made.__defaults__ = function.__defaults__ and tuple(_copy_of(given, memo) for given in function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__ and _copies(function.__kwdefaults__, memo)
    made.__dict__.update(_copies(function.__dict__, memo))
    for cell, own in zip(function.__closure__ or (), cells, strict=True):
        if (held := _contents(cell)) is not cell:
            own.cell_contents = _copy_of(held, memo)
    return made


def _copies(values: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    return {name: _copy_of(value, memo) for name, value in values.items()}


def belongings(model: nn.Module) -> Belongings:
    """What a model and its classes hold, found by following attributes, containers and what functions hold."""
    modules = list(model.modules())
    own = {
        id(tensor) for module in modules for held in (module._parameters, module._buffers) for tensor in held.values()
    }
    return _noted([model, *classes(modules)], own, closures=True)


def classes(modules: Iterable[nn.Module]) -> set[type]:
    """The classes of modules, and those that they are made from, except those of torch and the like."""
    kinds = {type(module) for module in modules}
    return {base for kind in kinds for base in kind.__mro__ if not _is_foreign(base)}


def _noted(stack: list[Any], own: set[int], *, closures: bool) -> Belongings:
    """What some objects hold; ``own`` are the ids of parameters and buffers."""
    found, seen = Belongings(), dict[int, Any]()  # held, so that no other object gets the id of one that is gone
    while stack and len(seen) < _MOST:
        value = stack.pop()
        if type(value) in _ATOMS or id(value) in seen or (isinstance(value, FunctionType) and not closures):
            continue
        seen[id(value)] = value
        if type(value) is OrderedDict and not value:  # half of what a module holds
            found.dicts.append((value, (), ()))
            continue
        stack += _kept(value, found, own)
    return found


def _kept(value: Any, found: Belongings, own: set[int]) -> Iterable[Any]:
    """Note a value as it is, and return what it holds."""
    if type(value) in _PLAIN:  # most of what a model holds
        return _kept_dict(value, found)
    if isinstance(value, Tensor):
        if value.requires_grad and not value.is_leaf:
            found.derived.append(value)
        elif id(value) not in own:
            found.tensors.append(value)
        return (vars(value),)
    if isinstance(value, dict):
        return _kept_dict(value, found)
    if isinstance(value, list):
        found.lists.append((value, list(value)))
        return value if len(value) < _LONG else ()
    if isinstance(value, tuple | frozenset):
        return value if len(value) < _LONG else ()
    if isinstance(value, MappingProxyType):
        return list(value.values())
    if isinstance(value, _WEAK):
        entries = dict(value)
        found.others.append(functools.partial(_refill_weak, value, entries))
        return list(entries.values())
    if isinstance(value, deque | set | bytearray):
        found.others.append(functools.partial(_refill, value, list(value)))
        return list(value) if not isinstance(value, bytearray) and len(value) < _LONG else ()
    if isinstance(value, np.ndarray):
        if value.nbytes <= _SMALL and value.flags.writeable:
            found.others.append(functools.partial(np.copyto, value, value.copy()))
        return ()
    if isinstance(value, torch.Generator):
        found.others.append(functools.partial(value.set_state, value.get_state()))
        return ()
    if isinstance(value, random.Random):
        found.others.append(functools.partial(value.setstate, value.getstate()))
        return ()
    if isinstance(value, np.random.RandomState):
        found.others.append(functools.partial(value.set_state, value.get_state()))
        return ()
    if isinstance(value, np.random.Generator):
        found.others.append(functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        return ()
    return _held(value, found)


def _kept_dict(value: dict[Any, Any], found: Belongings) -> Iterable[Any]:
    keys, values = tuple(value), tuple(value.values())
    found.dicts.append((value, keys, values))
    if len(values) >= _LONG:
        return ()
    return values if type(next(iter(keys), "")) is str else (*keys, *values)


def _held(value: Any, found: Belongings) -> Iterable[Any]:
    """What a function, a class or another object holds."""
    if isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            if (held := _contents(cell)) is not cell:
                found.cells.append((cell, held))
        if value.__defaults__:
            found.defaults.append((value, value.__defaults__))
        return (
            *(_contents(cell) for cell in value.__closure__ or ()),
            value.__dict__,
            value.__defaults__,
            value.__kwdefaults__,
        )
    if isinstance(value, torch.jit.ScriptModule):
        found.dicts.append((vars(value), tuple(vars(value)), tuple(vars(value).values())))
        return (vars(value).get("_actual_script_module"),)
    if isinstance(value, type):
        if _is_foreign(value):
            return ()
        entries = {k: v for k, v in vars(value).items() if not k.startswith("__")}
        found.others.append(functools.partial(_restore_class, value, entries, tuple(vars(value).values())))
        return [
            type(value),
            *(held for held in entries.values() if isinstance(held, Tensor | dict | list | deque | set)),
        ]
    foreign = _is_foreign(type(value)) and not isinstance(value, nn.Module)  # a traced graph is a model of torch.fx
    if isinstance(value, (CellType, *_FOREIGN)) or foreign:
        return ()
    if isinstance(value, MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, functools._lru_cache_wrapper):
        return (value.__wrapped__,)
    slots = [name for name in _all_slots(type(value)) if hasattr(value, name)]
    held = [getattr(value, name) for name in slots]
    for name, there in zip(slots, held, strict=True):
        found.others.append(functools.partial(_set_slot, value, name, there))
    attributes = getattr(value, "__dict__", None)
    made_from = () if isinstance(value, nn.Module) else type(value).__mro__  # classes of modules are noted already
    return (*held, *made_from, attributes) if type(attributes) is dict else (*held, *made_from)


def _is_foreign(kind: type) -> bool:
    package, _, rest = str(kind.__module__).partition(".")
    return package in _FOREIGN_PACKAGES or (package == "torch" and not rest.startswith(("nn.utils", "distributions")))


def _set_default(function: FunctionType, k: int, value: Any) -> None:
    values = function.__defaults__ or ()
    function.__defaults__ = (*values[:k], value, *values[k + 1 :])


def _restore_class(kind: type, entries: dict[str, Any], whole: tuple[Any, ...]) -> None:
    if _same(vars(kind).values(), whole):
        return
    for name in [name for name in vars(kind) if name not in entries and not name.startswith("__")]:
        delattr(kind, name)
    for name, held in entries.items():
        if vars(kind).get(name) is not held:
            setattr(kind, name, held)


def _slots(kind: type) -> Iterable[str]:
    slots = kind.__dict__.get("__slots__", ()) if kind.__module__ not in ("builtins", "typing") else ()
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return (name for name in names if name not in ("__dict__", "__weakref__"))


def _all_slots(kind: type) -> tuple[str, ...]:
    names = _slots_of.get(kind)
    if names is None:
        names = _slots_of[kind] = tuple(name for base in kind.__mro__ for name in _slots(base))
    return names


def _contents(cell: CellType) -> Any:
    """What a closure's cell holds; the cell itself if it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def _set_slot(value: Any, name: str, there: Any) -> None:
    if getattr(value, name, None) is not there:
        object.__setattr__(value, name, there)


def _put(held: dict[Any, Any], entries: dict[Any, Any]) -> None:
    # A subclass may have an update of its own, as Counter's, which adds.
    (OrderedDict if isinstance(held, OrderedDict) else dict).update(held, entries)


def _same(held: Any, kept: Any) -> bool:
    return len(held) == len(kept) and all(map(is_, held, kept))


def _in_place(put: "functools.partial[None]") -> bool:
    """Whether what a step puts back is there."""
    if put.func is _refill:
        return _same(*put.args)
    if put.func is _set_slot:
        value, name, there = put.args
        return getattr(value, name, None) is there
    return put.func is _restore_class and _same(vars(put.args[0]).values(), put.args[2])


def _refill_weak(held: Any, kept: dict[Any, Any]) -> None:
    if dict(held) != kept:
        held.clear()
        held.update(kept)


def _refill(held: Any, kept: list[Any]) -> None:
    if _same(held, kept):
        return
    held.clear()
    held.extend(kept) if not isinstance(held, set) else held.update(kept)
