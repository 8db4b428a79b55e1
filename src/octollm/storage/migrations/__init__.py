"""The steps that bring a database to the schema of this version, one folder per service.

A revision is a file ``rNNNN_name.py`` in the service's folder with ``revision``, ``down_revision`` and
``upgrade(op)``. Revisions are never changed once released, and import nothing of this project. They only add, so that
the version before goes on working beside this one; one that takes something away names in ``serves`` the oldest
revision whose code can still work with it.
"""

from octollm.storage.migrations.runner import (
    DatabaseService,
    MigrationResult,
    database_url,
    migrate,
    migrate_all,
    open_service_database,
    require_schema,
)

__all__ = [
    "DatabaseService",
    "MigrationResult",
    "database_url",
    "migrate",
    "migrate_all",
    "open_service_database",
    "require_schema",
]
