"""Networks whose output is the loss of each sample, the logits at its last token, or a function of what they returned."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptive_tangents.capture.batches import Batch, tensors
from adaptive_tangents.capture.returned import found_output
from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading.data import Data

LOSS, LAST_TOKEN = "loss", "last-token"
_TARGETS = "loss_targets"
_IGNORED = -100


class Reduced(nn.Module):
    """A network with something made of its output; modules, parameters and their names are the network's own.

    The network itself is no submodule, so names have no prefix and a state dict of the network is one of this. Targets of a
    loss are part of the batch.
    """

    def __init__(self, network: nn.Module, how: str | Callable[[Any], Any], target: "Target") -> None:
        super().__init__()
        self._parameters = network._parameters
        self._buffers = network._buffers
        self._modules = network._modules
        self._non_persistent_buffers_set = network._non_persistent_buffers_set
        self._held, self.how, self.target = (network,), how, target
        self.training = network.training

    @property
    def network(self) -> nn.Module:
        """The network itself."""
        return self._held[0]

    def train(self, mode: bool = True) -> "Reduced":
        """Set the mode of the network, too."""
        self.network.train(mode)
        self.training = mode
        return self

    def with_targets(self, x: Batch, y: Tensor | None) -> Batch:
        """The batch with the targets of the loss in it."""
        if y is None:
            return x
        if isinstance(x, Mapping):
            return {**x, _TARGETS: y}
        return (*(x if isinstance(x, tuple | list) else (x,)), y)

    def forward(self, *given: Any, **keywords: Any) -> Any:
        """What is made of the network's output, (n, c)."""
        y = None
        if self.target.given:
            y, given = (keywords.pop(_TARGETS), given) if keywords else (given[-1], given[:-1])
        out = self.network(*given, **keywords)
        if not isinstance(self.how, str):
            made = self.how(out)
            return made[:, None] if isinstance(made, Tensor) and made.ndim == 1 else made
        out = found_output(out)
        out = found_output(out[0]) if isinstance(out, tuple | list) else out
        x = keywords or given
        ids, mask = sequences(x), x.get("attention_mask") if isinstance(x, Mapping) else None
        if self.how == LAST_TOKEN:
            return at_last_token(out, mask)
        return self.target.loss(out, y, ids, mask)[:, None]


def inner(model: nn.Module) -> nn.Module:
    """The user's own network in one whose output is something made of it."""
    return model.network if isinstance(model, Reduced) else model


def sequences(x: Any) -> Tensor | None:
    """The tokens (n, t) of a batch, if it holds some."""
    if isinstance(x, Mapping):
        found = x.get("input_ids")
    else:
        found = x if isinstance(x, Tensor) else x[0] if isinstance(x, tuple | list) and len(x) else None
    fits = isinstance(found, Tensor) and found.ndim == 2 and not found.is_floating_point()
    return found if fits and isinstance(found, Tensor) else None


def at_last_token(logits: Tensor, mask: Tensor | None) -> Tensor:
    """The logits (n, c) at the last position whose mask is not zero."""
    if mask is None or logits.shape[1] != mask.shape[1]:
        return logits[:, -1]
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask != 0, places, -1).amax(1).clamp_min(0)
    index = last[:, None, None].expand(-1, 1, logits.shape[2])
    return logits.gather(1, index)[:, 0]


