"""Which spans of a trace are a task's. No I/O.

A trace may be shared: a client chooses its id, and one client may submit several tasks in it, or may name a trace of
somebody else's. So a span is a task's by what a built-in service said of it, or by standing in line with such a span.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SpanOwnership:
    """Where one span is: ``tenant`` and ``task`` are empty where no built-in service named them."""

    span_id: str
    parent_id: str
    tenant: str = ""
    task: str = ""


def select_task_spans(candidates: Sequence[SpanOwnership], tenant: str, task: str) -> list[int]:
    """Return the indexes of the spans of one trace that belong to ``task`` of ``tenant``, in their order.

    They are those that name both; the spans above one, as far as they are the tenant's own and no other task's (how
    it was submitted); and the spans below one that name nobody else (what was done in a service's own name).
    """
    by_id: dict[str, list[int]] = defaultdict(list)
    below: dict[str, list[int]] = defaultdict(list)
    for index, span in enumerate(candidates):
        by_id[span.span_id].append(index)
        below[span.parent_id].append(index)

    def above(index: int) -> Iterable[int]:
        found = by_id[candidates[index].parent_id] if candidates[index].parent_id else []
        return [each for each in found if candidates[each].tenant == tenant and candidates[each].task in ("", task)]

    def under(index: int) -> Iterable[int]:
        found = below[candidates[index].span_id]
        return [
            each for each in found if candidates[each].tenant in ("", tenant) and candidates[each].task in ("", task)
        ]

    kept = {index for index, span in enumerate(candidates) if span.tenant == tenant and span.task == task}
    lineage = set(kept)
    waiting = list(kept)
    while waiting:
        for each in above(waiting.pop()):
            if each not in lineage:
                lineage.add(each)
                waiting.append(each)
    # What is above is not what was done for the task: only what is below the task's own spans is.
    waiting = list(kept)
    while waiting:
        for each in under(waiting.pop()):
            if each not in kept:
                kept.add(each)
                waiting.append(each)
    return sorted(kept | lineage)
