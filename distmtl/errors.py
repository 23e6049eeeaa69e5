"""The one error a user is meant to read."""


class DistmtlError(ValueError):
    """What is wrong, where, and how to mend it, in one message. Never retried: running the same thing again cannot help."""
