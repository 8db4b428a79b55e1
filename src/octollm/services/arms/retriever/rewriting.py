"""Translation and rewriting of whole documents, paragraph by paragraph.

Code keeps the structure: blank lines, headings, list marks and code blocks. A paragraph whose new text changes a
number, an address or a name stays as it is, and a note says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import msgspec

from octollm import Artifact, Check, ExecuteResult, Message, OctoError
from octollm.contracts.task import DocumentWork
from octollm.services.arms.document_goals import find_result_language
from octollm.services.arms.fidelity import (
    contradicts,
    find_changed_figures,
    find_identifiers,
    find_missing,
    find_names,
)
from octollm.services.arms.retriever.chunks import (
    DATA_RULE,
    Chunk,
    SourceText,
    WorkTools,
    map_chunks,
    object_schema,
    select_readable,
    show_document,
)
from octollm.services.arms.retriever.sentences import find_translation_fault
from octollm.services.arms.retriever.summary import build_result, nothing_found
from octollm.text.language import detect_language, is_same_language
from octollm.text.lexical import stems
from octollm.text.passages import LineSpan

MAX_OUTPUT_CHARS = 60_000
"""Characters of the text of a result; the artifact has the whole."""
MAX_SEGMENT_CHARS = 1200
MAX_SEGMENTS_PER_CALL = 8
_LOST_ANSWERS = frozenset({"model_output_truncated", "model_output_filtered", "context_too_long"})
"""Failures of one answer, after which its paragraphs are asked for alone, or stay as they are."""
MIN_SHARED_WORDS = 0.2
"""Share of a rewritten paragraph's words that the original has."""
_CHARS_PER_TOKEN = 2
"""Fewer than models need in most languages, so that an answer is not cut."""
_PREFIX = re.compile(
    r"^(?P<prefix>\s*(?:#{1,6}\s+|(?:[-*+•>]\s+)+|\(?\d{1,3}(?:\.\d{1,2})*[.)]\s+|§\s*\d+\s+)?)(?P<body>.*?)(?P<end>\s*)$"
)
_FENCE = re.compile(r"^\s*(?:```|~~~)")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_ENDS_PARAGRAPH = re.compile(r"[.!?:;。！？]\s*$")


@dataclass(frozen=True, slots=True)
class Segment:
    """A paragraph to rewrite: lines ``first`` to ``last``, with the mark before it that stays."""

    first: int
    last: int
    prefix: str
    body: str


def cut_segments(source: SourceText) -> list[Segment]:
    """Return the paragraphs of a document that have words. What is not in one stays: code, rules, numbers alone.

    Lines that address a language model stay as well. A paragraph that is broken into lines is one segment.
    """
    segments: list[Segment] = []
    is_code = False
    for number, line in enumerate(source.lines, start=1):
        if _FENCE.match(line):
            is_code = not is_code
            continue
        match = _PREFIX.match(line)
        if is_code or match is None or number in source.withheld or not re.search(r"[^\W\d_]{2}", match["body"]):
            continue
        before = segments[-1] if segments else None
        if (
            before is not None
            and before.last == number - 1
            and not match["prefix"].strip()
            and not before.prefix.lstrip().startswith("#")
            and match["body"][:1].islower()
            and not _ENDS_PARAGRAPH.search(before.body)
            and "|" not in line
            and len(before.body) + len(match["body"]) < MAX_SEGMENT_CHARS
        ):
            segments[-1] = Segment(before.first, number, before.prefix, f"{before.body} {match['body']}")
            continue
        segments.append(Segment(number, number, match["prefix"], match["body"]))
    return segments


def join_segments(source: SourceText, replaced: dict[int, tuple[Segment, str]], end: int) -> str:
    """Return the lines of a document up to ``end``, with segments (by their first line) replaced by new texts."""
    lines: list[str] = []
    number = 1
    while number <= end:
        if number in replaced:
            segment, text = replaced[number]
            lines.append(segment.prefix + text)
            number = segment.last + 1
            continue
        lines.append(source.lines[number - 1])
        number += 1
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Rewriting:
    """What is done with each paragraph: ``instruction`` for the model, and the language of the result."""

    work: DocumentWork
    instruction: str
    language: str
    suffix: str

    def find_fault(self, before: str, after: str) -> str:
        """Return why a new text cannot stand for a paragraph, as far as code can tell; empty if it can."""
        if self.work == "translation":
            return find_translation_fault(before, after, self.language)
        if not after.strip():
            return "nothing was written"
        if len(after) > 3 * len(before) + 80 or len(after) * 8 < len(before):
            return "its length does not fit"
        missing, added = find_changed_figures(before, after)
        # German writes every noun with a capital.
        names = [] if self.language == "German" else find_names(before)
        lost = find_missing([*find_identifiers(before), *names], after)
        if missing or lost:
            return f"it lacks {', '.join([*missing, *lost][:5])}"
        if added:
            return f"it adds {', '.join(added[:5])}"
        own = stems(after)
        if own and len(own & stems(before)) < MIN_SHARED_WORDS * len(own):
            return "it says something else"
        found = detect_language(after)
        if found and self.language and not is_same_language(found, self.language):
            return f"it is in {found}"
        return "it says the opposite" if contradicts(after, before) else ""


