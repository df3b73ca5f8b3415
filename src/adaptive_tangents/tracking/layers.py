"""Blocks in groups by layer, found from their names or named by patterns."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from adaptive_tangents.checks import listed
from adaptive_tangents.errors import TangentError

Groups = Mapping[str, str | Sequence[str]]
"""Patterns of block names by the name of a group."""

ALL, REST = "all", "rest"
_Path = tuple[str, ...]


def grouped(call: str, names: Sequence[str], groups: Groups | None = None) -> dict[str, tuple[str, ...]]:
    """The blocks of each group, in the order of ``names``; by layer if ``groups`` is None.

    >>> grouped("f", ["bert.embeddings.word", "bert.encoder.layer.0.query", "bert.encoder.layer.1.query", "classifier"])
    {'embeddings': ('bert.embeddings.word',), 'layer.0': ('bert.encoder.layer.0.query',),
     'layer.1': ('bert.encoder.layer.1.query',), 'classifier': ('classifier',)}
    """
    homes = _layers(names) if groups is None else _matched(call, names, groups)
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(homes[name], []).append(name)
    return {home: tuple(members) for home, members in found.items()}


def check_groups(call: str, groups: object) -> None:
    """Raise TangentError unless ``groups`` is a mapping from names to patterns, or None."""
    if groups is None:
        return
    if not isinstance(groups, Mapping) or not groups:
        raise TangentError(
            f"{call}: groups is a mapping from a group's name to patterns of block names, such as "
            f"{{'head': 'classifier*'}}, got {groups!r}"
        )
    for name, patterns in groups.items():
        listed_patterns = [patterns] if isinstance(patterns, str) else patterns
        plain = isinstance(listed_patterns, list | tuple) and all(isinstance(each, str) for each in listed_patterns)
        if not isinstance(name, str) or name in ("", ALL) or not plain or not listed_patterns:
            raise TangentError(
                f"{call}: groups[{name!r}] is {patterns!r}; give a pattern or a list of patterns, under a name other than "
                f"{ALL!r}"
            )


def _matched(call: str, names: Sequence[str], groups: Groups) -> dict[str, str]:
    homes: dict[str, str] = {}
    for group, patterns in groups.items():
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            hit = [name for name in names if fnmatchcase(name, pattern)]
            if not hit:
                raise TangentError(
                    f"{call}: groups[{group!r}]: {pattern!r} matches no block; the blocks are {listed(names)}"
                )
            for name in hit:
                if homes.setdefault(name, group) != group:
                    raise TangentError(
                        f"{call}: block {name!r} is in the groups {homes[name]!r} and {group!r}; narrow their patterns"
                    )
    return {name: homes.get(name, REST) for name in names}


def _layers(names: Sequence[str]) -> dict[str, str]:
    """The group of each name: its numbered layer, or else the module beside what holds the layers."""
    paths = {name: tuple(name.split(".")) for name in names}
    numbered = _numbered(list(paths.values()))
    ends = {name: _layer_end(path, numbered) for name, path in paths.items()}
    opened = {paths[name][:k] for name, end in ends.items() if end for k in range(end)}
    if len({path[0] for path in paths.values()}) == 1:
        opened |= {path[:1] for path in paths.values() if len(path) > 1}
    homes = {name: path[: ends[name]] if ends[name] else _beside(path, opened) for name, path in paths.items()}
    found = {name: ".".join(path) for name, path in _shortened(homes).items()}
    return {name: f"{ALL}_" if home == ALL else home for name, home in found.items()}


def _numbered(paths: Sequence[_Path]) -> dict[_Path, set[str]]:
    """The containers whose entries are numbered, with their numbers."""
    found: dict[_Path, set[str]] = {}
    for path in paths:
        for k, part in enumerate(path):
            if part.isdigit():
                found.setdefault(path[:k], set()).add(part)
    return found


def _layer_end(path: _Path, numbered: Mapping[_Path, set[str]]) -> int:
    """Where the name of the layer ends: after the number in the first container that no larger one is inside of; 0: none."""
    for k, part in enumerate(path):
        if part.isdigit():
            inside = [len(held) for other, held in numbered.items() if len(other) > k and other[:k] == path[:k]]
            if len(numbered[path[:k]]) >= max(inside, default=0):
                return k + 1
    return 0


def _beside(path: _Path, opened: set[_Path]) -> _Path:
    return next((path[:k] for k in range(1, len(path)) if path[:k] not in opened), path)


def _shortened(homes: Mapping[str, _Path]) -> dict[str, _Path]:
    """Groups by the ends of their names, where these are different."""
    short = {home: home[-2:] if home[-1].isdigit() else home[-1:] for home in homes.values()}
    clear = len(set(short.values())) == len(short)
    return {name: short[home] if clear else home for name, home in homes.items()}
