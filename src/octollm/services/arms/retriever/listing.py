"""Lists: every item of a kind in the documents, each with its lines.

Addresses, dates and amounts are found by code, and so are the items below a heading that the goal names. The model is
asked for the rest, chunk by chunk.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from octollm import Check, ExecuteResult
from octollm.documents.dates import MONTH_NUMBERS
from octollm.services.arms.document_goals import find_focus
from octollm.services.arms.retriever.alignment import normalise
from octollm.services.arms.retriever.chunks import (
    Chunk,
    SourceText,
    WorkTools,
    array_schema,
    ask_json,
    cut_chunks,
    describe_coverage,
    document_messages,
    map_chunks,
    object_schema,
    select_readable,
)
from octollm.services.arms.retriever.extraction import locate_value
from octollm.services.arms.retriever.sentences import CitedSentence, find_support
from octollm.services.arms.retriever.summary import build_result, find_form, nothing_found
from octollm.text.lexical import stems

MAX_ITEMS = 500
_MAX_ITEMS_PER_CHUNK = 15
_MAX_ITEM_CHARS = 200
_ITEM_TOKENS = 500
_ITEM_LINE = re.compile(r"^\s*(?:[-*+•]|\(?\d{1,3}[.)]|\(?[a-z][.)])\s+(?P<item>\S.*?)\s*$")
_HEADING = re.compile(r"^\s*(?:#{1,6}\s+)?(?P<text>[^\W_].*?)\s*:?\s*$")
_MONTH = "|".join(sorted((re.escape(name) for name in MONTH_NUMBERS if len(name) > 2), key=len, reverse=True))
_CURRENCY = r"(?:US\$|[$€£¥]|\b(?:EUR|USD|GBP|CHF|JPY|euros?|dollars?|pounds?)\b)"

_KINDS: tuple[tuple[re.Pattern[str], re.Pattern[str]], ...] = tuple(
    (re.compile(asked, re.IGNORECASE), re.compile(value, re.IGNORECASE))
    for asked, value in (
        (r"\be-?mails?\b(?:[ -]address\w*|-?adress\w*)?", r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
        (r"\b(?:urls?|links?|web ?(?:sites?|addresses))\b", r"https?://[^\s<>\"')\]]+[^\s<>\"')\].,;:]"),
        (
            r"\b(?:calendar )?dates\b|\bdatumsangaben\b|\balle daten und termine\b",
            rf"\b\d{{4}}-\d{{2}}-\d{{2}}\b|\b\d{{1,2}}[./]\d{{1,2}}[./]\d{{2,4}}\b|"
            rf"\b\d{{1,2}}(?:\.|st|nd|rd|th)?\s+(?:of\s+|de\s+)?(?:{_MONTH})\.?,?\s+\d{{4}}\b|"
            rf"\b(?:{_MONTH})\.?\s+\d{{1,2}}(?:st|nd|rd|th)?,?\s+\d{{4}}\b",
        ),
        (
            r"\b(?:amounts?|prices?|sums of money|geldbeträge|beträge|preise)\b",
            rf"{_CURRENCY}\s?\d[\d.,'’\u00a0\u202f]*\d|{_CURRENCY}\s?\d\b|"
            rf"\b\d(?:[\d.,'’\u00a0\u202f]*\d)?\s?{_CURRENCY}",
        ),
        (r"\b(?:phone|telephone|fax)[ -]?(?:numbers?)?\b|\btelefonnummern?\b", r"(?<!\w)\+?\(?\d[\d ()/-]{6,}\d\b"),
    )
)
"""What a goal asks for, and how it looks."""


async def list_items(goal: str, sources: Sequence[SourceText], tools: WorkTools) -> ExecuteResult:
    """List what a goal asks for, each item once with its first lines.

    Raises what the tools raise, for a used up budget only if nothing was read.
    """
    read, notes = select_readable(sources)
    if not read:
        return nothing_found("list", "the documents have no text", notes)
    checks: list[Check] = []
    items = find_by_pattern(goal, read)
    if items is not None:
        checks.append(Check("complete", True, "all of the text was searched by code"))
    else:
        items = find_below_heading(goal, read)
        if items:
            checks.append(Check("complete", True, "all items below the heading that the goal names"))
        else:
            items, why = await _ask_items(goal, read, tools)
            notes += [why] if why else []
            checks.append(
                Check("complete", False, "whether all items were found, and each is one", checked_by="nobody")
            )
    items = items[:MAX_ITEMS]
    form = find_form(goal)
    if any(limit.unit in ("bullet", "item") for limit in form.limits):
        items = items[: form.sentences]
    if not items:
        return nothing_found("list", "the documents have nothing of the kind", notes)
    output = "\n".join(f"- {item.render()}" for item in items)
    return build_result("list", output, [c for item in items for c in item.citations], checks, notes)


def find_by_pattern(goal: str, sources: Sequence[SourceText]) -> list[CitedSentence] | None:
    """Return all addresses, dates or amounts if the goal asks for these alone, else ``None``."""
    asked = [(match, value) for asks, value in _KINDS if (match := asks.search(goal))]
    if len(asked) != 1:
        return None
    match, value = asked[0]
    # "All prices of the pumps" and "dates on which the seller delivers" say more than the kind.
    named = stems(match.group())
    if find_focus(goal, [source.name for source in sources]) - named - stems("address number date calendar mail"):
        return None
    found: dict[str, CitedSentence] = {}
    for source in sources:
        for number, line in enumerate(source.shown, start=1):
            for hit in value.finditer(line):
                text = hit.group().strip(" .,;")
                found.setdefault(normalise(text), CitedSentence(text, (source.cite(number, number),), is_quoted=True))
    return list(found.values())


def find_below_heading(goal: str, sources: Sequence[SourceText]) -> list[CitedSentence]:
    """Return the list items below the headings that say what the goal asks for; none without such a heading."""
    focus = find_focus(goal, [source.name for source in sources])
    if not focus:
        return []
    items: list[CitedSentence] = []
    for source in sources:
        matches = False
        for number, line in enumerate(source.shown, start=1):
            item = _ITEM_LINE.match(line)
            heading = None if item else _HEADING.match(line)
            if heading is not None and not line[:1].isspace():
                is_short = len(heading["text"].split()) <= 8 and heading["text"][-1] not in ".!?"
                matches = is_short and focus <= stems(heading["text"])
            elif item is not None and matches:
                items.append(CitedSentence(item["item"], (source.cite(number, number),), is_quoted=True))
    return items


class _Items(msgspec.Struct, frozen=True):
    items: tuple[str, ...]


async def _ask_items(goal: str, sources: Sequence[SourceText], tools: WorkTools) -> tuple[list[CitedSentence], str]:
    """Return the items that the model finds and the documents have, and what part they cover if not all."""
    chunks = [chunk for source in sources for chunk in cut_chunks(source, tools.chunk_chars)]
    item = {"type": "string", "minLength": 2, "maxLength": _MAX_ITEM_CHARS}
    schema = object_schema({"items": array_schema(item, _MAX_ITEMS_PER_CHUNK)})
    instruction = (
        f"The task is: {goal[:400]}\nCopy each such item from the document, in its own words. Give an empty list if it "
        f"has none. Reply with JSON."
    )

    async def read_chunk(chunk: Chunk) -> list[CitedSentence]:
        answer = await ask_json(document_messages(chunk, instruction), schema, _ITEM_TOKENS, tools)
        try:
            given = msgspec.json.decode(answer.encode("utf-8", "surrogatepass"), type=_Items).items if answer else ()
        except msgspec.DecodeError:
            given = ()
        return [found for text in given if (found := _support(text, chunk)) is not None]

    done, why = await map_chunks(chunks, read_chunk, tools, answer_tokens=_ITEM_TOKENS)
    distinct = {normalise(item.text): item for items in done for item in items}
    return list(distinct.values()), describe_coverage(chunks, len(done), why) if why else ""


def _support(text: str, chunk: Chunk) -> CitedSentence | None:
    """Return an item with the lines that have it, word for word or nearly so; ``None`` if there are none."""
    plain = re.sub(r"\s*\[[^\]]*\]", "", " ".join(text.split())).strip()
    cell = locate_value(plain, chunk)
    if cell is not None and cell.citation is not None:
        return CitedSentence(cell.text, (cell.citation,), is_quoted=True)
    citations, fault = find_support(plain, chunk.source.passages(chunk.span), [chunk.source])
    return None if fault or not plain else CitedSentence(plain, citations)
