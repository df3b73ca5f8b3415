"""The library's error and its warning. Every message names the call, what was passed, and the remedy."""

from collections.abc import Iterator
from contextlib import contextmanager


class TangentError(ValueError):
    """The library cannot do what was asked; the message names the call, the cause and what to do."""


class UnfitOutput(TangentError):
    """What the model returned for some samples is not a tensor (n, c)."""


class TangentWarning(UserWarning):
    """A result is returned but misses what was asked, such as a fit that did not converge."""


@contextmanager
def raised_as(call: str, *inner: str) -> Iterator[None]:
    """Within this context, errors of the functions ``inner`` name ``call``, the function that the user called."""
    try:
        yield
    except TangentError as error:
        name, colon, rest = str(error).partition(": ")
        if colon and name in inner:
            error.args = (f"{call}: {rest}",)
        raise
