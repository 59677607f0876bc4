"""How a wait is called off."""

POLL_SECONDS = 0.2
"""How often a wait looks whether it has been called off, or a node is gone for good; answers need no polling."""


class StoppedError(Exception):
    """The run was called off while its grid waited."""
