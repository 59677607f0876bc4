"""What a resident process says: lines for people, or JSON for machines, and in neither a secret."""

import logging
import re
from typing import TextIO

from .protocols.redaction import JsonLines, Redacting

LINE = "%(asctime)s %(levelname)-7s %(message)s"


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class Lines(logging.Formatter):
    """One line a message, whatever a peer has put into it: its text could write lines, or to a terminal, of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging calls it)
        return _CONTROL.sub(lambda found: repr(found[0])[1:-1], super().formatMessage(record))


def log_to(stream: TextIO, *, as_json: bool) -> None:
    """Send what fedapt logs to `stream`: from INFO on its own, from WARNING on that of its libraries."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines() if as_json else Lines(LINE, "%Y-%m-%d %H:%M:%S"))
    handler.addFilter(Redacting())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("fedapt").setLevel(logging.INFO)
