"""A capable model's opinion of a result, where nothing can be checked by running or looking up."""

from __future__ import annotations

import msgspec

from octollm.contracts.asking import PromptFunction, PromptMessage, system, user
from octollm.contracts.operations import AcceptRequest, AcceptResult
from octollm.errors import OctoError

MAX_SHOWN_CHARS = 6000
MAX_OPINION_TOKENS = 200
_OPINION_PROMPT = (
    "You judge whether a result does what was asked and meets every criterion. Be strict about what is missing or "
    "wrong, not about style. Reply with JSON; give a short reason when it does not."
)
_OPINION_SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {
        "reason": {"type": "string", "maxLength": 300},
        "accepted": {"type": "boolean"},
    },
    "required": ["reason", "accepted"],
    "additionalProperties": False,
}


class _Opinion(msgspec.Struct, frozen=True):
    accepted: bool
    reason: str = ""


async def ask_opinion(request: AcceptRequest, ask: PromptFunction) -> AcceptResult:
    """Return what the model thinks of the result. Raises ``OctoError`` (``model_output_invalid``) if it is not JSON."""
    answer = await ask(_opinion_messages(request), max_tokens=MAX_OPINION_TOKENS, schema=_OPINION_SCHEMA)
    try:
        said = msgspec.json.decode(answer.encode(), type=_Opinion)
    except msgspec.DecodeError as exc:
        raise OctoError("The model's verdict could not be read.", code="model_output_invalid") from exc
    reasons = () if said.accepted else (said.reason.strip() or "The result does not do what was asked.",)
    return AcceptResult(accepted=said.accepted, reasons=reasons, score=1.0 if said.accepted else 0.0)


def _opinion_messages(request: AcceptRequest) -> list[PromptMessage]:
    criteria = "".join(f"\n- {criterion}" for criterion in request.criteria[:10])
    listed = f"\n\nCriteria:{criteria}" if criteria else ""
    shown = request.result.output[:MAX_SHOWN_CHARS]
    # The result may hold text that speaks to the judge; the marks say where it begins and ends.
    return [system(_OPINION_PROMPT), user(f"Asked:\n{request.goal}{listed}\n\n<result>\n{shown}\n</result>")]
