"""What the library raises and warns with: every message names the call, what came, and the remedy."""


class TangentError(ValueError):
    """A request that cannot be answered; the message says the call, the cause and what to do."""


class TangentWarning(UserWarning):
    """A result that was returned but does not meet what was asked, such as a fit that did not converge."""
