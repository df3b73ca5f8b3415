"""The names in a state dict: freed of what training scripts put around them, and told where they do not fit."""

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypeGuard

from torch import Tensor, nn

from adaptive_tangents.checks import listed
from adaptive_tangents.errors import TangentError

Params = Mapping[str, Any]
"""A state dict, with or without prefixes, or a checkpoint that holds one under a key of ``NESTED``."""

NESTED = ("state_dict", "model", "model_state_dict")  # keys under which training scripts keep the state dict
WRAPPERS = ("module.", "_orig_mod.")  # prefixes that DataParallel and torch.compile put before every name
_SEGMENTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # the same, anywhere in a name
_MANY, _NEAREST, _COMPARED, _ALIKE = 6, 3, 20, 0.6


def unwrapped(content: object) -> tuple[dict[str, Tensor], str | None] | None:
    """The state dict in what a file or a script holds, and the key it was under; None if there is none."""
    if not isinstance(content, Mapping):
        return None
    if is_state(content):
        return dict(content), None
    for key in NESTED:
        inner = content.get(key)
        if is_state(inner):
            return dict(inner), key
    return None


def is_state(content: object) -> TypeGuard[Mapping[str, Tensor]]:
    """Whether it is a mapping of names to tensors, with at least one."""
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    )


def tied(model: nn.Module) -> dict[str, str]:
    """Every further name of a tensor that the model holds under several, with its first name."""
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    return {name: first[id(t)] for name, t in every if first.setdefault(id(t), name) != name}


def renamed(model: nn.Module) -> dict[str, str]:
    """Every name that the model's own ``state_dict`` gives to a tensor and the model does not, with the model's name."""
    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names = {name for name, _ in own}
    first = {id(t): name for name, t in reversed(own)}
    kept = model.state_dict(keep_vars=True)
    return {name: first[id(t)] for name, t in kept.items() if name not in names and id(t) in first}


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model's state dict, and parameters that this leaves out, by the names that the model gives them."""
    names = renamed(model)
    kept = {names.get(name, name): t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    return kept | {name: p.detach() for name, p in model.named_parameters() if name not in kept}


def fitted(call: str, params: Params, model: nn.Module, what: str = "the state dict") -> dict[str, Tensor]:
    """A state dict by the model's names: taken out of a checkpoint, a prefix dropped or added, tied tensors filled in.

    What is missing or left over stays so. Raises TangentError if there is no state dict, or if it holds two.
    """
    found = unwrapped(params)
    if found is None:
        held = f"keys {listed(map(str, params))}" if params else "nothing"
        raise TangentError(
            f"{call}: {what} holds {held}, not tensors by name, nor a state dict under {' or '.join(map(repr, NESTED))}; "
            "pass model.state_dict()"
        )
    state, others, kept = found[0], tied(model), renamed(model)
    known = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]} | set(others)
    known |= set(model.state_dict(keep_vars=True))
    needed = {name for name, _ in model.named_parameters()}
    if not set(state) <= known:
        names = _renamed(call, what, tuple(state), known, needed, others)
        state = {new: state[old] for old, new in names.items()}
    state = {kept.get(name, name): value for name, value in state.items()}
    for alias, first in others.items():
        if alias in state:
            state.setdefault(first, state[alias])
    for alias, first in others.items():
        if first in state:
            state.setdefault(alias, state[first])
    return state


def _renamed(
    call: str, what: str, names: Sequence[str], known: Collection[str], needed: AbstractSet[str], others: Mapping[str, str]
) -> dict[str, str]:  # fmt: skip
    """The old names with the new ones under which most are the model's."""
    plain = _without_wrappers(names)
    best = plain
    for candidate in _candidates(names, plain, known):
        if _count(candidate, known) > _count(best, known):
            best = candidate
    if all(new in known for new in best.values()):
        return best
    parts = {}
    for prefix in _prefixes(plain.values()):
        part = {old: new.removeprefix(prefix) for old, new in plain.items() if new.startswith(prefix)}
        if needed <= {others.get(new, new) for new in part.values()}:
            parts[prefix] = {old: new for old, new in part.items() if new in known}
    if len(parts) > 1:
        raise TangentError(
            f"{call}: {what} holds several networks of this architecture, with names that begin {listed(parts)}; "
            "keep the tensors of one of them"
        )
    return next(iter(parts.values()), best)


