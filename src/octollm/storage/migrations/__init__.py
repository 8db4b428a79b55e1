"""The steps that bring a database to the schema of this version, one folder per service.

A revision is a file ``rNNNN_name.py`` in the service's folder with ``revision``, ``down_revision`` and
``upgrade(op)``. Revisions are never changed once released, and import nothing of this project.
"""

from octollm.storage.migrations.runner import Service, migrate

__all__ = ["Service", "migrate"]
