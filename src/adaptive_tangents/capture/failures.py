"""A model that fails on a batch, in words: what it was given, what it said, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from adaptive_tangents.capture.batches import Batch, described, samples, take
from adaptive_tangents.capture.network import Network
from adaptive_tangents.errors import TangentError, UnfitOutput

_LONGEST = 400  # characters of a foreign message


@contextmanager
def worded(net: Network, x: Batch) -> Iterator[None]:
    """Within this context, errors of the model become TangentErrors that speak of the user's batch ``x``."""
    try:
        yield
    except UnfitOutput as error:
        raise _found(net, x, error) from error
    except (TangentError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # `error` only: what the search for its cause raised says the same again.
        raise _found(net, x, error) from error


def _found(net: Network, x: Batch, error: Exception) -> Exception:
    """The error to raise: of the whole batch, of one sample of it, or of what capturing adds to a pass."""
    whole = _failure(net, x)
    if isinstance(whole, TangentError):
        return TangentError(str(whole))
    if whole is not None:
        return TangentError(
            f"{net.call}: the model fails on {described(x)} ({words(whole)}); {_remedy(net.model, whole)}"
        )
    n = samples(x)
    for k in (1, *range(2, 8)):
        part = _failure(net, take(x, slice(0, k))) if k < n else None
        if part is not None:
            some = "one sample" if k == 1 else f"{k} samples"
            said = (
                str(part).removeprefix(f"{net.call}: ").partition("; pass")[0] if isinstance(part, TangentError) else ""
            )
            return TangentError(
                f"{net.call}: the model runs on all {n} samples of x but not on {some} of it ({said or words(part)}); "
                "features are of one sample at a time, so take out what fixes or drops the samples' dimension, such as "
                "squeeze(), a constant batch size or one graph over all samples"
            )
    if isinstance(error, RuntimeError | NotImplementedError):
        return TangentError(
            f"{net.call}: the model runs on x, but its derivatives cannot be computed ({words(error)}); replace the "
            "operation, or leave out with wrt the parameters before it"
        )
    return error


def _failure(net: Network, x: Batch) -> Exception | None:
    """The error with which a model fails on a batch."""
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
            net(x, {})
    except Exception as error:
        return error
    return None


def words(error: Exception) -> str:
    """The message of a foreign error on one line."""
    text = " ".join(str(error).partition("\nException raised from")[0].split()).rstrip(".")
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + " …"
    kind = "" if isinstance(error, RuntimeError) and text else type(error).__name__
    return f"{kind}: {text}" if kind and text else kind or text


def _remedy(model: nn.Module, error: Exception) -> str:
    if isinstance(error, NotImplementedError) and "forward" in str(error):
        return f"pass a module with a forward of its own, not {type(model).__name__}"
    if isinstance(error, TypeError):
        return "x holds the arguments of one call of the model, without targets: a tuple by position, a dict by name"
    return "pass x in the shape and dtype that the model takes"
