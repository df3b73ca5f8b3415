"""The blocks of a network by layer, found in their names: "layer 3", "embeddings", "head"."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

Path = tuple[str, ...]

_HEAD = re.compile(
    r"(?!conv_)(.*_)?(classifier|heads?|score|logits|qa_outputs)|fc|cls|readout|embed_out|output_layer|proj_out|last_linear"
)
_EMBEDDING = re.compile(r".*embed.*|wte|wpe|(cls|class|dist|mask|reg)_?tokens?|shared|conv_proj|pos_.*")
# Numbers that are part of a component's name, as in ResNet's layer2 or a vision transformer's encoder_layer_3.
_NUMBERED = re.compile(
    r"(?:(?:en|de)coder_)?(layer|block|stage|level|group|denseblock|denselayer|transition|resblock)_?\d+(-\d+)?"
)
_NOUNS = {
    **dict.fromkeys(("layer", "layers", "h", "encoder_layer_", "decoder_layer_", ""), "layer"),
    **dict.fromkeys(("block", "blocks", "resblocks"), "block"),
    **dict.fromkeys(("stage", "stages"), "stage"),
    **dict.fromkeys(("level", "levels"), "level"),
}
_STAGED = ("stages", "stage", "layers", "levels", "features")  # whose children may hold layers of their own
_LEAVES = ("weight", "bias")
_MUCH = 0.25  # of a network's blocks


@dataclass(frozen=True)
class Layer:
    """Blocks of one layer: its name, its kind ("embeddings", "layer", "head" or "other"), and the blocks' names."""

    name: str
    kind: str
    blocks: tuple[str, ...]


def plain_names(names: Sequence[str]) -> dict[str, str]:
    """Every block's name without what adapters and wrappers add to it; as it is, if two would become the same.

    >>> plain_names(["base_model.model.encoder.layer.0.query.lora_A.default"])
    {'base_model.model.encoder.layer.0.query.lora_A.default': 'encoder.layer.0.query.lora_A'}
    """
    found = {name: _plain(name) for name in names}
    counts = Counter(found.values())
    return {name: plain if counts[plain] == 1 else name for name, plain in found.items()}


def _plain(name: str) -> str:
    name = re.sub(r"^(base_model\.model\.|base_model\.|_orig_mod\.|module\.)+(?=.)", "", name)
    kept: list[str] = []
    parts = iter(name.split("."))
    for part in parts:
        if part in ("base_layer", "_orig_mod"):
            continue
        if part == "modules_to_save":
            next(parts, None)  # the adapter's name
            continue
        kept.append(part)
        if part.startswith("lora_") and part not in ("lora_dropout",):
            next(parts, None)
    return ".".join(kept) or name


def layers_of(names: Sequence[str], *, last: str | None = None) -> list[Layer]:
    """The blocks by layer, in the order of the network.

    Args:
        names: the blocks' names.
        last: the block that makes the outputs, which is a head whatever its name; None if unknown.

    Example:
        >>> [layer.name for layer in layers_of(["wte", "h.0.attn.weight", "h.1.attn.weight", "score"])]
        ['embeddings', 'layer 0', 'layer 1', 'head']
    """
    plain = plain_names(names)
    paths = {name: _without_leaf(plain[name]) for name in names}
    skipped = _wrappers(paths.values()) | _inside(list(paths.values()))
    places = {name: _place(path, skipped) for name, path in paths.items()}
    stacks = {place.tower for place in places.values() if place.kind == "layer"}
    shared = tuple(
        parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths.values(), strict=False))
    )
    above = {stack[:k] for stack in (*stacks, shared) for k in range(1, len(stack) + 1)}
    places = {name: _other(paths[name], place, above) for name, place in places.items()}
    words = _told_apart(paths, places, stacks)
    layers: dict[tuple[str, str], list[str]] = {}
    for name, place in places.items():
        layers.setdefault((words[name], place.kind), []).append(name)
    found = [Layer(word, kind, tuple(blocks)) for (word, kind), blocks in layers.items()]
    if last is not None and not any(layer.kind == "head" for layer in found):
        found = [replace(layer, kind="head") if layer.blocks == (last,) else layer for layer in found]
    return found


def phrase(layers: Iterable[tuple[str, str, bool]]) -> str:
    """Layers in words, from (name, kind, whether it is new) in the network's order.

    >>> phrase([("layer 4", "layer", False), ("layer 5", "layer", False), ("head", "head", True)])
    'layers 4 and 5 and the new head'
    """
    parts: list[str] = []
    runs: dict[str, list[int]] = {}
    for name, kind, new in layers:
        noun, _, number = name.rpartition(" ")
        if kind == "layer" and noun and number.isdigit() and not new:
            if noun not in runs:
                runs[noun] = []
                parts.append(f"\0{noun}")
            runs[noun].append(int(number))
        else:
            parts.append(_named(name, kind, new=new))
    words = [_numbers(part[1:], runs[part[1:]]) if part.startswith("\0") else part for part in parts]
    return _joined(words)


def _named(name: str, kind: str, *, new: bool) -> str:
    adjective = "new " if new else ""
    if kind == "head":
        return f"the {adjective}{name}" if name.endswith("head") else f"the last layer ({name})"
    if kind in ("embeddings", "other") and re.fullmatch(r"[a-z ]+", name):
        return f"the {adjective}{name}"
    return adjective + name


