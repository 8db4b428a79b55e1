"""Summaries: facts from each chunk (map), joined to the length that the goal sets (reduce).

Every sentence stands on lines that are cited. What the model writes without support is dropped, and sentences of the
document take its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from octollm import Check, Citation, Evidence, ExecuteResult, Message, OctoError
from octollm.contracts.operations import Passage
from octollm.contracts.task import DocumentWork
from octollm.services.arms.document_goals import find_focus, find_result_language, wants_each_document
from octollm.services.arms.retriever.chunks import (
    DATA_RULE,
    Chunk,
    SourceText,
    WorkTools,
    cut_chunks,
    describe_coverage,
    map_chunks,
    note_withheld,
    show_document,
)
from octollm.services.arms.retriever.sentences import (
    CitedSentence,
    cite_sentences,
    clean_sentence,
    find_translation_fault,
    quote_sentences,
    rank_by_centrality,
    sentence_tokens,
    write_sentences,
)
from octollm.text.language import detect_language, find_requested_language, is_same_language
from octollm.text.limits import COUNTERS, LengthLimit, count_words, find_limits

DEFAULT_SENTENCES = 4
"""Sentences of a summary whose length the goal leaves open."""
MAX_SENTENCES = 40
_WORDS_PER_SENTENCE = 14
_CHARACTERS_PER_SENTENCE = 90
_SENTENCES_PER_PARAGRAPH = 3
_MAX_PER_CHUNK = 8
_MAX_JOINED = 24
"""Sentences of the chunks that the model is shown to join them."""
_KEPT_ERRORS = frozenset({"model_output_truncated", "model_output_filtered", "model_output_invalid"})
"""Failures of one answer, after which the document's own sentences are used."""


@dataclass(frozen=True, slots=True)
class SummaryForm:
    """The form that a goal asks for: how many sentences, in which layout, and the limits to keep."""

    sentences: int
    is_list: bool
    paragraphs: int
    limits: tuple[LengthLimit, ...]

    def render(self, sentences: Sequence[CitedSentence], *, with_citations: bool = True) -> str:
        """Return the text of a summary in this form."""
        texts = [each.render() if with_citations else each.text for each in sentences]
        if self.is_list:
            return "\n".join(f"- {text}" for text in texts)
        if any(limit.unit == "line" for limit in self.limits):
            return "\n".join(texts)
        size = math.ceil(len(texts) / self.paragraphs) or 1
        return "\n\n".join(" ".join(texts[start : start + size]) for start in range(0, len(texts), size))

    def keeps_high(self, sentences: Sequence[CitedSentence]) -> bool:
        """Return whether the sentences are within the upper limits."""
        text = self.render(sentences, with_citations=False)
        return all(COUNTERS[limit.unit](text) <= limit.high for limit in self.limits)

    def keeps_all(self, sentences: Sequence[CitedSentence]) -> bool:
        """Return whether the sentences are within all limits."""
        return all(limit.holds(self.render(sentences, with_citations=False)) for limit in self.limits)


