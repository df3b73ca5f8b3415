"""A model that fails on a batch, in words: what it was given, what it said, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from adaptive_tangents.capture.batches import Batch, described, samples, take, tensors
from adaptive_tangents.capture.network import Network
from adaptive_tangents.errors import TangentError, UnfitOutput

# What torch and Python say of arguments that do not fit; a model's other errors are its own affair.
_TORCHS = (RuntimeError, TypeError, ValueError, IndexError, AssertionError, AttributeError)
_BACKWARD = (RuntimeError, AssertionError)  # what a backward pass raises
_LONGEST = 400  # characters of a foreign message
_MOST = 1000  # samples on which a failure is tried again
_FEWEST = 7  # up to so many samples are tried by themselves


@contextmanager
def worded(net: Network, x: Batch, part: Batch | None = None) -> Iterator[None]:
    """Within this context, errors of the model on ``part`` of x become TangentErrors that speak of the user's batch x."""
    try:
        yield
    except UnfitOutput as error:
        raise _found(net, x, part, error) from error
    except (TangentError, MemoryError, torch.OutOfMemoryError):
        raise
    except _TORCHS as error:
        raise _found(net, x, part, error) from error


def _found(net: Network, x: Batch, part: Batch | None, error: Exception) -> Exception:
    """The error to raise: of the whole batch, of a few samples of it, or of what capturing adds to a pass."""
    total, some = samples(x), x if part is None else part
    if samples(some) > _MOST:
        spread = torch.linspace(0, samples(some) - 1, _MOST, device="cpu").long()
        some = take(some, spread.to(tensors(x)[0].device))
    n = samples(some)
    whole = _failure(net, some)
    if isinstance(whole, TangentError):
        return TangentError(str(whole))
    if whole is not None:
        given = described(x) + (f", in {n} samples of it" if n < total else "")
        return TangentError(f"{net.call}: the model fails on {given} ({words(whole)}); {_remedy(net.model, whole)}")
    for k in range(1, min(n, _FEWEST + 1)):
        fewer = _failure(net, take(some, slice(0, k)))
        if fewer is not None:
            return TangentError(
                f"{net.call}: the model runs on {'all ' if n == total else ''}{n} samples of x but not on "
                f"{'one sample' if k == 1 else f'{k} samples'} of it ({_own_words(fewer)}); features are of one sample at a "
                "time, so take out what fixes or drops the samples' dimension, such as squeeze(), a constant batch size (an "
                "export without dynamic_shapes) or one graph over all samples"
            )
    if isinstance(error, _BACKWARD):
        return TangentError(
            f"{net.call}: the model runs on {'x' if n == total else f'{n} samples of x'}, but its derivatives cannot be "
            f"computed ({words(error)}); replace the operation, or leave out with wrt the parameters before it"
        )
    return error


def _failure(net: Network, x: Batch) -> Exception | None:
    """The error with which a model fails on a batch."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            net(x, {})
    except Exception as error:
        return error
    return None


def words(error: Exception) -> str:
    """The message of a foreign error on one line."""
    text = str(error)
    for start in (
        "\nException raised from",
        ". This could be because the operator",
    ):  # of torch's advice to its developers
        text = text.partition(start)[0]
    text = " ".join(text.split()).rstrip(".")
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + " …"
    kind = "" if isinstance(error, RuntimeError) and text else type(error).__name__
    return f"{kind}: {text}" if kind and text else kind or text


def _own_words(error: Exception) -> str:
    """The same, of an error of this library without its call and remedy."""
    if isinstance(error, TangentError):
        return str(error).partition(": ")[2].partition("; ")[0]
    return words(error)


def _remedy(model: nn.Module, error: Exception) -> str:
    if isinstance(error, NotImplementedError) and "forward" in str(error):
        return f"pass a module with a forward of its own, not {type(model).__name__}"
    if isinstance(error, TypeError):
        return (
            "x holds the arguments of one call of the model, without targets: a tuple by position, a dict by name, and "
            "(x,) for one argument that is a container"
        )
    return "pass x in the shape and dtype that the model takes"
