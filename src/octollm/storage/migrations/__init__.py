"""The steps that bring a database to the schema of this version, one folder per service.

A revision is a file ``rNNNN_name.py`` in the service's folder with ``revision``, ``down_revision`` and
``upgrade(op)``. Revisions are never changed once released, and import nothing of this project. They only add, so that
the version before goes on working beside this one; one that takes something away names in ``serves`` the oldest
revision whose code can still work with it.
"""

from octollm.storage.migrations.runner import Migrated, migrate
from octollm.storage.migrations.schema import Service, require_schema
from octollm.storage.migrations.service_database import database_url, migrate_all, service_database

__all__ = ["Migrated", "Service", "database_url", "migrate", "migrate_all", "require_schema", "service_database"]
