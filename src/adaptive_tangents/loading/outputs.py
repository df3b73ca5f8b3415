"""Which tensor of what a network returns is its output, and what is measured of it instead, if asked for."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_tangents.capture.batches import Batch, arguments, samples, take
from adaptive_tangents.capture.lease import on_loan
from adaptive_tangents.capture.recording import recorded_if_needed
from adaptive_tangents.capture.returned import found_output, held
from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading.data import Data
from adaptive_tangents.loading.models import load_function
from adaptive_tangents.loading.reduced import LAST_TOKEN, LOSS, Reduced, Target, sequences
from adaptive_tangents.loading.words import INSPECT

Output = str | Callable[[Any], Tensor]


def pick(out: Any, call: str = INSPECT) -> Tensor:
    """The output tensor (n, c): what the network returns, its `logits`, or the first of several outputs."""
    out = found_output(out)
    if isinstance(out, tuple | list) and out:
        out = found_output(out[0])
    if not isinstance(out, Tensor):
        raise TangentError(
            f"{call}: the network returned {type(out).__name__}; write a factory whose network returns a tensor (n, c), or "
            f"something with .logits, or give --output module:function, which picks it{held(out)}"
        )
    rows: Tensor = out[:, None] if out.ndim == 1 else out
    if rows.ndim != 2:
        raise TangentError(
            f"{call}: the network's output has shape {tuple(out.shape)}, expected (n, c), one row per sample; write a "
            "factory whose network returns that, or give --output module:function, which makes it of the output"
        )
    return rows


def output_of(
    name: Output | None, model: nn.Module, data: Data, call: str = INSPECT, *, causal: bool | None = None
) -> tuple[nn.Module, Data]:
    """The network and data with which what ``name`` says is measured; parameters keep their names.

    Args:
        name: None or "auto" for the network's own output, and for a causal language model the loss of each sequence; "loss",
            "last-token" (the logits at the last token that is no padding), "module:function" or "path.py:function", or in
            Python a function of what the network returns, which gives (n, c).
        model: the network, which stays as it is.
        data: samples in its form (`fit_data`).
        call: the call that errors name.
        causal: whether it is a causal language model; None finds out if it gives logits of every token.

    Raises:
        TangentError: if the output is not what ``name`` needs.

    >>> model, data = output_of("loss", nn.Linear(3, 2), Data(torch.randn(4, 3), torch.tensor([0, 1, 1, 0])))
    >>> model(*data.x).shape
    torch.Size([4, 1])
    """
    if callable(name):
        return _by_function(name, getattr(name, "__name__", "a function"), model, data, call)
    if name not in (None, "auto", LOSS, LAST_TOKEN):
        assert isinstance(name, str)
        if ":" not in name:
            raise TangentError(
                f"{call}: --output is {LOSS}, {LAST_TOKEN}, module:function or path/to/file.py:function, got {name!r}"
            )
        return _by_function(load_function(name, call), name, model, data, call)
    out = found_output(first_output(model, data.x))
    out = found_output(out[0]) if isinstance(out, tuple | list) and out else out
    positions = isinstance(out, Tensor) and out.ndim == 3 and sequences(data.x) is not None
    data = _of_one_output(data, out)
    if name in (None, "auto") and not positions:
        return model, data
    if not isinstance(out, Tensor):
        pick(out, call)
    assert isinstance(out, Tensor)
    causal = positions and (_is_causal(model, data.x) if causal is None else causal)
    if name in (None, "auto") and not causal:
        raise TangentError(
            f"{call}: the network gives logits {tuple(out.shape)} at every token, and they depend on later tokens, so the "
            f"next token is no target; give --output {LOSS} with a label for every token, or --output module:function"
        )
    if name == LAST_TOKEN:
        if not positions:
            raise TangentError(
                f"{call}: --output {LAST_TOKEN} is of networks that give logits of every token (n, tokens, c) for input_ids; "
                f"this one gives {tuple(out.shape)}"
            )
        sentence = "The output measured is the logits at the last token of each sample."
        return Reduced(model, LAST_TOKEN, Target("none")), _noted(_without_token_labels(data), sentence)
    return _by_loss(model, data, out, causal, call)


def _by_loss(model: nn.Module, data: Data, out: Tensor, causal: bool, call: str) -> tuple[nn.Module, Data]:
    target, y, words = Target.of(data, out, causal, call)
    network = Reduced(model, LOSS, target)
    given = replace(data, x=network.with_targets(data.x, y), y=None, classes=None, loss=True)
    unused = ". The labels of the data are not used" if y is None and data.y is not None else ""
    return network, _noted(given, f"The output measured is the loss of each sample: {words}{unused}.")


def _noted(data: Data, sentence: str) -> Data:
    return replace(data, notes=(sentence, *data.notes))


def _of_one_output(data: Data, out: Any) -> Data:
    """The data with whole numbers of a table as real targets, if that is what they are for one output."""
    one = isinstance(out, Tensor) and (out.ndim == 1 or (out.ndim == 2 and out.shape[1] == 1))
    if not one or not data.whole_numbers or data.labels is None:
        return data
    sentence = "The network has one output, so labels, which are more than two whole numbers, are real targets."
    return _noted(replace(data, y=data.labels.to(out.dtype.to_real())), sentence)


def _without_token_labels(data: Data) -> Data:
    return replace(data, y=None) if data.y is not None and data.y.ndim == 2 and not data.y.is_floating_point() else data


def _by_function(
    function: Callable[[Any], Any], name: str, model: nn.Module, data: Data, call: str
) -> tuple[nn.Module, Data]:
    network = Reduced(model, function, Target("none"))
    try:
        out = first_output(network, data.x)
    except TangentError:
        raise
    except Exception as error:  # a user's function
        raise TangentError(
            f"{call}: the output function {name} failed with {type(error).__name__}: {error}; it takes what the network "
            "returns and gives a tensor (n, c)"
        ) from error
    few = min(2, samples(data.x))
    if not isinstance(out, Tensor) or out.ndim not in (1, 2) or len(out) != few or not out.is_floating_point():
        got = f"{tuple(out.shape)} {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
        raise TangentError(
            f"{call}: the output function {name} gave {got} for {few} samples; it must give real numbers (n, c), "
            "one row a sample"
        )
    data = _of_one_output(_without_token_labels(data), out)
    return network, _noted(data, f"The output measured is that of {name}.")


def first_output(model: nn.Module, x: Batch) -> Any:
    """What the network returns for two samples; the network is left as it is."""
    few = take(x, slice(0, 2))

    def run(recorded: bool) -> Any:
        given, keywords = arguments(model, take(few, None))
        return model(*given, **keywords)

    def runs(loan: Any) -> Any:
        with torch.no_grad():
            return recorded_if_needed(run)

    return on_loan(model, runs)


def _is_causal(model: nn.Module, x: Batch) -> bool:
    """Whether logits of earlier tokens stay as they are when the last token changes."""
    few, other = (
        dict(part) if isinstance(part, Mapping) else part
        for part in (take(take(x, slice(0, 1)), None) for _ in range(2))
    )
    ids = sequences(few)
    assert ids is not None
    if ids.shape[1] < 2:
        return True
    changed = sequences(other)
    assert changed is not None
    changed[:, -1] = torch.where(ids[:, -1] == 0, 1, 0)
    for each in (few, other):
        if isinstance(each, dict) and "attention_mask" in each:
            each["attention_mask"] = torch.ones_like(ids)
    outs = [found_output(first_output(model, each)) for each in (few, other)]
    before, after = ((out[0] if isinstance(out, tuple | list) else out)[:, :-1] for out in outs)
    return bool((before - after).abs().max() <= 1e-5 * before.abs().max())
