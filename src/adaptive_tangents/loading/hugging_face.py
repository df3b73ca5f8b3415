"""Networks from folders of the transformers library: made from their configuration, with their labels and tokenizer.

Nothing is downloaded, and no code of a folder is run.
"""

import importlib
import inspect
import json
import os
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading.checkpoints import fit_state, read_state, weights_in
from adaptive_tangents.loading.words import listed_names, optional, told

CONFIG = "config.json"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
_TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_LONGEST = 100_000  # tokenizers without a maximum say 1e30


def is_network(folder: Path) -> bool:
    """Whether a folder says what network its weights are of."""
    return os.path.isfile(folder / CONFIG) and weights_in(folder) is not None


def read_json(path: Path, call: str) -> dict[str, Any]:
    """The mapping in a file of JSON. Raises TangentError if it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TangentError(f"{call}: {path} cannot be read ({told(error)}); save the checkpoint again") from error
    if not isinstance(content, dict):
        raise TangentError(f"{call}: {path} holds no JSON object; save the checkpoint again")
    return content


def network_of(folder: Path, call: str, *, task: str | None = None, labels: int | None = None) -> nn.Module:
    """The network that a folder's `config.json` describes, in float32 and evaluation mode, without its weights.

    ``task``, as adapters name it, asks for the class with that head, and ``labels`` for so many outputs. Raises TangentError
    if the configuration names no class of transformers, or one that needs code of its own.
    """
    path = folder / CONFIG
    found = read_json(path, call)
    names = found.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else None
    if name is None and task is None:
        timm = found.get("architecture")
        hint = f"--model 'timm:{timm}?num_classes={found.get('num_classes', 1000)}'" if timm else "--model, a factory"
        raise TangentError(
            f"{call}: {path} names no architectures, so it does not say what network this is; give {hint}"
        )
    if "quantization_config" in found:
        raise TangentError(
            f"{call}: the weights of {folder} are quantized, and have no derivatives; give the folder before quantization"
        )
    transformers = optional("transformers", f"{folder}, a folder of Hugging Face transformers,", call)
    try:
        kind = getattr(transformers, name, None) if name is not None else None
    except Exception as error:  # what transformers imports may be broken
        raise TangentError(
            f"{call}: transformers cannot import {name}, which {folder} is ({told(error)}); mend that installation, or give "
            "--model, a factory that makes the network"
        ) from error
    if name is not None and kind is None and task is None:
        own = "auto_map" in found
        raise TangentError(
            f"{call}: {folder} is a {name}, which "
            + ("needs code from its own folder (auto_map), and that is never run" if own else "transformers lacks")
            + "; give --model, a factory that makes the network"
        )
    with quiet():
        try:
            changed = {} if labels is None else {"num_labels": labels}
            config = transformers.AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, **changed
            )
            if task is not None and task in _TASKS and not _has_head(name, task):
                auto = getattr(transformers, _TASKS[task])
                kind = auto._model_mapping[type(config)]
            if hasattr(config, "use_cache"):
                config.use_cache = False
            model: nn.Module = kind._from_config(config, dtype=torch.float32, attn_implementation="eager")  # type: ignore[union-attr]
        except Exception as error:
            raise TangentError(
                f"{call}: transformers cannot make the network of {path} ({told(error)}); give --model, a factory that "
                "makes it"
            ) from error
    return model.eval()


def _has_head(name: str | None, task: str) -> bool:
    return name is not None and name.endswith(_TASKS[task].removeprefix("AutoModel") or "Model")


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers without bars and warnings, and with torch's random numbers as before."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def state_of(folder: Path, model: nn.Module, call: str, *, may_miss: Container[str] | None = None) -> dict[str, Tensor]:
    """The weights of a folder by the names of its network.

    Where names differ, as after a change of names in transformers, transformers itself reads them. ``may_miss`` are names
    that the folder may lack; with these, tensors that the network has no place for are left out.
    """
    device = next(model.parameters()).device
    content = read_state(folder, device, call)
    try:
        return fit_state(content, model, str(folder), call, may_miss=may_miss)
    except TangentError:
        state = _converted(folder, model)
        if state is None:
            raise
        return fit_state(state, model, str(folder), call)


def _converted(folder: Path, model: nn.Module) -> dict[str, Tensor] | None:
    """The weights as transformers reads them, if all of them have a place."""
    config, read = getattr(model, "config", None), getattr(type(model), "from_pretrained", None)
    if config is None or read is None or not os.path.isfile(folder / CONFIG):
        return None
    with quiet():
        try:
            made, info = read(
                str(folder), config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True,
                trust_remote_code=False, weights_only=True,
            )  # fmt: skip
        except Exception:
            return None
    if any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return None
    return {name: value.to(next(model.parameters()).device) for name, value in made.state_dict().items()}


def head_names(model: nn.Module) -> set[str]:
    """Names of the tensors outside a transformers network's body."""
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not hasattr(model, prefix):
        return set()
    return {name for name in model.state_dict() if not name.startswith(f"{prefix}.")}