async def rewrite_documents(
    goal: str, work: DocumentWork, sources: Sequence[SourceText], tools: WorkTools
) -> ExecuteResult:
    """Translate or rewrite documents as a whole; each is an artifact, and the text of the result.

    Raises what the tools raise, for a used up budget only if nothing was done.
    """
    read, notes = select_readable(sources)
    notes = [note.replace("these sentences were left out", "they stay as they are") for note in notes]
    if not read:
        return nothing_found(work, "the documents have no text", notes)
    parts: list[str] = []
    artifacts: list[Artifact] = []
    checks: list[Check] = []
    for number, source in enumerate(read):
        rewriting = _plan_rewriting(goal, work, source)
        try:
            text, kept, missing = await _rewrite_source(rewriting, source, tools)
        except OctoError as error:
            if error.code != "budget_exhausted" or not parts:
                raise
            names = ", ".join(each.name for each in read[:number])
            notes.append(f"covers {names}: the token budget ended there")
            break
        notes += missing
        path = PurePosixPath(source.name.replace("\\", "/"))
        suffix = path.suffix if path.suffix in (".md", ".txt") else ".txt"
        artifacts.append(await tools.write(f"{path.stem}.{rewriting.suffix}{suffix}", text, "text/plain"))
        parts.append(text if len(read) == 1 else f"## {source.name}\n\n{text}")
        checks += kept
    output = "\n\n".join(parts)
    if len(output) > MAX_OUTPUT_CHARS:
        output = output[:MAX_OUTPUT_CHARS]
        notes.append(f"the text is longer than {MAX_OUTPUT_CHARS:,} characters; the artifact has all of it")
    what = "whether the meaning is kept" if work == "translation" else "whether the meaning and the tone are right"
    checks += [
        Check("fidelity", True, "numbers, dates, addresses and names were compared with the source"),
        Check("meaning", False, what, checked_by="nobody"),
    ]
    result = build_result(work, output, (), list(dict.fromkeys(checks)), notes)
    return msgspec.structs.replace(result, artifacts=tuple(artifacts))


def _plan_rewriting(goal: str, work: DocumentWork, source: SourceText) -> Rewriting:
    own = detect_language(source.text)
    if work == "translation":
        language = find_result_language(goal) or "English"
        instruction = f"Translate each line into {language}. Keep numbers, names and dates."
        return Rewriting(work, instruction, language, language.lower())
    instruction = (
        f"{goal[:400]}\nDo so with each line, in {own or 'its own language'}. Keep its meaning, and all numbers, names "
        f"and dates."
    )
    return Rewriting(work, instruction, own, "rewritten")


