"""SQL and Redis: engines, tables, migrations, and every key in one file.

The scheme of a URL selects the backend, and errors of other libraries are translated here. What the stored data means,
and every rule about it, belongs to the layers above.
"""

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
from octollm.storage.redis import MemoryServers, RedisClient, open_redis
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