def _numbers(noun: str, numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [part for run in runs for part in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
    return f"{noun}{'s' if len(numbers) > 1 else ''} {_joined(words)}"


def _joined(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


@dataclass(frozen=True)
class _Place:
    """Where a block sits: the kind and word of its layer, and the tower (the path above the stack of layers)."""

    kind: str
    word: str
    tower: Path


def _without_leaf(name: str) -> Path:
    parts = tuple(name.split("."))
    return parts[:-1] if len(parts) > 1 and parts[-1] in _LEAVES else parts


def _place(path: Path, skipped: set[Path]) -> _Place:
    for k, part in enumerate(path):
        if _HEAD.fullmatch(part):
            return _Place("head", "head", path[:k])
        if _EMBEDDING.fullmatch(part):
            return _Place("embeddings", "embeddings", path[:k])
        if part == "stem":
            return _Place("other", "stem", path[:k])
        if part.isdigit() and path[:k] not in skipped:
            return _unit(path, k)
        if _NUMBERED.fullmatch(part):
            deeper = k + 1 < len(path) and (path[k + 1].isdigit() or bool(_NUMBERED.fullmatch(path[k + 1])))
            vision = re.fullmatch(r"(?:en|de)coder_layer_(\d+)", part)
            word = f"layer {vision[1]}" if vision else ".".join(path[k : k + 2] if deeper else path[k : k + 1])
            return _Place("layer", word, path[:k])
    return _Place("other", "", ())


def _unit(path: Path, k: int) -> _Place:
    """The layer that the number at place ``k`` counts, or the one inside it if the number counts stages."""
    container, rest = path[k - 1] if k else "", path[k + 1 :]
    tower = path[: max(0, k - 1)]
    noun = _NOUNS.get(container)
    word = f"{noun} {path[k]}" if noun else f"{container}.{path[k]}"
    if len(rest) > 1 and rest[0].isdigit():  # of a leaf, the number counts what is inside the layer
        return _Place("layer", f"{word}.{rest[0]}", tower)
    if len(rest) > 1 and container in _STAGED and rest[0] in ("blocks", "layers") and rest[1].isdigit():
        return _Place("layer", f"{word} {_NOUNS[rest[0]]} {rest[1]}", tower)
    return _Place("layer", word, tower)


def _wrappers(paths: Iterable[Path]) -> set[Path]:
    """Numbered containers without a name of their own of which one child holds the network: not its layers."""
    stacks: dict[Path, dict[str, set[Path]]] = {}
    for path in paths:
        outer = next((k for k, part in enumerate(path) if part.isdigit()), None)
        if outer is None or (outer and path[outer - 1] in _NOUNS) or "".join(path[outer + 1 : outer + 2]).isdigit():
            continue
        inner = stacks.setdefault(path[:outer], {}).setdefault(path[outer], set())
        for k in range(outer + 1, len(path)):
            if _NUMBERED.fullmatch(path[k]) or (path[k].isdigit() and path[k - 1] in _NOUNS):
                inner.add(path[: k + 1])
                break
    return {
        container
        for container, children in stacks.items()
        if sum(bool(inner) for inner in children.values()) == 1 and max(map(len, children.values())) > 1
    }


def _inside(paths: Sequence[Path]) -> set[Path]:
    """Numbered containers within a small part of the network, as a branch's convolutions: they count no layers."""
    containers = {path[:k] for path in paths for k in range(2, len(path)) if path[k].isdigit()}
    named = {
        each for each in containers if each[-1] not in _NOUNS and not re.search(r"(layer|block)(s|_groups)$", each[-1])
    }
    return {each for each in named if sum(path[: len(each) - 1] == each[:-1] for path in paths) < _MUCH * len(paths)}


def _other(path: Path, place: _Place, above: set[Path]) -> _Place:
    """A block outside of all stacks, by the first part of its name that is not above a stack."""
    if place.kind != "other":
        return place
    k = next((k for k in range(len(path)) if path[: k + 1] not in above), len(path) - 1)
    final = re.fullmatch(r"(final_)?(layer_?norm|norm|ln_f|ln)", path[k], re.IGNORECASE)
    return _Place("other", "final norm" if final else path[k], path[:k])


def _told_apart(paths: dict[str, Path], places: dict[str, _Place], stacks: set[Path]) -> dict[str, str]:
    """The layers' words; those of two towers, as an encoder's and a decoder's, begin with the tower's name."""
    split = next((k for k, parts in enumerate(_positions(stacks)) if len(set(parts)) > 1), None)
    towers = set() if split is None else {stack[split] for stack in stacks if len(stack) > split}

    def tower(name: str) -> str:
        path = paths[name]
        return path[split] if split is not None and len(path) > split and path[split] in towers else ""

    owners: dict[str, set[str]] = {}
    for name, place in places.items():
        owners.setdefault(re.sub(r"\d+", "#", place.word), set()).add(tower(name))
    return {
        name: f"{tower(name)} {place.word}".strip() if len(owners[re.sub(r"\d+", "#", place.word)]) > 1 else place.word
        for name, place in places.items()
    }


def _positions(stacks: set[Path]) -> Iterator[list[str]]:
    for k in range(max(map(len, stacks), default=0)):
        yield [stack[k] if len(stack) > k else "" for stack in sorted(stacks)]
