"""What a stored kernel was made from, as hashes: work continues only with the same model, data and settings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptive_tangents.capture.batches import Batch
from adaptive_tangents.errors import TangentError
from adaptive_tangents.runtime.tensor_files import fingerprint

_WORDS = {
    "version": "by another version",
    "parameters": "at other parameters",
    "data": "of other data x",
    "data2": "of other data x2",
    "outputs": "with other outputs",
    "dtype": "in another dtype",
    "features": "from features in another dtype",
    "wrt": "for other parameters (wrt)",
    "blocks": "with the other choice of by_block, or of other blocks",
    "transforms": "with other transforms",
    "sketch": "with another sketch",
    "n": "of another number of samples",
    "m": "of another number of samples x2",
    "c": "of another number of outputs",
    "symmetric": "with or without x2",
    "tile": "in tiles of another size",
}
_SHOWN = ("version", "outputs", "dtype", "features", "tile", "n", "m", "c", "sketch")
_FULL, _REDUCED = 1e-3, 5e-2  # relative to a probe: other models differ by more, other machines by less


def batch_fingerprint(x: Batch) -> str:
    """The hash of a batch, whichever device it is on."""
    return fingerprint(dict(x) if isinstance(x, Mapping) else x)


def check_same(call: str, path: Path, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise TangentError unless a store was made from what is asked for now; the message lists every difference."""
    other = [
        words + (f" ({stored.get(key)}, now {asked[key]})" if key in _SHOWN else "")
        for key, words in _WORDS.items()
        if key in asked and stored.get(key) != asked[key]
    ]
    if other:
        raise TangentError(
            f"{call}: {path} was made {', '.join(other)}; resume it with its original arguments, or give another path"
        )
    if not _near(stored["probe"], asked["probe"], _REDUCED if asked["features"] in ("bfloat16", "float16") else _FULL):
        raise TangentError(
            f"{call}: {path} was made with another network: parameters and data are the same, but the kernel of a few "
            "samples is another; give the same model, output_fn and transforms, or another path"
        )


def _near(one: Sequence[float], two: Sequence[float], tolerance: float) -> bool:
    scale = max(map(abs, one), default=0.0)
    return len(one) == len(two) and all(abs(a - b) <= tolerance * scale for a, b in zip(one, two, strict=True))
