"""All that is kept in a server's database, as the code has it; `versions/` must come to the same."""

from sqlalchemy import MetaData

from ...privacy import chain
from .. import log, registry
from ..store import tables

TABLES: list[MetaData] = [
    chain.Tables.metadata,
    tables.Tables.metadata,
    registry.Tables.metadata,
    log.Tables.metadata,
]
