"""What the library raises and warns with: every message names the call, what came, and the remedy."""

from collections.abc import Iterator
from contextlib import contextmanager


class TangentError(ValueError):
    """A request that cannot be answered; the message says the call, the cause and what to do."""


class TangentWarning(UserWarning):
    """A result that was returned but does not meet what was asked, such as a fit that did not converge."""


@contextmanager
def raised_as(call: str, *inner: str) -> Iterator[None]:
    """Errors of the functions ``inner``, called within, name ``call`` instead: the function that the user called."""
    try:
        yield
    except TangentError as error:
        name, colon, rest = str(error).partition(": ")
        if colon and name in inner:
            error.args = (f"{call}: {rest}",)
        raise
