"""What the exceptions of other people's clients say: an SDK that was pointed at ``models`` carries our problems."""

from __future__ import annotations

import msgspec

from octollm.contracts.problems import ERROR_KINDS, Problem
from octollm.errors import RemoteError
from octollm.rpc.problems import remote_error

_MAX_CAUSES = 8
"""How far the causes of an exception are followed."""


def extract_problem(error: BaseException | None) -> RemoteError | None:
    """Return the problem that ``models`` answered, if ``error`` comes of one: OpenAI's SDK keeps it as ``body``."""
    for _ in range(_MAX_CAUSES):
        if error is None:
            return None
        try:
            problem = msgspec.convert(getattr(error, "body", None), Problem)
        except msgspec.ValidationError:
            error = error.__cause__ or error.__context__
            continue
        return remote_error(problem, "models") if problem.code in ERROR_KINDS else None
    return None