def classes_of(model: nn.Module) -> tuple[str, ...] | None:
    """The labels' names in a network's configuration, unless they are only numbered."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if not labels or not type(model).__name__.endswith("Classification"):
        return None
    names = tuple(str(labels[k]) for k in sorted(labels))
    return None if all(name == f"LABEL_{k}" for k, name in enumerate(names)) else names


def is_regression(model: nn.Module) -> bool:
    """Whether a network's configuration says that its labels are amounts."""
    return getattr(getattr(model, "config", None), "problem_type", None) == "regression"


def places_of(model: nn.Module) -> int | None:
    """How many tokens a network of transformers has positions for, if its configuration says it."""
    config = getattr(model, "config", None)
    places = getattr(config, "max_position_embeddings", None)
    if not isinstance(places, int) or places < 1:
        return None
    if getattr(config, "model_type", "") in _OFFSET:
        places -= (getattr(config, "pad_token_id", 0) or 0) + 1
    return places


def is_causal(model: nn.Module) -> bool:
    """Whether it is a causal language model of transformers."""
    return any(kind.__name__.endswith(("ForCausalLM", "LMHeadModel")) for kind in type(model).__mro__)


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a model's folder, made when it is first called.

    It takes texts, or pairs of texts, to the tensors that the model's ``forward`` has arguments for, padded to the longest
    and cut at the model's maximum. Raises TangentError if no folder has one.
    """

    folders: tuple[Path, ...]
    model: nn.Module = field(repr=False)
    call: str
    _made: list[Any] = field(default_factory=list, repr=False, compare=False)

    def __call__(
        self, texts: Sequence[str], seconds: Sequence[str] | None = None, max_length: int | None = None
    ) -> dict[str, Tensor]:
        made = self._found()
        with quiet():
            try:
                given = made(
                    *(list(each) for each in (texts, seconds) if each is not None), padding="longest", truncation=True,
                    max_length=min(max_length or self.model_max_length, self.places or _LONGEST), return_tensors="pt",
                )  # fmt: skip
            except Exception as error:
                raise TangentError(
                    f"{self.call}: the tokenizer of {made.name_or_path} fails on the texts ({told(error)}); give tokens as "
                    "an .npz file, by argument name (input_ids, attention_mask)"
                ) from error
        taken = inspect.signature(self.model.forward).parameters
        wild = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        return {name: value for name, value in given.items() if name in taken or wild}

    @property
    def places(self) -> int | None:
        """How many tokens the model takes."""
        return places_of(self.model)

    @property
    def model_max_length(self) -> int:
        """How many tokens texts are cut at, by the limits of the tokenizer and of the model."""
        return int(min(self._found().model_max_length, self.places or _LONGEST, _LONGEST))

    def _found(self) -> Any:
        if not self._made:
            self._made.append(self._make())
        return self._made[0]

    def _make(self) -> Any:
        folder = next((f for f in self.folders if any(os.path.isfile(f / name) for name in _TOKENIZER)), None)
        if folder is None:
            raise TangentError(
                f"{self.call}: there is no tokenizer in {listed_names(map(str, self.folders))}, and texts need one; save it "
                f"there with tokenizer.save_pretrained({str(self.folders[0])!r}), or give tokens as an .npz file, by "
                "argument name (input_ids, attention_mask)"
            )
        transformers = optional("transformers", f"the tokenizer of {folder}", self.call)
        with quiet():
            try:
                made = transformers.AutoTokenizer.from_pretrained(
                    str(folder), local_files_only=True, trust_remote_code=False
                )
            except Exception as error:
                raise TangentError(
                    f"{self.call}: the tokenizer in {folder} cannot be read ({told(error)}); save it again with "
                    "tokenizer.save_pretrained, or give tokens as an .npz file"
                ) from error
        if made.pad_token is None:
            pad = getattr(getattr(self.model, "config", None), "pad_token_id", None)
            made.pad_token = made.eos_token if pad is None else made.convert_ids_to_tokens(pad)
        return made


_OFFSET = ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "mpnet", "longformer")
"""Networks whose positions are counted from behind the padding token's."""