def find_form(goal: str, *, for_each: bool = False) -> SummaryForm:
    """Return the form that a goal asks for."""
    limits = tuple(find_limits(goal, for_each=for_each))
    by_unit = {limit.unit: limit for limit in limits}
    number, paragraphs = DEFAULT_SENTENCES, 1
    is_list = "bullet" in by_unit or "item" in by_unit or "bullet" in goal.lower() or "stichpunkt" in goal.lower()
    for unit in ("bullet", "item", "sentence", "line"):
        if unit in by_unit:
            number = _count_wanted(by_unit[unit])
            break
    else:
        if "paragraph" in by_unit:
            paragraphs = _count_wanted(by_unit["paragraph"])
            number = paragraphs * _SENTENCES_PER_PARAGRAPH
        for unit, size in (("word", _WORDS_PER_SENTENCE), ("character", _CHARACTERS_PER_SENTENCE)):
            if unit in by_unit:
                number = max(1, by_unit[unit].target // size)
    number = max(1, min(number, MAX_SENTENCES))
    return SummaryForm(number, is_list, max(1, min(paragraphs, number)), limits)


def _count_wanted(limit: LengthLimit) -> int:
    if math.isinf(limit.high):
        return int(limit.low)
    return int(min(limit.target, limit.high)) or 1


async def summarise(goal: str, sources: Sequence[SourceText], tools: WorkTools) -> ExecuteResult:
    """Summarise documents in the form that the goal asks for.

    A goal for *each* document gets a summary of each. What the budget or the time does not reach is named. Raises what
    the tools raise, for a used up budget only if nothing was read.
    """
    read = [source for source in sources if not source.is_empty]
    notes = [f"{source.name} has no text" for source in sources if source.is_empty]
    for source in read:
        notes += note_withheld(source)
    if not read:
        return nothing_found("summary", "the documents have no text", notes)
    if len(read) > 1 and wants_each_document(goal):
        return await _summarise_each(goal, read, tools, notes)
    form = find_form(goal)
    sentences, missing = await _summarise_sources(goal, read, tools, form)
    return _conclude(form.render(sentences), sentences, form, [*notes, *missing], goal)


async def _summarise_each(
    goal: str, sources: Sequence[SourceText], tools: WorkTools, notes: list[str]
) -> ExecuteResult:
    form = find_form(goal, for_each=True)
    parts: list[str] = []
    every: list[CitedSentence] = []
    for number, source in enumerate(sources):
        try:
            sentences, missing = await _summarise_sources(goal, [source], tools, form)
        except OctoError as error:
            if error.code != "budget_exhausted" or not parts:
                raise
            notes.append(f"the token budget ended before {', '.join(each.name for each in sources[number:])}")
            break
        notes += missing
        every += sentences
        parts.append(f"## {source.name}\n\n{form.render(sentences)}")
    return _conclude("\n\n".join(parts), every, replace(form, limits=()), notes, goal)


def _conclude(
    output: str, sentences: Sequence[CitedSentence], form: SummaryForm, notes: Sequence[str], goal: str
) -> ExecuteResult:
    if not sentences:
        return nothing_found("summary", "no sentence is borne out by the documents", notes)
    quoted = sum(sentence.is_quoted for sentence in sentences)
    checks = [Check("support", True, f"each of {len(sentences)} sentences cites the lines that it stands on")]
    if form.limits:
        kept = form.keeps_all(sentences)
        checks.append(Check("length", kept, "the length that the goal asks for" if kept else "shorter than asked for"))
    if quoted:
        checks.append(Check("quoted", True, f"{quoted} of them are sentences of the document"))
    what = "whether these are the most important points"
    checks.append(Check("selection", False, what, checked_by="nobody"))
    return build_result("summary", output, [c for each in sentences for c in each.citations], checks, notes)


def build_result(
    work: DocumentWork, output: str, citations: Sequence[Citation], checks: Sequence[Check], notes: Sequence[str]
) -> ExecuteResult:
    """Return a result over documents; its notes that limit it stand below its text, too."""
    limits = [note for note in notes if note.startswith("covers ")]
    text = "\n\n".join([output, *(f"Note: {note}" for note in limits)])
    return ExecuteResult(
        output=text,
        evidence=Evidence(
            kind="documents",
            work=work,
            citations=tuple(dict.fromkeys(citations)),
            checks=(*checks, *(Check("coverage", False, note) for note in limits)),
            notes=tuple(dict.fromkeys(notes)),
        ),
    )


def nothing_found(work: DocumentWork, why: str, notes: Sequence[str]) -> ExecuteResult:
    """Return the result of a goal that the documents have nothing for."""
    return ExecuteResult(
        output=f"Not found: {why}.",
        evidence=Evidence(
            kind="documents",
            work=work,
            found=False,
            checks=(Check("support", False, why),),
            notes=tuple(dict.fromkeys(notes)),
        ),
    )


async def _summarise_sources(
    goal: str, sources: Sequence[SourceText], tools: WorkTools, form: SummaryForm
) -> tuple[list[CitedSentence], list[str]]:
    """Return the sentences of one summary, and notes on what it does not cover."""
    chunks = [chunk for source in sources for chunk in cut_chunks(source, tools.chunk_chars)]
    # Twice as many as are wanted, so that they come from all of the text, and the best are chosen.
    per_chunk = max(1, min(_MAX_PER_CHUNK, -(-2 * form.sentences // len(chunks))))
    focus = find_focus(goal, [source.name for source in sources])
    wanted = f"{per_chunk} short sentence{'s' if per_chunk > 1 else ''}"
    subject = f" The task is: {goal[:400]}" if focus else ""
    instruction = (
        f"State the most important facts of the document in {wanted}, in the document's language and words, with its "
        f"numbers and names.{subject} Reply with JSON."
    )

    async def read_chunk(chunk: Chunk) -> list[list[CitedSentence]]:
        passages = chunk.source.passages(chunk.span)
        try:
            written = await write_sentences(
                tools.ask, chunk.source.name, chunk.span.text, instruction, per_chunk, max_words=_max_words(form)
            )
        except OctoError as error:
            if error.code not in _KEPT_ERRORS:
                raise
            written = []
        return [cite_sentences(written, passages, [chunk.source]), quote_sentences(chunk.source, passages)]

    done, why = await map_chunks(chunks, read_chunk, tools, answer_tokens=sentence_tokens(per_chunk))
    notes = [describe_coverage(chunks, len(done), why)] if why else []
    facts = [sentence for parts in done for sentences in parts[::2] for sentence in sentences]
    quotes = [sentence for parts in done for sentences in parts[1::2] for sentence in sentences]
    text = "\n".join(chunk.span.text for chunk in chunks[: len(done)])
    ranked = rank_by_centrality(facts, text, focus, len(facts))
    if len(facts) > form.sentences and len(done) > 1:
        ranked = [*await _join(goal, facts, text, focus, sources, tools, form), *ranked]
    chosen = fit_to_form(ranked, rank_by_centrality(quotes, text, focus, 3 * form.sentences + 10), form)
    return await _in_language_of_goal(goal, _in_order(chosen, sources), text, tools, notes), notes


def _max_words(form: SummaryForm) -> int:
    """Return how many words one sentence may have, if the goal limits the words of all."""
    highs = [int(limit.high) for limit in form.limits if limit.unit == "word" and not math.isinf(limit.high)]
    return max(6, min(highs) // form.sentences) if highs else 0


async def _join(
    goal: str,
    facts: Sequence[CitedSentence],
    text: str,
    focus: frozenset[str],
    sources: Sequence[SourceText],
    tools: WorkTools,
    form: SummaryForm,
) -> list[CitedSentence]:
    """Return the sentences into which the model joins the facts of the chunks, as far as these support them.

    Without budget for it there are none, and the facts are chosen by rules.
    """
    shown = _in_order(rank_by_centrality(facts, text, focus, _MAX_JOINED), sources)
    listed = "\n".join(fact.text for fact in shown)
    if not tools.affords(listed, sentence_tokens(form.sentences)):
        return []
    await tools.progress(92, "joining the parts")
    instruction = (
        f"These are facts from one document. Write its summary in {form.sentences} sentences, with the facts' own "
        f"words, numbers and names. The task is: {goal[:400]} Reply with JSON."
    )
    try:
        written = await write_sentences(
            tools.ask, "facts", listed, instruction, form.sentences, max_words=_max_words(form)
        )
    except OctoError as error:
        if error.code not in {*_KEPT_ERRORS, "budget_exhausted", "context_too_long"}:
            raise
        return []
    passages = [
        Passage(citation.file, "", citation.line_start, citation.line_end, citation.text, 0.0, citation.location)
        for fact in shown
        for citation in fact.citations
    ]
    joined = cite_sentences(written, passages, sources)
    return rank_by_centrality(joined, text, focus, form.sentences)


def fit_to_form(
    facts: Sequence[CitedSentence], quotes: Sequence[CitedSentence], form: SummaryForm
) -> list[CitedSentence]:
    """Return sentences within the limits of a form: facts in their order, then quotes while there is room.

    The upper limits always hold, except that one sentence is returned whatever its length.
    """
    chosen: list[CitedSentence] = []
    for sentence in (*facts, *quotes):
        if len(chosen) >= form.sentences and (not form.limits or form.keeps_all(chosen)):
            break
        if _is_new(sentence, chosen) and form.keeps_high([*chosen, sentence]):
            chosen.append(sentence)
    if not chosen and (facts or quotes):
        chosen = [_shorten(min((*facts, *quotes), key=lambda each: len(each.text)), form)]
    return chosen


def _is_new(sentence: CitedSentence, chosen: Sequence[CitedSentence]) -> bool:
    text = sentence.text + "\n" + "\n".join(each.text for each in chosen)
    return len(rank_by_centrality([*chosen, sentence], text, (), len(chosen) + 1)) > len(chosen)


def _shorten(sentence: CitedSentence, form: SummaryForm) -> CitedSentence:
    """Return the beginning of a sentence that has more words than the goal allows, with an ellipsis."""
    highs = [int(limit.high) for limit in form.limits if limit.unit == "word" and not math.isinf(limit.high)]
    words = sentence.text.split()
    if not highs or len(words) <= min(highs):
        return sentence
    return replace(sentence, text=" ".join(words[: min(highs)]).rstrip(",;:") + " …")


def _in_order(sentences: Sequence[CitedSentence], sources: Sequence[SourceText]) -> list[CitedSentence]:
    order = {source.name: number for number, source in enumerate(sources)}
    return sorted(sentences, key=lambda each: (order.get(each.citations[0].file, 0), each.citations[0].line_start))


async def _in_language_of_goal(
    goal: str, sentences: list[CitedSentence], text: str, tools: WorkTools, notes: list[str]
) -> list[CitedSentence]:
    """Return the sentences in the language that the goal asks for, or is written in.

    One whose translation changes a number or a name stays as it is, and a note says so.
    """
    wanted = find_result_language(goal)
    found = detect_language(" ".join(sentence.text for sentence in sentences)) or detect_language(text)
    if not wanted or not found or is_same_language(wanted, found):
        return sentences
    translated: list[CitedSentence] = []
    kept = 0
    for sentence in sentences:
        said = await translate_sentence(sentence.text, wanted, tools)
        kept += not said
        translated.append(replace(sentence, text=said, is_quoted=False) if said else sentence)
    if kept < len(sentences):
        notes.append(f"translated from {found} by the model; its numbers and names were compared with the source")
    if kept:
        notes.append(f"{kept} sentences stay in {found}: their translation did not keep the numbers or names")
    return translated


async def answer_in_language(goal: str, result: ExecuteResult, tools: WorkTools) -> ExecuteResult:
    """Return an answer in the language that the goal names, if its lines are in another one.

    An answer whose translation does not keep to it stays as it is, and a note says so.
    """
    requested, evidence = find_requested_language(goal), result.evidence
    if requested is None or evidence is None or not evidence.found or not evidence.citations:
        return result
    statement, _, references = result.output.partition("\n\n")
    theirs = detect_language("\n".join(citation.text for citation in evidence.citations))
    ours = detect_language(statement) or theirs
    if not ours or is_same_language(ours, requested[0]):
        return result
    translated = await translate_sentence(statement, requested[0], tools)
    note = (
        f"translated from {ours} by the model; its numbers and names were compared with the source"
        if translated
        else f"the answer stays in {ours}: its translation did not keep the numbers or names"
    )
    return msgspec.structs.replace(
        result,
        output=f"{translated or statement}\n\n{references}",
        evidence=msgspec.structs.replace(evidence, notes=(*evidence.notes, note)),
    )


async def translate_sentence(text: str, language: str, tools: WorkTools) -> str:
    """Return a sentence in another language, or an empty string if no translation keeps to it."""
    for attempt in range(2):
        if not tools.affords(text, 3 * count_words(text) + 40):
            return ""
        answer = await tools.ask(
            [
                Message.system(f"{DATA_RULE}Translate it into {language}. Reply with the translation only."),
                Message.user(f"{show_document('', text)}\n\nThe {language} translation:"),
            ],
            max_tokens=4 * count_words(text) + 60,
            temperature=0.0 if attempt == 0 else 0.4,
            seed=attempt,
        )
        translated = clean_sentence(answer.strip().split("\n\n")[0])
        if not find_translation_fault(text, translated, language):
            return translated
    return ""
