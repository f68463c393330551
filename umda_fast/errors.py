"""Errors that name what was wrong. Lowest floor: every other module may import it."""


class DataError(ValueError):
    """A user's file or array cannot be used; the message says what, where, and what was expected."""


class BackendUnavailableError(RuntimeError):
    """A backend named explicitly cannot serve the call; the message lists every reason."""


class ProcessLostError(RuntimeError):
    """Another process of the same run ended, or did not answer in time."""
