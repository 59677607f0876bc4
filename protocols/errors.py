"""Errors that a person can act on.

FedaptError              what went wrong, where, and the way out; the command line prints it and exits with 2
├── SpecError            the run's spec: unknown key, wrong type, impossible or illegal combination
├── DataError            a data source: missing, empty, malformed, wrong column or label
├── ModelError           a base model or adapter folder that cannot be loaded
├── OutputError          an output folder that cannot be written
├── PayloadError         bytes that are not what their codec and layout promise
├── PrivacyError         a privacy statement that is impossible, cannot be accounted, or would pass its cap
└── RunError             a run that cannot go on: nobody answered, or nothing was trained
"""


class FedaptError(Exception):
    """Base of all errors whose message is meant for the user."""


class SpecError(FedaptError):
    """The spec is wrong; the message names the key, the value and the nearest legal one."""


class DataError(FedaptError):
    """A data source cannot be used; the message names the source and, where there is one, the row."""


class ModelError(FedaptError):
    """A base model or an adapter cannot be loaded."""


class OutputError(FedaptError):
    """A file cannot be written."""


class PayloadError(FedaptError):
    """Received bytes do not fit their codec and layout."""


class PrivacyError(FedaptError):
    """A privacy statement cannot be made or kept; the message names the value, the limit and the way out."""


class RunError(FedaptError):
    """The run cannot go on."""