def _without_wrappers(names: Sequence[str]) -> dict[str, str]:
    """Names without the wrappers that all have; either may wrap the other."""
    found = {name: name for name in names}
    for wrapper in WRAPPERS * 2:
        if all(new.startswith(wrapper) for new in found.values()):
            found = {old: new.removeprefix(wrapper) for old, new in found.items()}
    return found


def _candidates(names: Sequence[str], plain: Mapping[str, str], known: Collection[str]) -> Iterable[dict[str, str]]:
    """Ways to rename all tensors alike: as they are, without wrappers, without a prefix that all share, with one more."""
    yield {name: name for name in names}
    inner = {old: ".".join(part for part in new.split(".") if part not in _SEGMENTS) for old, new in plain.items()}
    for held in (plain, inner):
        shared = held
        while True:
            yield dict(shared)
            heads = {new.partition(".")[0] if "." in new else "" for new in shared.values()}
            if len(heads) != 1 or "" in heads:
                break
            shared = {old: new.partition(".")[2] for old, new in shared.items()}
        few = list(held.values())[:_MANY]
        added = Counter(name.removesuffix(new) for new in few for name in known if name.endswith(f".{new}"))
        for prefix, _ in added.most_common(_MANY):
            yield {old: prefix + new for old, new in held.items()}


def _prefixes(names: Iterable[str]) -> list[str]:
    """Every prefix that ends in a dot, the shortest first."""
    found: set[str] = set()
    for name in names:
        parts = name.split(".")
        found |= {".".join(parts[:k]) + "." for k in range(1, len(parts))}
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _count(names: Mapping[str, str], known: Collection[str]) -> int:
    return sum(new in known for new in names.values())


def misfit(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], missing: Sequence[str], unknown: Sequence[str],
    words: str = "unknown",
) -> str | None:  # fmt: skip
    """What keeps a state dict from fitting, the nearest differences first if there are many; None if nothing does."""
    wrong = [
        f"{name} {tuple(state[name].shape)} for {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    if min(len(missing), len(unknown)) <= _MANY:
        parts = [
            f"{what} {shown_names(names)}"
            for what, names in (("missing", missing), (words, unknown), ("of another shape:", wrong))
            if names
        ]
    else:
        parts = [
            f"{len(unknown)} of its {len(state)} names are not in the network",
            f"{len(missing)} of the network's {len(wanted)} are missing",
        ]
        parts += [f"of another shape: {shown_names(wrong, _NEAREST)}"] if wrong else []
    near = _nearest(state, wanted, missing, unknown)
    if near:
        parts.append(f"the nearest are {near}")
    return "; ".join(parts) or None


def _nearest(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], missing: Sequence[str], unknown: Sequence[str]
) -> str:
    """A few pairs of a name that is left over and the missing one most like it, with their shapes."""
    pairs = []
    for name in unknown[:_COMPARED]:
        scores = {
            other: difflib.SequenceMatcher(None, name, other).ratio() + 0.5 * (state[name].shape == wanted[other].shape)
            for other in missing[: 10 * _COMPARED]
        }
        nearest = max(scores, key=lambda other: scores[other], default="")
        if scores.get(nearest, 0.0) > _ALIKE:
            pairs.append((scores[nearest], name, nearest))
    pairs.sort(key=lambda pair: -pair[0])
    return ", ".join(
        f"{shown_names([name])} {tuple(state[name].shape)} for {other} {tuple(wanted[other].shape)}"
        for _, name, other in pairs[:_NEAREST]
    )


def shown_names(names: Iterable[str], most: int = _MANY) -> str:
    """Names from a user's file, the first few; what does not print is shown as escapes."""
    words = [name if name.isprintable() else ascii(name) for name in names]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")