async def _rewrite_source(
    rewriting: Rewriting, source: SourceText, tools: WorkTools
) -> tuple[str, list[Check], list[str]]:
    """Return the new text of a document, checks and notes."""
    if rewriting.work == "translation" and is_same_language(detect_language(source.text), rewriting.language):
        return "\n".join(source.lines), [], [f"{source.name} is in {rewriting.language} already"]
    segments = cut_segments(source)
    chunks, batches = _batch(source, segments, tools)
    replaced: dict[int, tuple[Segment, str]] = {}
    faults: dict[int, str] = {}

    async def rewrite_chunk(chunk: Chunk) -> list[int]:
        batch = batches[chunk.span.line_start]
        texts = await _ask_segments(rewriting, batch, tools)
        for segment, written in zip(batch, texts, strict=True):
            text, fault = written, rewriting.find_fault(segment.body, written)
            if fault:
                text = await _ask_alone(rewriting, segment, tools)
                fault = rewriting.find_fault(segment.body, text)
            if fault:
                faults[segment.first] = fault
            else:
                replaced[segment.first] = segment, text
        return [batch[-1].last]

    tokens = max((sum(len(each.body) for each in batch) // _CHARS_PER_TOKEN for batch in batches.values()), default=0)
    done, why = await map_chunks(chunks, rewrite_chunk, tools, answer_tokens=tokens + 60, what=f"{source.name}, part")
    notes: list[str] = []
    end = len(source.lines)
    if why:
        end = done[-1][-1] if done else 0
        notes.append(f"covers lines 1 to {end} of {len(source.lines)} of {source.name}: {why}")
    checks: list[Check] = []
    if faults:
        listed = "; ".join(f"line {line}: {fault}" for line, fault in sorted(faults.items())[:5])
        notes.append(f"{source.name}: {len(faults)} of {len(segments)} paragraphs stay as they are ({listed})")
    if segments and not replaced:
        raise OctoError(
            f"No paragraph of {source.name} was kept to by the model's text: {next(iter(faults.values()), '')}.",
            code="not_accepted",
        )
    text = join_segments(source, replaced, end)
    if rewriting.work == "translation" and detect_language(source.text) != "German":
        names = find_missing(find_names("\n".join(source.lines[:end])), text)
        if names:
            checks.append(Check("names", False, f"not in the translation as they are: {', '.join(names[:8])}"))
    return text, checks, notes


def _batch(
    source: SourceText, segments: Sequence[Segment], tools: WorkTools
) -> tuple[list[Chunk], dict[int, list[Segment]]]:
    """Return the segments in batches for one call each, by their first line, and the chunks that they are."""
    batches: list[list[Segment]] = []
    size = 0
    for segment in segments:
        if (
            not batches
            or size + len(segment.body) > tools.chunk_chars // 2
            or len(batches[-1]) >= MAX_SEGMENTS_PER_CALL
        ):
            batches.append([])
            size = 0
        batches[-1].append(segment)
        size += len(segment.body)
    chunks = [
        Chunk(source, LineSpan(batch[0].first, batch[-1].last, "\n".join(each.body for each in batch)))
        for batch in batches
    ]
    return chunks, {batch[0].first: batch for batch in batches}


class _Lines(msgspec.Struct, frozen=True):
    lines: tuple[str, ...]


async def _ask_segments(rewriting: Rewriting, batch: Sequence[Segment], tools: WorkTools) -> list[str]:
    """Return the new text of each segment; empty texts where the answer is no list of as many."""
    if len(batch) == 1:
        return [await _ask_alone(rewriting, batch[0], tools)]
    total = sum(len(segment.body) for segment in batch)
    longest = max(len(segment.body) for segment in batch)
    line = {"type": "string", "minLength": 1, "maxLength": 3 * longest + 80}
    lines = {"type": "array", "minItems": len(batch), "maxItems": len(batch), "items": line}
    schema = object_schema({"lines": lines})
    shown = show_document("", "\n".join(segment.body for segment in batch))
    try:
        answer = await tools.ask(
            [
                Message.system(DATA_RULE + rewriting.instruction),
                Message.user(f"{shown}\n\n{rewriting.instruction} Reply with JSON: the {len(batch)} lines in order."),
            ],
            max_tokens=total // _CHARS_PER_TOKEN + 20 * len(batch) + 60,
            schema=schema,
        )
        written = msgspec.json.decode(answer.encode("utf-8", "surrogatepass"), type=_Lines).lines
    except (OctoError, msgspec.DecodeError) as error:
        if isinstance(error, OctoError) and error.code not in _LOST_ANSWERS:
            raise
        written = ()
    if len(written) != len(batch):
        return [""] * len(batch)
    return [_plain(text) for text in written]


async def _ask_alone(rewriting: Rewriting, segment: Segment, tools: WorkTools) -> str:
    """Return the new text of one segment; empty if the answer was cut, withheld or cannot be paid for."""
    parts: list[str] = []
    for piece in _pieces(segment.body):
        if not tools.affords(piece, len(piece) // _CHARS_PER_TOKEN + 60):
            return ""
        shown = show_document("", piece)
        try:
            answer = await tools.ask(
                [
                    Message.system(f"{DATA_RULE}{rewriting.instruction} Reply with the new text only."),
                    Message.user(f"{shown}\n\n{rewriting.instruction}"),
                ],
                max_tokens=len(piece) // _CHARS_PER_TOKEN + 60,
            )
        except OctoError as error:
            if error.code not in _LOST_ANSWERS:
                raise
            return ""
        parts.append(_plain(answer))
    return " ".join(parts)


def _plain(text: str) -> str:
    """Return a model's text as one line, without marks of ours or of Markdown around it."""
    text = re.sub(r"</?document[^>]*>|^```\w*|```$", "", text.strip())
    match = _PREFIX.match(" ".join(text.split()))
    return match["body"] if match else ""


def _pieces(body: str) -> list[str]:
    """Cut a long paragraph between sentences."""
    pieces: list[str] = []
    for sentence in _SENTENCE.split(body):
        if pieces and len(pieces[-1]) + len(sentence) < MAX_SEGMENT_CHARS:
            pieces[-1] += " " + sentence
        else:
            pieces.append(sentence)
    return pieces
