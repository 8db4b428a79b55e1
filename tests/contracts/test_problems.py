"""What a failure says of another try: on the wire, and to a step that may make another attempt."""

from __future__ import annotations

import pytest

from octollm.contracts.problems import ERROR_KINDS, allows_new_attempt, to_problem
from octollm.errors import OctoError, RemoteError


class _StopError(OctoError):
    @property
    def retryable(self) -> bool:
        return False


class _RetryError(OctoError):
    @property
    def retryable(self) -> bool:
        return True


def _remote(code: str, *, retryable: bool) -> RemoteError:
    return RemoteError("no", code=code, status=503, retryable=retryable)


@pytest.mark.parametrize("code", ERROR_KINDS)
def test_a_code_says_whether_the_same_request_can_help(code: str) -> None:
    assert to_problem(OctoError("no", code=code)).retryable is ERROR_KINDS[code].retryable


def test_an_error_that_knows_better_than_its_code_is_heeded() -> None:
    assert to_problem(_StopError("no", code="unavailable")).retryable is False
    assert to_problem(_RetryError("not now", code="state_conflict")).retryable is True
    assert to_problem(_remote("model_failed", retryable=False)).retryable is False


@pytest.mark.parametrize(
    "code",
    [
        "authority_missing",
        "budget_exhausted",
        "cancelled",
        "context_too_long",
        "deadline_exceeded",
        "fence_lost",
        "file_invalid",
        "file_not_found",
        "goal_invalid",
        "goal_refused",
        "no_model",
        "no_sandbox",
        "outcome_unknown",
        "scope_missing",
        "state_conflict",
        "token_revoked",
    ],
)
def test_no_attempt_follows_a_failure_that_it_would_only_repeat(code: str) -> None:
    assert not allows_new_attempt(OctoError("no", code=code))
    assert not allows_new_attempt(_remote(code, retryable=False))


@pytest.mark.parametrize(
    "code",
    ["internal", "model_output_invalid", "not_accepted", "peer_protocol", "plan_invalid", "token_expired"],
)
def test_an_attempt_follows_a_failure_that_the_attempt_itself_brought_about(code: str) -> None:
    assert allows_new_attempt(_remote(code, retryable=False))


def test_otherwise_the_problem_document_decides() -> None:
    assert allows_new_attempt(_remote("model_failed", retryable=True))
    assert not allows_new_attempt(_remote("model_failed", retryable=False))
    assert allows_new_attempt(_remote("out_of_stock", retryable=True))
    assert not allows_new_attempt(_remote("out_of_stock", retryable=False))
    assert allows_new_attempt(_RetryError("not now", code="state_conflict"))
