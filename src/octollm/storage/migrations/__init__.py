"""The revisions of the database schemas, one folder for each service.

A revision is a file ``rNNNN_name.py`` in the service's folder with ``revision``, ``down_revision`` and
``upgrade(op)``. Revisions are never changed once released, and import nothing of this project. They normally only add,
so that the previous version keeps working during a rolling upgrade. One that removes something names in ``serves`` the
oldest revision whose code can still work with the schema.
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
