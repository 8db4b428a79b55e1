"""Column types and shapes that the tables share, and the orchestrator's ``MetaData``."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Column, Double, Integer, MetaData, String, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeEngine

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
"""Names of constraints, so that a migration can change them on either database."""

ORCHESTRATOR = MetaData(naming_convention=NAMING)

ID = String(64)
NAME = String(255)
TENANT = String(64)


def json_type() -> TypeEngine[Any]:
    """Return JSON, as JSONB on PostgreSQL; Python's ``None`` is SQL's NULL."""
    return JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def position() -> TypeEngine[int]:
    """Return a 64-bit integer that SQLite also takes as its rowid."""
    return BigInteger().with_variant(Integer(), "sqlite")


def tenant(*, primary_key: bool = False) -> Column[str]:
    """Return the column that every row of a tenant has."""
    return Column("tenant", TENANT, primary_key=primary_key, nullable=False)


def time(name: str, *, nullable: bool = False, primary_key: bool = False) -> Column[float]:
    """Return a column of epoch seconds."""
    return Column(name, Double(), primary_key=primary_key, nullable=nullable)


def text(name: str, *, nullable: bool = False) -> Column[str]:
    """Return a column of text without a length; empty unless it may be NULL."""
    return Column(name, Text(), nullable=nullable, server_default=None if nullable else "")


def number(name: str, default: int = 0) -> Column[int]:
    """Return a 64-bit integer column that is never NULL."""
    return Column(name, BigInteger(), nullable=False, server_default=str(default))


def amount(name: str, *, nullable: bool = False) -> Column[float]:
    """Return a column for money or a share."""
    return Column(name, Double(), nullable=nullable, server_default=None if nullable else "0")


def share(name: str) -> Column[float]:
    """Return a column for a share of 1, which is 1 by default."""
    return Column(name, Double(), nullable=False, server_default="1")