@dataclass(frozen=True)
class Target:
    """What the loss compares the output with: next tokens, tokens, class numbers, two classes, or real targets.

    "weighted sum" is no loss, but Σ_j f_j(x) y_j with weights y (n, c) for each sample.

    ``given`` says that targets are in the batch; next tokens are also the inputs themselves.
    """

    kind: str
    given: bool = False

    @staticmethod
    def of(data: Data, out: Tensor, causal: bool, call: str) -> tuple["Target", Tensor | None, str]:
        """The loss for some data, its targets, and it in words. Raises TangentError where they do not fit."""
        y = data.y
        tokens = y is not None and y.ndim == 2 and not y.is_floating_point()
        if causal:
            return _next_tokens(data, y if tokens else None, call)
        if y is None:
            raise TangentError(
                f"{call}: the loss of each sample takes labels, and the data have none; give labels, too"
            )
        if out.ndim == 3:
            if not tokens or tuple(y.shape) != (len(y), out.shape[1]):
                raise TangentError(
                    f"{call}: the network's output is {tuple(out.shape)}, one for every token, and labels are "
                    f"{tuple(y.shape)}; give a label for every token ({_IGNORED} where there is none)"
                )
            _check_counted(y, y, data, call)
            return Target("tokens", True), y, "the mean cross-entropy of the tokens that have labels"
        c = out.shape[1] if out.ndim == 2 else 1
        if data.labels is not None and c > 1:
            low, high = int(y.min()), int(y.max())
            if low < 0 or high >= c:
                raise TangentError(
                    f"{call}: y holds the label {low if low < 0 else high}, but the network has {c} outputs; number the "
                    "classes from 0"
                )
            return Target("classes", True), y, "cross-entropy"
        if data.labels is not None:
            if not set(y.tolist()) <= {0, 1}:
                raise TangentError(
                    f"{call}: the network has one output and y holds class numbers up to {int(y.max())}; give 0 and 1, or "
                    "real targets as floats"
                )
            return Target("two classes", True), y, "cross-entropy of one logit"
        real = y[:, None] if y.ndim == 1 else y
        if real.shape[1] != c:
            raise TangentError(
                f"{call}: y has {real.shape[1]} target(s) per sample and the network {c} output(s); give one for each"
            )
        return Target("real", True), real, "the mean squared error of its outputs"

    def loss(self, out: Tensor, y: Tensor | None, ids: Tensor | None, mask: Tensor | None) -> Tensor:
        """The loss of every sample (n,)."""
        if self.kind == "next tokens":
            goal = y if y is not None else next_tokens(ids, mask)
            return mean_over_tokens(out[:, :-1], goal[:, 1:])
        assert y is not None
        if self.kind == "tokens":
            return mean_over_tokens(out, y)
        if self.kind == "weighted sum":
            return (out * y).sum(1)
        if self.kind == "classes":
            return functional.cross_entropy(out, y, reduction="none")
        flat = out if out.ndim == 2 else out[:, None]
        if self.kind == "two classes":
            return functional.binary_cross_entropy_with_logits(flat[:, 0], y.to(flat), reduction="none")
        return (flat - y.to(flat)).square().mean(1)


def next_tokens(ids: Tensor | None, mask: Tensor | None) -> Tensor:
    """The tokens as targets; padding, and what is predicted from padding, is not counted."""
    assert ids is not None
    if mask is None:
        return ids
    counted = mask != 0
    before = torch.cat([counted[:, :1], counted[:, :-1]], 1)
    return torch.where(counted & before, ids, _IGNORED)


def mean_over_tokens(logits: Tensor, goal: Tensor) -> Tensor:
    """The cross-entropy (n,) averaged over the tokens whose target is counted."""
    each = functional.cross_entropy(logits.transpose(1, 2), goal, reduction="none", ignore_index=_IGNORED)
    counted = (goal != _IGNORED).to(each)
    return (each * counted).sum(1) / counted.sum(1).clamp_min(1)


def _next_tokens(data: Data, y: Tensor | None, call: str) -> tuple[Target, Tensor | None, str]:
    ids = sequences(data.x)
    if ids is None:
        raise TangentError(
            f"{call}: a causal language model is measured on tokens, and x holds none as input_ids; got "
            f"{len(tensors(data.x))} tensors of other kinds"
        )
    if y is not None and y.shape != ids.shape:
        raise TangentError(
            f"{call}: labels of tokens are {tuple(y.shape)} and the tokens {tuple(ids.shape)}; give one for each"
        )
    mask = data.x.get("attention_mask") if isinstance(data.x, Mapping) else None
    goal = y if y is not None else next_tokens(ids, mask)
    _check_counted(goal[:, 1:], goal, data, call)
    words = "the mean cross-entropy of its next tokens, padding left out"
    return Target("next tokens", y is not None), y, words


def _check_counted(counted: Tensor, goal: Tensor, data: Data, call: str) -> None:
    """Raise TangentError for samples without a token that counts."""
    bad = ~(counted != _IGNORED).any(1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0, 0])
        raise TangentError(
            f"{call}: {data.told(first)} ({goal.shape[1]} tokens with padding) has no token whose loss counts; leave it out, "
            "or give it at least two tokens"
        )
