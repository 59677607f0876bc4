"""The versions of a store's tables, for Alembic.

A new version is a file beside the others in `versions/`, with the next number in its name and as its `revision`; tables
of another module are one more line in `metadata.py`. `tests/server/test_migrations.py` fails until tables and versions
agree, and says where they differ. There is no way back to an older version: copy the database before.
"""
