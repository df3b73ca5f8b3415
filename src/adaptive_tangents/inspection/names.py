"""Names in results: of parameters and modules as users know them, and of classes, each told apart."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from adaptive_tangents.runs.record import RunResult


def renamed(result: RunResult, names: Mapping[str, str]) -> RunResult:
    """A result in which every long name, wherever it stands, is the short one that belongs to it.

    >>> result = RunResult({"blocks": {"up.lora_A.default": {}}, "limits": ["Block up.lora_A.default is small."]}, {})
    >>> renamed(result, {"up.lora_A.default": "up.lora_A"}).results
    {'blocks': {'up.lora_A': {}}, 'limits': ['Block up.lora_A is small.']}
    """
    if not names:
        return result
    longest = sorted(names, key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w])(?:{'|'.join(map(re.escape, longest))})(?!\.?\w)")

    def told(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda found: names[found[0]], value)
        if isinstance(value, Mapping):
            return {told(key): told(inner) for key, inner in value.items()}
        return [told(inner) for inner in value] if isinstance(value, list) else value

    arrays = {told(name): array for name, array in result.arrays.items()}
    return replace(result, results=told(result.results), arrays=arrays)


def told_apart(names: Sequence[str]) -> tuple[str, ...]:
    """Names of classes, with their numbers where several have one name.

    >>> told_apart(["crane", "owl", "crane"])
    ('crane (0)', 'owl', 'crane (2)')
    """
    found = tuple(map(str, names))
    while len(set(found)) < len(found):
        counts = Counter(found)
        found = tuple(f"{name} ({k})" if counts[name] > 1 else name for k, name in enumerate(found))
    return found
