"""What ``octollm`` offers, and what importing it costs."""

import subprocess
import sys

import pytest

import octollm
import octollm.testing

PUBLIC = {
    "Arm",
    "ArmError",
    "Artifact",
    "CallInfo",
    "Check",
    "Citation",
    "Context",
    "Evidence",
    "ExecuteResult",
    "FieldError",
    "FileRef",
    "Image",
    "Message",
    "ModelCompletion",
    "OctoError",
    "OperationReference",
    "RetryStep",
    "StopStep",
    "Task",
    "Tool",
    "ToolCall",
    "Usage",
    "APIError",
    "AsyncClient",
    "AuthenticationError",
    "Client",
    "Conflict",
    "DeadlineExceeded",
    "InvalidRequest",
    "NotFound",
    "OutputInvalid",
    "PermissionDenied",
    "RateLimited",
    "ServerError",
    "TaskCancelled",
    "TaskFailed",
    "Unavailable",
    "__version__",
    "coder",
    "connect",
    "connect_sync",
    "executor",
    "judge",
    "memory",
    "planner",
    "retriever",
}


def test_the_public_names_are_these():
    assert set(octollm.__all__) == PUBLIC
    assert set(dir(octollm)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_there(name):
    assert getattr(octollm, name) is not None


def test_another_name_is_answered_with_what_there_is():
    with pytest.raises(AttributeError, match="no attribute 'Arms'; it offers APIError, Arm, "):
        octollm.Arms  # noqa: B018  the access is what fails


TESTING = {"ArmTestClient", "FakeModel", "ManualClock", "RecordedCall", "ToolUse", "run_arm", "wait_until"}


def test_the_public_names_for_tests_are_these():
    assert set(octollm.testing.__all__) == TESTING
    assert all(hasattr(octollm.testing, name) for name in TESTING)


def test_importing_it_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import octollm; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name.partition(".")[0] for name in done.stdout.split()} <= {"octollm", *sys.stdlib_module_names}
    assert [name for name in done.stdout.split() if name.startswith("octollm.")] == ["octollm.lazy_exports"]
