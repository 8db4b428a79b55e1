"""Translation of other libraries' exceptions at their boundary."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from octollm.errors import OctoError, map_exceptions, map_file_errors
from octollm.http_transport import TRANSPORT_ERRORS


def to_octo_error(error: LookupError) -> OctoError | None:
    return None if isinstance(error, IndexError) else OctoError(f"It lacks {error}.", code="unavailable")


def test_a_function_translates_and_keeps_the_cause() -> None:
    with pytest.raises(OctoError, match="It lacks 'x'") as caught, map_exceptions(to_octo_error, LookupError):
        raise KeyError("x")
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_exception_that_the_function_leaves_and_one_of_another_type_pass_unchanged() -> None:
    with pytest.raises(IndexError), map_exceptions(to_octo_error, LookupError):
        raise IndexError
    with pytest.raises(ValueError, match="bare"), map_exceptions(to_octo_error, LookupError):
        raise ValueError("bare")


def test_the_first_translation_is_final() -> None:
    outer = map_exceptions(OctoError("outer", code="internal"), ValueError, KeyError)
    with pytest.raises(OctoError, match="It lacks"), outer, map_exceptions(to_octo_error, LookupError):
        raise KeyError("x")


async def test_a_cancellation_is_never_translated() -> None:
    async def wait() -> None:
        with map_exceptions(OctoError("translated"), Exception):
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_file_error_names_the_file_and_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "missing"
    with (
        pytest.raises(OctoError, match=r"missing cannot be read: No such file or directory\.") as caught,
        map_file_errors(path, "read", code="file_invalid"),
    ):
        path.read_bytes()
    assert caught.value.code == "file_invalid"


def test_errors_of_the_file_system_are_not_failures_of_a_transport() -> None:
    # A download writes to the disk inside the same block.
    with pytest.raises(FileNotFoundError), map_exceptions(OctoError("translated"), *TRANSPORT_ERRORS):
        raise FileNotFoundError
