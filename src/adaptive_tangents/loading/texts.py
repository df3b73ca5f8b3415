"""Texts become tokens by the network's own tokenizer."""

import copy
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading.words import optional, told

Tokenizer = Callable[..., Any]
"""Takes a list of texts, of pairs two lists, and gives a mapping of tensors with a row a sample, or of equal lists."""

_UNBOUNDED = 1_000_000  # tokenizers without a limit name a larger one


def load_tokenizer(folder: str | Path, call: str, places: int | None = None) -> Tokenizer:
    """The tokenizer in a folder with tokenizer.json or the files of a Hugging Face tokenizer; nothing is downloaded.

    ``places`` is how many tokens the network takes, at which texts are cut.
    """
    path = Path(folder)
    if not os.path.isdir(path):
        raise TangentError(f"{call}: there is no folder {path}; --tokenizer is a folder with tokenizer.json")
    transformers = optional("transformers", "reading a tokenizer", call, ", or give tokens as integers in an .npz file")
    try:
        if (path / "tokenizer_config.json").exists() or not (path / "tokenizer.json").exists():
            made: Any = transformers.AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
        else:
            made = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    except Exception as error:  # its readers raise many kinds
        raise TangentError(
            f"{call}: {path} holds no tokenizer that can be read ({told(error)}); give a folder with tokenizer.json, as "
            "tokenizer.save_pretrained writes it"
        ) from error
    made.model_max_length = min(made.model_max_length, places or made.model_max_length)
    return made  # type: ignore[no-any-return]


def check_length(max_length: int | None, places: int | None, call: str) -> None:
    """Raise TangentError if texts are to be longer than the network takes, or empty."""
    if max_length is not None and max_length < 1:
        raise TangentError(f"{call}: --max-length must be at least 1, got {max_length}")
    if max_length is not None and places is not None and max_length > places:
        raise TangentError(
            f"{call}: --max-length {max_length} is more than the {places} tokens that the network has positions for; give at "
            "most that many, or leave it out"
        )


def _padding(tokenizer: Any) -> Any:
    """A tokenizer that can pad: the same, or a copy with a token for it, as padded positions are masked."""
    if not hasattr(tokenizer, "get_vocab") or getattr(tokenizer, "pad_token", "") is not None:
        return tokenizer
    made, vocabulary = copy.deepcopy(tokenizer), tokenizer.get_vocab()
    named = next((name for name in ("[PAD]", "<pad>", "<|endoftext|>") if name in vocabulary), None)
    made.pad_token = named or made.eos_token or min(vocabulary, key=vocabulary.get)
    return made


def tokenized(
    tokenizer: Tokenizer, texts: Sequence[str], seconds: Sequence[str] | None, max_length: int | None, call: str,
    where: Callable[[int], str] = "sample {}".format,
) -> tuple[dict[str, Tensor], list[str]]:  # fmt: skip
    """Tokens of texts, or of pairs, padded to the longest, and a note on those that may be cut; ``where`` names one."""
    check_length(max_length, getattr(tokenizer, "places", None), call)
    given = (list(texts),) if seconds is None else (list(texts), list(seconds))
    try:
        found = _padding(tokenizer)(*given, **_options(tokenizer, max_length))
        batch = {name: _tensor(value) for name, value in dict(found).items()}
    except TangentError:
        raise
    except Exception as error:  # a user's function
        raise TangentError(
            f"{call}: the tokenizer failed on {len(texts)} {'texts' if seconds is None else 'pairs of texts'} "
            f"({told(error)}); it takes a list of texts{'' if seconds is None else ', and a second list of these,'} and "
            "gives a dict of tensors of one length"
        ) from error
    short = {name: tuple(value.shape) for name, value in batch.items() if value.ndim < 1 or len(value) != len(texts)}
    if short or not batch:
        raise TangentError(
            f"{call}: the tokenizer gave {short or 'nothing'} for {len(texts)} texts; it must give tensors with a row each"
        )
    return batch, _cut(batch, max_length or _limit(tokenizer), call, where)


def _limit(tokenizer: Tokenizer) -> int | None:
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if isinstance(limit, int) and limit < _UNBOUNDED else None


def _options(tokenizer: Tokenizer, max_length: int | None) -> dict[str, Any]:
    """What a Hugging Face tokenizer needs to give tensors; another callable is only told a length, if one is asked for."""
    limit = max_length or _limit(tokenizer)
    if hasattr(tokenizer, "model_max_length") and hasattr(tokenizer, "pad"):
        return {"padding": True, "return_tensors": "pt"} | ({"truncation": True, "max_length": limit} if limit else {})
    if max_length is None:
        return {}
    takes = inspect.signature(tokenizer).parameters.values()
    if any(each.name == "max_length" or each.kind is each.VAR_KEYWORD for each in takes):
        return {"max_length": max_length}
    raise TypeError("it has no argument max_length, and --max-length was given")


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def _cut(batch: Mapping[str, Tensor], limit: int | None, call: str, where: Callable[[int], str]) -> list[str]:
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return []
    if not bool(mask.any(1).all()):
        empty = int((~mask.bool().any(1)).nonzero()[0])
        raise TangentError(f"{call}: the text of {where(empty)} has no tokens; leave it out")
    full = 0 if limit is None else int((mask.sum(1) >= limit).sum())
    return [f"{full:,} of the {len(mask):,} texts reach {limit} tokens, and what comes after is cut."] if full else []
