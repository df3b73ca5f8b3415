"""Blocks of two networks side by side: adapters stand at the layer that they adapt."""

import re
from collections.abc import Iterable, Sequence

_AROUND = re.compile(r"^(?:(?:base_model\.model|base_model|module|_orig_mod)\.)+(?=.)")
_ADAPTER = re.compile(r"lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)")


def place_of(name: str) -> str:
    """The layer that a block belongs to: itself, or what an adapter adapts.

    >>> place_of("base_model.model.encoder.layer.0.query.lora_A.default"), place_of("encoder.layer.0.query")
    ('encoder.layer.0.query', 'encoder.layer.0.query')
    """
    parts = _AROUND.sub("", name).split(".")
    kept: list[str] = []
    skip = False
    for part in parts:
        if skip or part == "base_layer":
            skip = False
            continue
        if part == "modules_to_save":
            skip = True  # the adapter's name
            continue
        if _ADAPTER.fullmatch(part):
            break
        kept.append(part)
    return ".".join(kept) or name


def by_place(names: Iterable[str]) -> dict[str, list[str]]:
    """The blocks at every place, in the network's order."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(place_of(name), []).append(name)
    return found


def by_layer(places: Sequence[str]) -> dict[str, list[str]]:
    """The places by layer: all up to the last number in their names that others share.

    >>> by_layer(["embed", "layer.0.query", "layer.0.key", "layer.1.key", "head"])
    {'embed': ['embed'], 'layer.0': ['layer.0.query', 'layer.0.key'], 'layer.1': ['layer.1.key'], 'head': ['head']}
    """
    found: dict[str, list[str]] = {}
    for place in places:
        parts = place.split(".")
        first = next((k for k, part in enumerate(parts) if part.isdigit()), None)
        layer = ".".join(parts[: first + 1]) if first is not None else place
        found.setdefault(layer, []).append(place)
    return found
