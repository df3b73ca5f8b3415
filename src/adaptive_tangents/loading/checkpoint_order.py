"""The order of checkpoints along training: by the steps stored in them, else by the numbers and words of their names.

A step stored in the file counts most, then one in the ``trainer_state.json`` beside it, then numbers in names, compared as
numbers. Words such as "init" and "final" place files that have no number. What contradicts itself is refused.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from adaptive_tangents.checks import listed
from adaptive_tangents.errors import TangentError

Place = tuple[float, ...]

_STEPS = (
    "globalstep", "step", "steps", "currentstep", "trainstep", "iteration", "iterations", "iter", "iters", "niter",
    "numupdates", "update", "updates",
)  # fmt: skip
_EPOCHS = ("epoch", "epochs", "currentepoch")
_BOXES = ("trainer", "meta", "metadata", "state", "trainstate", "trainingstate", "progress", "info", "extrastate")
_OPTIMIZERS = ("optimizer", "optimizerstatedict", "optimizerstates", "optim", "opt")
_WORDS = {
    "first": {"init", "initial", "initialized", "initialization", "start", "begin", "beginning", "first", "before",
              "untrained", "pretrained", "scratch", "base"},
    "last": {"end", "final", "last", "latest", "after", "trained", "finetuned", "finished", "done", "converged"},
    "best": {"best"},
}  # fmt: skip
_TAGS = (r"global[-_ ]?step|steps?", r"iterations?|iters?|it|updates?|batch", r"checkpoint|ckpt", r"epochs?|ep|e")
_TRAINER = "trainer_state.json"
_ASK = "give --start and --end, or names with the step, such as step_100.pt"


@dataclass(frozen=True)
class Order:
    """Checkpoints in order of training, the place of each in words, what the order goes by, and what speaks against it."""

    paths: tuple[Path, ...]
    places: tuple[str, ...]
    basis: str
    doubts: tuple[str, ...] = ()


def ordered(paths: Sequence[Path], call: str = "inspect") -> Order:
    """Checkpoints in order of training. Raises TangentError where what is known leaves it open, or contradicts itself.

    >>> [str(path) for path in ordered([Path("end.pt"), Path("step_10.pt"), Path("step_9.pt"), Path("init.pt")]).paths]
    ['init.pt', 'step_9.pt', 'step_10.pt', 'end.pt']
    """
    found = _sources(paths)
    words = _worded(paths)
    plain = [path for path in paths if path not in words]
    for basis, numbers in found.items():
        known = {path: numbers[path] for path in paths if path in numbers}
        alike = len(set(known.values())) < min(2, len(known))
        if not known or alike or any(path not in known for path in plain):
            continue
        return _by_numbers(call, basis, paths, known, words, found)
    if words and len(plain) <= 1:
        return _by_numbers(call, "the words in their names", paths, {}, words, found)
    if words or any(found.values()):
        lost = [path for path in plain if not any(path in numbers for numbers in found.values())] or plain
        raise TangentError(
            f"{call}: nothing says where {listed(map(str, lost))} {'comes' if len(lost) == 1 else 'come'} in training: there "
            f"is no step in the file, and no number or word in the name that the others share; {_ASK}"
        )
    doubt = f"nothing but the alphabet gives the order of {listed(map(str, paths))}; if it is wrong, {_ASK}"
    return Order(tuple(sorted(paths, key=str)), ("",) * len(paths), "the alphabet", (doubt,))


def doubted(doubt: str) -> str:
    """The sentence of the page for what speaks against an order."""
    return f"The order of the checkpoints is in doubt: {doubt}."


def swapped(start: Path, end: Path) -> str | None:
    """A sentence if the files themselves say that the end comes before the start."""
    for basis, numbers in _sources((start, end)).items():
        if start in numbers and end in numbers and numbers[start] != numbers[end]:
            if numbers[start] < numbers[end]:
                return None
            return (
                f"{start} comes after {end} by {basis} ({_told(numbers[start])} and {_told(numbers[end])}); if --start and "
                "--end are swapped, the report says the opposite of what happened"
            )
    return None


def _by_numbers(
    call: str, basis: str, paths: Sequence[Path], known: Mapping[Path, Place], words: Mapping[Path, str],
    found: Mapping[str, Mapping[Path, Place]],
) -> Order:  # fmt: skip
    """The order by numbers, with words for files that have none."""
    for word, side in (("first", "before"), ("last", "after")):
        named = [path for path in paths if words.get(path) == word and path not in known]
        if len(named) > 1:
            raise TangentError(f"{call}: {listed(map(str, named))} all say that they come {side} the others; {_ASK}")
    for path, word in words.items():
        if word == "best" and path not in known and (len(known) > 0 or "last" in words.values()):
            raise TangentError(
                f"{call}: {path} holds no step, and the best checkpoint may come anywhere; leave it out, or {_ASK}"
            )

    def place(path: Path) -> tuple[int, Place, int, str]:
        rank = {"first": -1, "last": 1, "best": 1}.get(words.get(path, ""), 0)
        return (0 if path in known else rank, known.get(path, ()), rank, str(path))

    order = sorted(paths, key=place)
    for path in known:
        word = words.get(path, "")
        others = [other for other in known if known[other] != known[path]]
        early = [other for other in others if known[other] < known[path]]
        wrong = (
            early if word == "first" else [other for other in others if other not in early] if word == "last" else []
        )
        if wrong:
            raise TangentError(
                f"{call}: by its name {path} is the {word} checkpoint, but by {basis} it is at {_told(known[path])} and "
                f"{wrong[0]} at {_told(known[wrong[0]])}; leave one out, or {_ASK}"
            )
    doubts = []
    for other, numbers in found.items():
        pairs = [(a, b) for a, b in pairwise(order) if a in numbers and b in numbers]
        against = [(a, b) for a, b in pairs if numbers[a] > numbers[b]]
        if other != basis and against:
            a, b = against[0]
            doubts.append(f"by {other}, {b} comes before {a}; the order goes by {basis}")
    places = tuple(
        _told(known[path]) if path in known else f"{words.get(path, 'between')}, by its name" for path in order
    )
    return Order(tuple(order), places, basis, tuple(doubts))


def _told(place: Place) -> str:
    return ", ".join(f"{number:g}" for number in place)


def _sources(paths: Sequence[Path]) -> dict[str, dict[Path, Place]]:
    """What each source of order says, the most reliable first."""
    found: dict[str, dict[Path, Place]] = {}
    stored = {path: _stored(path) for path in paths}
    for kind in ("step", "optimizer", "trainer", "epoch"):
        words = {
            "step": "the steps stored in the files",
            "optimizer": "the optimizers' steps stored in the files",
            "trainer": f"the steps in {_TRAINER}",
            "epoch": "the epochs stored in the files",
        }[kind]
        if kind == "trainer":
            places = {path: path if os.path.isdir(path) else path.parent for path in paths}
            own = {
                path: step
                for path, place in places.items()
                if list(places.values()).count(place) == 1 and (step := _trainer_step(place)) is not None
            }
            found[words] = {path: (step,) for path, step in own.items()}
        else:
            found[words] = {path: (held[kind],) for path, held in stored.items() if kind in held}
    return found | {"the numbers in their names": _named(paths)}


def _stored(path: Path) -> dict[str, float]:
    """The step, the optimizer's step and the epoch that a file holds; nothing if it cannot be read."""
    found: dict[str, float] = {}
    with suppress(Exception):  # a damaged file is reported when it is loaded
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                _search(file.metadata() or {}, found)
        elif os.path.isfile(path):
            _search(_opened(path), found)
    return found


