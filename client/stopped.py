"""What ends a piece of work that nobody is to hear of."""


class StoppedWork(BaseException):
    """The work in hand was called off. No Exception, so that nobody takes it for a round that failed."""
