"""Comparison of documents: code finds the differences, the model words the longer ones, both sides are cited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octollm import Check, Citation, ExecuteResult, Message, OctoError
from octollm.services.arms.document_goals import find_focus, find_result_language
from octollm.services.arms.fidelity import find_changed_figures
from octollm.services.arms.retriever.alignment import Difference, Side, find_differences
from octollm.services.arms.retriever.chunks import DATA_RULE, SourceText, WorkTools, note_withheld, show_document
from octollm.services.arms.retriever.sentences import clean_sentence
from octollm.services.arms.retriever.summary import build_result, find_form, nothing_found
from octollm.text.lexical import stems
from octollm.text.limits import count_words

MAX_DIFFERENCES = 30
"""Differences that are listed; a note counts the others."""
_MIN_WORDED = 8
"""Words of a line from which on the model says what has changed in it."""
_MAX_SHOWN = 220
"""Characters of one side in the text of the result; the citation has the whole line."""
_WORDING_TOKENS = 80
_WORDS = {
    "English": ("only in {}", "{} says", "The documents say the same."),
    "German": ("nur in {}", "{} sagt", "Die Dokumente sagen dasselbe."),
}


@dataclass(frozen=True, slots=True)
class _DocumentPair:
    """Two documents that are compared, and the words of the result's language."""

    one: SourceText
    two: SourceText
    language: str

    @property
    def words(self) -> tuple[str, str, str]:
        return _WORDS.get(self.language, _WORDS["English"])

    def cite(self, difference: Difference) -> list[Citation]:
        """Return the lines of both sides."""
        sides = ((self.one, difference.one), (self.two, difference.two))
        return [source.cite(side.first, side.last) for source, side in sides if side is not None]


async def compare_documents(goal: str, sources: Sequence[SourceText], tools: WorkTools) -> ExecuteResult:
    """Compare the first document with each other one, and list the differences with the lines of both sides.

    A goal that singles something out, such as *the payment terms*, gets the differences of that. Raises what the tools
    raise; without budget for the model the differences are quoted and not worded.
    """
    read = [source for source in sources if not source.is_empty]
    notes = [f"{source.name} has no text" for source in sources if source.is_empty]
    for source in read:
        notes += note_withheld(source)
    if len(read) < 2:
        why = "a comparison needs two documents with text"
        return nothing_found("comparison", why, notes)
    lines: list[str] = []
    citations: list[Citation] = []
    worded = 0
    pairs = [_DocumentPair(read[0], other, find_result_language(goal) or "English") for other in read[1:]]
    for pair in pairs:
        found, total = _select(goal, pair)
        if total > len(found):
            notes.append(
                f"{total - len(found)} smaller differences of {pair.one.name} and {pair.two.name} are left out"
            )
        if len(pairs) > 1:
            lines.append(f"## {pair.one.name} / {pair.two.name}\n")
        if not found:
            cited = [source.cite(*_first_line(source)) for source in (pair.one, pair.two)]
            citations += cited
            lines.append(f"{pair.words[2]} {_references(cited)}")
        for number, difference in enumerate(found):
            await tools.progress(10 + 80 * number / len(found), f"difference {number + 1} of {len(found)}")
            text = await _word(difference, pair, tools)
            worded += bool(text)
            cited = pair.cite(difference)
            citations += cited
            lines.append(f"- {text or _state(difference, pair)} {_references(cited)}")
        if len(pairs) > 1:
            lines.append("")
    checks = [Check("alignment", True, "fields, sections and lines were compared by code")]
    if worded:
        checks.append(
            Check("wording", False, f"whether the wording of {worded} differences is apt", checked_by="nobody")
        )
    return build_result("comparison", "\n".join(lines).strip(), citations, checks, notes)


def _first_line(source: SourceText) -> tuple[int, int]:
    first = next(number for number, line in enumerate(source.lines, 1) if line.strip())
    return first, first


def _references(citations: Sequence[Citation]) -> str:
    return " ".join(dict.fromkeys(citation.reference for citation in citations))


def _select(goal: str, pair: _DocumentPair) -> tuple[list[Difference], int]:
    """Return the differences to list, in order, and how many there are of what the goal singles out."""
    found = find_differences(pair.one, pair.two)
    focus = find_focus(goal, (pair.one.name, pair.two.name))
    matching = [each for each in found if focus & stems(_words_of(each))]
    found = matching or found
    form = find_form(goal)
    has_number = any(limit.unit in ("bullet", "item", "sentence", "line") for limit in form.limits)
    wanted = form.sentences if has_number else MAX_DIFFERENCES
    # A field that both have, and a line of both, say more than what stands on one side alone.
    order = {"field": 0, "line": 1, "only_first": 2, "only_second": 2}
    chosen = sorted(range(len(found)), key=lambda at: (order[found[at].kind], at))[:wanted]
    return [found[at] for at in sorted(chosen)], len(found)


