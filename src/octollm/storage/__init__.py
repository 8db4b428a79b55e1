"""SQL and Redis: engines, tables, migrations, and every key in one file.

The scheme of a URL selects the backend, and errors of other libraries are translated here. What the stored data means,
and every rule about it, belongs to the layers above.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from octollm.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from octollm.storage.database import (
        Database,
        DatabaseConnection,
        DirectPool,
        Rows,
        Transaction,
        is_due,
        is_lease_over,
        row_to_dict,
    )
    from octollm.storage.engines import open_database
    from octollm.storage.keys import RedisKeys
    from octollm.storage.redis import open_redis
    from octollm.storage.redis_memory import MemoryServers
    from octollm.storage.redis_protocol import RedisClient
    from octollm.storage.text_stream import TextEntry, TextStream

__all__ = [
    "Database",
    "DatabaseConnection",
    "DirectPool",
    "MemoryServers",
    "RedisClient",
    "RedisKeys",
    "Rows",
    "TextEntry",
    "TextStream",
    "Transaction",
    "is_due",
    "is_lease_over",
    "open_database",
    "open_redis",
    "row_to_dict",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "octollm.storage.database": (
                "Database",
                "DatabaseConnection",
                "DirectPool",
                "Rows",
                "Transaction",
                "is_due",
                "is_lease_over",
                "row_to_dict",
            ),
            "octollm.storage.engines": ("open_database",),
            "octollm.storage.keys": ("RedisKeys",),
            "octollm.storage.redis": ("open_redis",),
            "octollm.storage.redis_memory": ("MemoryServers",),
            "octollm.storage.redis_protocol": ("RedisClient",),
            "octollm.storage.text_stream": ("TextEntry", "TextStream"),
        },
    )
