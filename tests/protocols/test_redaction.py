"""Canaries: secrets that are logged in every way there is, and must come out in none."""

import io
import json
import logging
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.protocols.redaction import HIDDEN, JsonLines, Redacting, redacted

CANARY = "CANARY0canary"
PEM = f"-----BEGIN EC PRIVATE KEY-----\nMIGH{CANARY}\nAgEA\n-----END EC PRIVATE KEY-----"
SECRETS = {
    "token": f"fedapt1.MIGH{CANARY}.MII-_x.AAA",
    "pem": PEM,
    "pem in a repr": repr(PEM.encode()),
    "half a pem": PEM[:-30],
    "url": f"postgresql+psycopg://fedapt:{CANARY}@db.example.org/fedapt",
    "url with an odd password": f"postgresql://fedapt:a/b@{CANARY}@db/fedapt",
    "dsn": f"host=db user=fedapt password={CANARY} dbname=x",
    "quoted": f"password = 'a {CANARY}'",
    "variable": f"PGPASSWORD={CANARY}",
    "header": f"Authorization: Bearer {CANARY}",
}
each_secret = pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS.keys())
Formatters = Callable[[], logging.Formatter]
each_formatter = pytest.mark.parametrize("formatter", [JsonLines, logging.Formatter], ids=["json", "text"])


class Holder:
    def __init__(self, secret: str) -> None:
        self.secret = secret

    def __str__(self) -> str:
        return f"<{self.secret}>"


class Broken:
    def __str__(self) -> str:
        raise RuntimeError(CANARY)


class Keeping(logging.Handler):
    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__()
        self.records = records

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def logger() -> logging.Logger:
    """Of nobody's tree: no handler but the test's own sees its records."""
    return logging.Logger("fedapt.canary")  # noqa: LOG001


def logged(logger: logging.Logger, formatter: logging.Formatter, guarded: bool = True) -> io.StringIO:
    handler = logging.StreamHandler(stream := io.StringIO())
    handler.setFormatter(formatter)
    if guarded:
        handler.addFilter(Redacting())
    logger.addHandler(handler)
    return stream


def log_everywhere(logger: logging.Logger, secret: str) -> None:
    logger.info(secret)
    logger.info("joined with %s", secret)
    logger.info("joined with %r", {"deep": [secret]})
    logger.info("%s", Holder(secret))
    logger.info("%(this)s", {"this": secret})
    logger.info("extra", extra={"token": secret, "nested": {"a": [secret]}, "held": Holder(secret)})
    logger.info("stack", stack_info=True)
    try:
        try:
            raise ValueError(secret)
        except ValueError as error:
            raise RuntimeError(f"around {secret}") from error
    except RuntimeError:
        logger.exception("failed with %s", secret)


@each_secret
@each_formatter
def test_no_secret_comes_out(logger: logging.Logger, formatter: Formatters, secret: str) -> None:
    stream = logged(logger, formatter())
    log_everywhere(logger, secret)
    assert CANARY not in stream.getvalue()
    assert HIDDEN in stream.getvalue()
    assert "Traceback" in stream.getvalue()


@each_secret
def test_json_lines_hide_secrets_by_themselves(logger: logging.Logger, secret: str) -> None:
    stream = logged(logger, JsonLines(), guarded=False)
    log_everywhere(logger, secret)
    assert CANARY not in stream.getvalue()


@each_secret
def test_without_redaction_the_canary_sings(logger: logging.Logger, secret: str) -> None:
    stream = logged(logger, logging.Formatter(), guarded=False)
    log_everywhere(logger, secret)
    assert CANARY in stream.getvalue()


def test_a_handler_that_renders_exceptions_itself_finds_none(logger: logging.Logger) -> None:
    records: list[logging.LogRecord] = []
    handler = Keeping(records)
    handler.addFilter(Redacting())
    logger.addHandler(handler)
    log_everywhere(logger, SECRETS["token"])
    assert all(record.exc_info is None and not record.args for record in records)
    assert CANARY not in repr([vars(record) for record in records])


@given(st.text(alphabet="abcXYZ019-_.", min_size=1), st.text(), st.text())
def test_a_token_is_found_in_any_text(secret: str, before: str, after: str) -> None:
    hidden = redacted(f"{before} fedapt1.{CANARY}{secret} {after}")
    assert CANARY not in hidden
    assert redacted(hidden) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "fedapt 0.1.0 serves fl.example.org:9443",
        "https://example.org:8080/path",
        "-----BEGIN CERTIFICATE-----\nMII\n-----END CERTIFICATE-----",
        "the password is asked for",
        "node 17 of round 3: loss = 0.25, a@b.org",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_a_line_says_when_where_and_what(logger: logging.Logger) -> None:
    stream = logged(logger, JsonLines())
    logger.warning(
        "round %d\nis late", 3, extra={"node": 2**64 - 1, "run": "sst2", "round": 3, "share": 0.5, "late": True}
    )
    (line,) = stream.getvalue().splitlines()
    fields = json.loads(line)
    assert fields.pop("time").endswith("+00:00")
    assert fields == {
        "level": "WARNING",
        "logger": "fedapt.canary",
        "message": "round 3\nis late",
        "node": 2**64 - 1,
        "run": "sst2",
        "round": 3,
        "share": 0.5,
        "late": True,
    }


def test_extra_fields_do_not_forge_a_line(logger: logging.Logger) -> None:
    stream = logged(logger, JsonLines())
    logger.info("true", extra={"level": "CRITICAL", "logger": "other", "time": "never", "bad": float("nan")})
    fields = json.loads(stream.getvalue())
    assert (fields["level"], fields["logger"], fields["bad"]) == ("INFO", "fedapt.canary", "nan")
    assert fields["time"] != "never"


@each_formatter
def test_a_broken_record_is_written_and_stops_nobody(logger: logging.Logger, formatter: Formatters) -> None:
    stream = logged(logger, formatter())
    logger.info("%d", "no number")
    logger.info("%s", Broken())
    logger.info("broken", extra={"broken": Broken()})
    assert len(stream.getvalue().splitlines()) == 3
    assert "cannot be written" in stream.getvalue()
    assert CANARY not in stream.getvalue()
