"""Results with the names of parameters and modules that users know."""

import re
from collections.abc import Mapping
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