def _opened(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # tensors stay on disk
    except RuntimeError:  # a file in torch's old format
        return torch.load(path, map_location="cpu", weights_only=True)


def _search(content: Any, found: dict[str, float], depth: int = 0) -> None:
    """Add what a mapping, or a mapping in it, says of its step; the first found counts."""
    if not isinstance(content, Mapping):
        return
    names = {re.sub(r"[^a-z]", "", str(key).lower()): value for key, value in content.items()}
    for kind, keys in (("step", _STEPS), ("epoch", _EPOCHS)):
        for key in keys:
            number = _number(names.get(key))
            if number is not None:
                found.setdefault(kind, number)
    if depth == 0:
        for key in _OPTIMIZERS:
            states = names.get(key)
            first = states[0] if isinstance(states, list | tuple) and states else states
            state = first.get("state") if isinstance(first, Mapping) else None
            slots = [slot.get("step") for slot in state.values() if isinstance(slot, Mapping)] if state else []
            steps = [number for slot in slots if (number := _number(slot)) is not None]
            if steps:
                found.setdefault("optimizer", max(steps))
        for key in _BOXES:
            _search(names.get(key), found, depth + 1)


def _number(value: Any) -> float | None:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, str):
        value = float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        return None
    return float(value)


def _trainer_step(folder: Path) -> float | None:
    with suppress(OSError, ValueError):
        state = json.loads((folder / _TRAINER).read_text(encoding="utf-8"))
        return _number(state.get("global_step")) if isinstance(state, dict) else None
    return None


