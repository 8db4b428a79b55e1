"""From what a handler returns to what its operation answers."""

from __future__ import annotations

from typing import Any, is_typeddict

import msgspec

from octollm.arm.arm import ArmOperation
from octollm.arm.context import Context
from octollm.arm.declaring import EXECUTE
from octollm.contracts.task import ExecuteResult
from octollm.rpc.shapes import encode


def answer_type(declared: ArmOperation) -> Any:
    """Return the type that an operation answers: ``execute`` always an ``ExecuteResult``, others what they declare."""
    return ExecuteResult if declared.name == EXECUTE else declared.answer


def build_answer(declared: ArmOperation, returned: object, ctx: Context) -> object:
    """Return the answer for what a handler returned.

    What ``execute`` returns becomes the ``output``: text as it is, anything else as JSON. The files that were written
    and what the model used are told with it, unless the handler says so itself. Raises ``TypeError`` where the
    handler returned something else than the class that it declares.
    """
    wanted = declared.answer
    if isinstance(wanted, type) and not is_typeddict(wanted) and not _is_instance(returned, wanted):
        raise TypeError(f"{declared.name} declares {wanted.__name__} and returned {type(returned).__name__}")
    if declared.name != EXECUTE:
        return returned
    if not isinstance(returned, ExecuteResult):
        output = returned if isinstance(returned, str) else encode(returned).decode()
        returned = ExecuteResult(output, artifacts=ctx.artifacts.list())
    if returned.usage.total_tokens == 0:
        returned = msgspec.structs.replace(returned, usage=ctx.model.usage)
    return returned


def _is_instance(value: object, wanted: type) -> bool:
    return isinstance(value, (int, float) if wanted is float else wanted)
