"""What a log may show: no join token, no private key, no password.

`Redacting` is a filter for handlers: it renders a record, the traceback in it too, and keeps what is left without
secrets, so any formatter may follow it. `JsonLines` writes one JSON object for each record, and redacts by itself.

A secret is found by its shape. One without a shape (a password in plain prose) is not: do not log it.
"""

import json
import logging
import re
from datetime import UTC, datetime
from typing import Any

HIDDEN = "[hidden]"

_SHAPES = (
    # In an error's repr a line's end is two characters, and a cut text has no END line: all to the end is hidden then.
    (
        re.compile(r"-----BEGIN[^-]{0,40}PRIVATE KEY-----.*?(?:-----END[^-]{0,40}PRIVATE KEY-----|\Z)", re.DOTALL),
        HIDDEN,
    ),
    (re.compile(r"fedapt\d+\.[\w.=-]+"), HIDDEN),
    # Up to the last @ of the word: a password may hold slashes and more.
    (re.compile(r"(://[^\s:/@]*:)\S*@"), rf"\1{HIDDEN}@"),
    (
        re.compile(
            r"""(\b\w*(?:password|passwd|passphrase|secret)["']?\s*[=:]\s*)("[^"]*"?|'[^']*'?|[^\s,;&)}\]]+)""",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    (
        re.compile(r"(\bauthorization\b[\"']?\s*[=:]\s*[\"']?(?:bearer|basic)\s+)[^\s\"',]+", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
)
_OF_EACH_RECORD = {*vars(logging.makeLogRecord({})), "message", "asctime"}


def redacted(text: str) -> str:
    """The text without its secrets. What was redacted before stays as it is."""
    for shape, instead in _SHAPES:
        text = shape.sub(instead, text)
    return text


class Redacting(logging.Filter):
    """Takes the secrets out of a record's message, arguments, traceback and extra fields. It drops no record.

    Add it to handlers: a logger's filter does not see what the loggers below it log.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = _message(record), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        # Some handlers (rich's) render the exception itself, and would find the secret there.
        record.exc_info = None
        record.exc_text = record.exc_text and redacted(record.exc_text)
        record.stack_info = record.stack_info and redacted(record.stack_info)
        for name, value in _extra(record).items():
            setattr(record, name, value)
        return True


class JsonLines(logging.Formatter):
    """One line of JSON for each record: `time` (UTC, ISO 8601), `level`, `logger`, `message`, and `exception` and
    `stack` where there are any. What was given as `extra`, for instance node, run and round, stands beside them;
    an extra field cannot take the place of one of these."""

    def format(self, record: logging.LogRecord) -> str:
        exception = record.exc_text
        if record.exc_info and not exception:
            exception = self.formatException(record.exc_info)
        fields = {
            **_extra(record),
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
        }
        fields |= {"exception": redacted(exception)} if exception else {}
        fields |= {"stack": redacted(record.stack_info)} if record.stack_info else {}
        return json.dumps(fields, ensure_ascii=False)


def _message(record: logging.LogRecord) -> str:
    """A call with the wrong arguments must not end the program that logs."""
    try:
        return redacted(record.getMessage())
    except Exception as error:  # noqa: BLE001 (it may raise anything)
        return f"a message that cannot be written ({type(error).__name__}), from {record.pathname}:{record.lineno}"


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller added. Whatever is no number becomes text, because only text can be redacted."""
    # Libraries that patch logging (Ray's does) mark what they add to each record with an underscore.
    names = [name for name in vars(record) if name not in _OF_EACH_RECORD and not name.startswith("_")]
    added = {name: getattr(record, name) for name in names}
    return {
        name: value if value is None or type(value) in (bool, int) else _shown(value) for name, value in added.items()
    }


def _shown(value: object) -> str | float:
    if type(value) is float and abs(value) < float("inf"):  # JSON has no NaN and no infinity
        return value
    try:
        return redacted(str(value))
    except Exception as error:  # noqa: BLE001 (it may raise anything)
        return f"a value that cannot be written ({type(error).__name__})"
