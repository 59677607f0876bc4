"""What a resident process says: lines for people, or JSON for machines, and in neither a secret."""

import logging
from typing import TextIO

from .protocols.redaction import JsonLines, Redacting

LINE = "%(asctime)s %(levelname)-7s %(message)s"


def log_to(stream: TextIO, *, as_json: bool) -> None:
    """Send what fedapt logs to `stream`: from INFO on its own, from WARNING on that of its libraries."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines() if as_json else logging.Formatter(LINE, "%Y-%m-%d %H:%M:%S"))
    handler.addFilter(Redacting())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("fedapt").setLevel(logging.INFO)
