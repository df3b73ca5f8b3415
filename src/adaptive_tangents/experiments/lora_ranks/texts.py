"""Short texts on several subjects: first sentences of docstrings of scipy's packages, read from the installed scipy."""

import inspect
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.forecast.texts import PACKAGE

_LEAST, _MOST = 20, 200  # characters of a sentence
_WORDS = 997


def sentences(package: str) -> list[str]:
    """The first sentence of every public docstring of a package of scipy, in order of names.

    >>> "Compute the matrix cosine." in sentences("linalg")
    True
    """
    module = import_module(f"scipy.{package}")
    found = dict.fromkeys(_first(getattr(module, name)) for name in sorted(vars(module)) if not name.startswith("_"))
    return [text for text in found if _LEAST <= len(text) <= _MOST]


def _first(thing: object) -> str:
    """The first sentence of a docstring, without the signature that compiled functions begin with."""
    text = getattr(thing, "__doc__", None)
    if not isinstance(text, str) or inspect.ismodule(thing):
        return ""
    for part in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        words = " ".join(part.split())
        if len(words) >= _LEAST and "(" not in words.partition(" ")[0]:
            return re.split(r"(?<=[.!?])\s", words)[0]
    return ""


def drawn(
    call: str, packages: Sequence[str], train: int, test: int, seed: int
) -> tuple[list[str], Tensor, list[str], Tensor]:
    """Texts to train on and to test on, as many of each package, with the packages' numbers as labels.

    Sentences that several packages share are left out. Raises TangentError if a package has too few.
    """
    texts = {package: sentences(package) for package in packages}
    counts = Counter(text for of in texts.values() for text in of)
    parts: tuple[list[str], list[str]] = ([], [])
    generator = torch.Generator().manual_seed(seed)
    for package, of in texts.items():
        own = [text for text in of if counts[text] == 1]
        if len(own) < train + test:
            raise TangentError(
                f"{call}: scipy {metadata.version('scipy')} has {len(own)} sentences on {package}, fewer than train + test = "
                f"{train + test}; lower these"
            )
        order = torch.randperm(len(own), generator=generator).tolist()
        parts[0].extend(own[k] for k in order[:train])
        parts[1].extend(own[k] for k in order[train : train + test])
    labels = (torch.arange(len(packages)).repeat_interleave(count) for count in (train, test))
    return parts[0], next(labels), parts[1], next(labels)


def tokens(texts: Sequence[str], most: int, *, pretrained: bool) -> Int64[Tensor, "n t"]:
    """Token numbers with 0 for padding: of the pretrained encoder's tokenizer, or of hashed words."""
    if pretrained:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(weights() / "tokenizer.json"))
        tokenizer.enable_truncation(most)
        tokenizer.no_padding()
        rows = [torch.tensor(encoded.ids) for encoded in tokenizer.encode_batch(list(texts))]
    else:
        rows = [torch.tensor([1 + zlib.crc32(w.encode()) % _WORDS for w in t.lower().split()][:most]) for t in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def weights() -> Path:
    """The folder of the pretrained encoder's files."""
    found = find_spec(PACKAGE)
    assert found is not None
    assert found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations))) / "model"