def _name(path: Path) -> str:
    """The name with its folders, in small letters, without the ending."""
    return str(path.with_suffix("") if path.suffix.lstrip(".").isalpha() else path).lower()


def _worded(paths: Sequence[Path]) -> dict[Path, str]:
    """Which names say "first", "last" or "best", by words that not all share; folders count if the file says nothing."""
    names = {path: re.sub(r"fine[-_ ]tuned", "finetuned", _name(path)) for path in paths}
    parts = {path: [set(re.findall("[a-z]+", part)) for part in Path(names[path]).parts[-2:]] for path in paths}
    common = set.intersection(*(set().union(*found) for found in parts.values()))
    worded: dict[Path, str] = {}
    for path, found in parts.items():
        for words in reversed(found):
            said = [name for name, known in _WORDS.items() if known & (words - common)]
            if said:
                worded |= {path: said[0]} if len(said) == 1 else {}
                break
    return worded


def _named(paths: Sequence[Path]) -> dict[Path, Place]:
    """The numbers in names, of the files that have some."""
    texts = _distinct([_name(path) for path in paths])
    found = {path: _tagged(text) for path, text in zip(paths, texts, strict=True)}
    tags = [tag for tag in _TAGS if sum(tag in held for held in found.values()) > 1]
    if tags:
        first, last = tags[0], tags[-1]
        held = {path: numbers for path, numbers in found.items() if first in numbers}
        restarts = first != last and all(last in numbers for numbers in held.values()) and any(
            a[first] < b[first] and a[last] > b[last] for a in held.values() for b in held.values()
        )  # fmt: skip
        keys: list[Callable[[Mapping[str, float]], float]] = [lambda numbers: numbers[first]]
        if restarts:  # steps counted from each epoch's beginning
            keys.insert(0, lambda numbers: numbers[last])
        return {path: tuple(key(numbers) for key in keys) for path, numbers in held.items()}
    numbers = {
        path: re.findall(r"\d+(?:\.\d+)?[km]?(?![a-z\d])", text) for path, text in zip(paths, texts, strict=True)
    }
    numbers = {path: held for path, held in numbers.items() if held}
    if len({len(held) for held in numbers.values()}) != 1:
        return {}
    parts = list(zip(*numbers.values(), strict=True))
    moving = [k for k, column in enumerate(parts) if len(set(column)) > 1]
    if len(moving) > 1 and any("." in word for k in moving for word in parts[k]):
        return {}  # a loss beside a step: nothing says which is which
    return {path: tuple(_value(held[k]) for k in moving) for path, held in numbers.items()} if moving else {}


def _distinct(names: list[str]) -> list[str]:
    """Names without the folders that all share."""
    parts = [Path(name).parts for name in names]
    shared = 0
    while all(len(each) > shared + 1 for each in parts) and len({each[shared] for each in parts}) == 1:
        shared += 1
    return ["/".join(each[shared:]) for each in parts]


def _tagged(text: str) -> dict[str, float]:
    """Numbers by the word that they stand beside, as in step=100, epoch_3, 10k-steps."""
    found = {}
    for tag in _TAGS:
        before = re.findall(rf"(?<![a-z])(?:{tag})[-_=. ]?(\d+(?:\.\d+)?[km]?)(?![a-z\d])", text)
        after = re.findall(rf"(?<![\d.])(\d+(?:\.\d+)?[km]?)[-_ ]?(?:{tag})(?![a-z])", text)
        if before or after:
            found[tag] = _value((before or after)[-1])
    return found


def _value(word: str) -> float:
    return float(word.rstrip("km")) * {"k": 1e3, "m": 1e6}.get(word[-1], 1.0)
