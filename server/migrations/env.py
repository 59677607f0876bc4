"""Run by Alembic, inside the transaction of `fedapt.server.store.migrating`."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