def _words_of(difference: Difference) -> str:
    return " ".join([difference.label, *(side.text for side in (difference.one, difference.two) if side is not None)])


def _state(difference: Difference, pair: _DocumentPair) -> str:
    """Return a difference in words that need no model."""
    only, says, _ = pair.words
    if difference.one is None or difference.two is None:
        source, side = (pair.two, difference.two) if difference.one is None else (pair.one, difference.one)
        label = f"{difference.label}: " if difference.label else ""
        return f"{label}{only.format(source.name)}: {_shown(side)}"
    if difference.kind == "field":
        return f"{difference.label}: {_shown(difference.one)} / {_shown(difference.two)}"
    label = f"{difference.label}: " if difference.label else ""
    first, second = says.format(pair.one.name), says.format(pair.two.name)
    return f"{label}{first} “{_shown(difference.one)}”, {second} “{_shown(difference.two)}”"


def _shown(side: Side | None) -> str:
    text = "" if side is None else " ".join(side.text.split())
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN].rsplit(" ", 1)[0] + " …"


async def _word(difference: Difference, pair: _DocumentPair, tools: WorkTools) -> str:
    """Return the model's sentence about two versions of a longer line; empty where it is not sound or not needed.

    It has to name the numbers of both sides that differ, and no other.
    """
    if difference.kind != "line" or difference.one is None or difference.two is None:
        return ""
    one, two = difference.one.text, difference.two.text
    if max(count_words(one), count_words(two)) < _MIN_WORDED or not tools.affords(one + two, _WORDING_TOKENS):
        return ""
    instruction = (
        f"Say in one short sentence in {pair.language} how the two documents differ. Name both sides as "
        f"{pair.one.name} and {pair.two.name}. Use their own words and numbers."
    )
    shown = f"{show_document(pair.one.name, one)}\n{show_document(pair.two.name, two)}"
    try:
        answer = await tools.ask(
            [Message.system(DATA_RULE + instruction), Message.user(f"{shown}\n\n{instruction}")],
            max_tokens=_WORDING_TOKENS,
            suffices=lambda text: "." in text,
        )
    except OctoError as error:
        if error.code not in {
            "budget_exhausted",
            "model_output_truncated",
            "model_output_filtered",
            "context_too_long",
        }:
            raise
        return ""
    sentence = clean_sentence(answer.strip().split("\n")[0])
    return sentence if is_sound_wording(sentence, one, two, (pair.one.name, pair.two.name)) else ""


def is_sound_wording(sentence: str, one: str, two: str, names: tuple[str, str]) -> bool:
    """Return whether a sentence may stand for the difference of two lines.

    It names both documents, attributes to each only what its line has and the other lacks in numbers, and has few
    words that neither line has.
    """
    first, second = sentence.find(names[0]), sentence.find(names[1])
    if first < 0 or second < 0:
        return False
    plain = sentence.replace(names[0], " ").replace(names[1], " ")
    missing_one, _ = find_changed_figures(one, two)
    missing_two, _ = find_changed_figures(two, one)
    lacking, _ = find_changed_figures(" ".join([*missing_one, *missing_two]), plain)
    _, added = find_changed_figures(f"{one}\n{two}", plain)
    if lacking or added:
        return False
    # The numbers of each side stand beside its name: after it, up to the other's.
    order = sorted(((first, names[0], missing_two), (second, names[1], missing_one)))
    cut = order[1][0]
    parts = (sentence[order[0][0] + len(order[0][1]) : cut], sentence[cut + len(order[1][1]) :])
    for part, (_, _, foreign) in zip(parts, order, strict=True):
        strange = set(foreign) - set(find_changed_figures(" ".join(foreign), part)[0])
        if strange:
            return False
    own = stems(plain) - _COMPARING
    return len(own & stems(f"{one} {two}")) >= 0.6 * len(own)


_COMPARING = stems(
    "differ difference different document while whereas states state stated says say specify specifies first second "
    "other version changed change allows requires unlike instead unterschied während dagegen hingegen sagt nennt"
)
