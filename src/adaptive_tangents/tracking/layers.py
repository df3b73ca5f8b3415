"""Blocks in groups by layer, found from their names or named by patterns."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from adaptive_tangents.checks import listed
from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.layer_names import layers_of

Groups = Mapping[str, str | Sequence[str]]
"""Patterns of block names by the name of a group."""

ALL, REST = "all", "rest"


def grouped(call: str, names: Sequence[str], groups: Groups | None = None) -> dict[str, tuple[str, ...]]:
    """The blocks of each group, in the order of ``names``; by layer if ``groups`` is None.

    >>> grouped("f", ["bert.embeddings.word", "bert.encoder.layer.0.query", "bert.encoder.layer.1.query", "classifier"])
    {'embeddings': ('bert.embeddings.word',), 'layer 0': ('bert.encoder.layer.0.query',),
     'layer 1': ('bert.encoder.layer.1.query',), 'head': ('classifier',)}
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
    """The group of each name: its layer, by the rule of ``inspect``."""
    found = {name: layer.name for layer in layers_of(names) for name in layer.blocks}
    return {name: f"{ALL}_" if layer == ALL else layer for name, layer in found.items()}
