"""What a goal asks to be done with documents, by rules: the kind of work, its fields, and its focus.

Verbs decide, in English and German, and the common ones in French, Spanish, Italian, Portuguese and Dutch.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from octollm.contracts.task import DocumentWork
from octollm.text.language import detect_language, find_requested_language
from octollm.text.lexical import content_words, stem, stems
from octollm.text.limits import find_limits

_POLITE = re.compile(
    r"^\W*(?:(?:please|kindly|bitte|can you|could you|would you|will you|i (?:want|need|would like)(?: you)?(?: to)?|"
    r"kannst du|können sie|könntest du|könnten sie|ich (?:möchte|brauche|hätte gern)|s'il (?:te|vous) plaît|"
    r"por favor|per favore)\b[\s,:]*)+",
    re.IGNORECASE,
)
_INTERROGATIVE = re.compile(
    r"^\W*(?:what|who|whom|whose|which|when|where|why|how|is|are|was|were|does|do|did|has|have|had|should|must|may|"
    r"wer|wen|wem|wessen|was|wann|wo|wohin|woher|warum|wieso|wie|wieviel|welche[rsmn]?|ist|sind|hat|haben|gibt|darf|"
    r"muss|"
    r"qui|que|quoi|quel(?:le)?s?|quand|où|pourquoi|comment|combien|est-ce|qué|quién|cuándo|dónde|cuál|cuánto|cómo|"
    r"por qué|"
    r"chi|cosa|quando|dove|perché|quale|quanto|quem|onde|qual|wat|wie|wanneer|waar|waarom|hoeveel|in which|at what|"
    r"by when|to whom|for how|on which|seit wann|bis wann|ab wann|an wen|in welche[rmn]?)\b",
    re.IGNORECASE,
)
_ASKING = re.compile(
    r"^\W*(?:say|tell|answer|find out|look up|explain|describe|state|quote|cite|search|find|check|nenne?|sag[et]?|"
    r"erkläre?|beschreibe?|prüfe?|suche?|finde?)\b",
    re.IGNORECASE,
)
_DIFFERENCE = re.compile(
    r"\b(?:compare[ds]?|comparison|compar(?:er?|ez|a|ar)|differences?|differ|diff|vergleich\w*|unterschied\w*|"
    r"unterscheide\w*|"
    r"contrast|what (?:has )?changed|changes between|différences?|diferencias?|differenze|verschillen)\b",
    re.IGNORECASE,
)
_GIST = re.compile(
    r"^\W*(?:what (?:is|are) (?:the|this|that|these) [\w ]{1,30} about\b|worum geht\b|wovon handelt\b|de quoi parle\b|"
    r"what are the (?:\w+ )?(?:key|main|most important) (?:points|facts|takeaways)\b|was sind die (?:wichtigsten|"
    r"zentralen) punkte\b)",
    re.IGNORECASE,
)
_ALL = r"(?:all|every|each|any|alle[nrs]?|jede[nrs]?|sämtliche[nrs]?|tou(?:s|tes)|todos|todas|tutt[ie])"
_VERB_PATTERNS: tuple[tuple[DocumentWork, str], ...] = (
    (
        "translation",
        r"^(?:translat\w+|übersetz\w+|tradui[st]\w*|traduc\w+|traduz\w+|vertaal\w*)\b|"
        r"\b(?:and|then|und|dann) (?:translate|übersetze?)\b|^(?:make|give|write|create|"
        r"erstelle) .{0,20}\b(?:translation|übersetzung)\b",
    ),
    (
        "summary",
        r"^(?:summari[sz]\w+|sum up|recap|condense|abridge|outline|shorten|résume[rz]?|resum\w+|riassum\w+|"
        r"riepilog\w+|"
        r"vat\b.* samen)\b|^(?:fass\w*)\b.*\bzusammen(?:fassen)?\b|\bzusammenfass\w+|^kürze?\b|"
        r"\b(?:tl;?dr|summary|synopsis|abstract|overview|key points|main points|takeaways|gist|kurzfassung|"
        r"überblick|"
        r"kernaussagen|hauptpunkte|résumé|resumen|riassunto|samenvatting)\b|"
        r"\b(?:key|main|(?:most )?important|wichtigsten?) (?:points?|facts?|punkte?n?|aussagen)\b",
    ),
    (
        "rewrite",
        r"^(?:rewrite|rephrase|reword|paraphrase|simplify|proofread|polish|redraft|reformulate|copy-?edit|"
        r"überarbeite\w*|"
        r"korrigier\w*|vereinfach\w*|reformule[rz]?|réécri\w+|reescrib\w+|reescrev\w+|riscriv\w+|herschrijf)\b|"
        r"^(?:correct|fix|improve) (?:the |all )?(?:spelling|grammar|typos|wording|style|language|text|letter|"
        r"document)\b|"
        r"^(?:schreib\w*|formulier\w*)\b.*\b(?:um|neu|umschreiben)\b|^make (?:it|the \w+|this \w+) (?:more|less|"
        r"sound)\b",
    ),
    (
        "table",
        rf"^extract\b(?!\s+{_ALL}\b).*(?:,|\band\b)|^extract\b.*\b(?:as|into|to) (?:a |an )?(?:table|csv|json|"
        rf"spreadsheet)\b|"
        r"^extract\b.*\bfrom (?:each|every|all|these|the \w*(?:files|documents|invoices|contracts))\b|"
        r"^(?:make|create|build|give|write|draw up|produce|prepare|return)\b.{0,20}\b(?:table|spreadsheet|csv)\b|"
        r"^tabulate\b|"
        r"\b(?:extract|columns?|fields?)\b.{0,10}:|^extrahier\w*\b.*(?:,|\bund\b)|"
        r"^(?:erstelle?|mache?|erzeuge?|schreibe?)\b.{0,20}\b(?:tabelle|csv)\b|^extra(?:is|yez|e|iga|"
        r"iez)\b.*(?:,|\bet\b|\by\b)",
    ),
    (
        "list",
        rf"^(?:list|enumerate|itemi[sz]e|auflisten|liste|liste[rz]?|enumera\w*|elenca\w*|lijst)\b|"
        rf"^zähle?\b.*\bauf\b|"
        rf"^(?:find|collect|name|give|show|extract|get|identify|nenne?|finde?|suche?|sammle|zeige?|extrahier\w*|"
        rf"trouve[rz]?|"
        rf"nomme[rz]?|busca\w*|encuentra\w*)\b(?: me| mir)?\s+{_ALL}\b|^(?:give|show)\b.{{0,15}}\blist\b|"
        rf"^(?:make|create|write|erstelle?) (?:a |an |eine )?(?:bullet(?:ed)? |numbered )?list(?:e)?\b|"
        rf"^extract\b|^extrahier\w*\b",
    ),
)
_VERBS: tuple[tuple[DocumentWork, re.Pattern[str]], ...] = tuple(
    (work, re.compile(pattern, re.IGNORECASE)) for work, pattern in _VERB_PATTERNS
)


def strip_polite_words(goal: str) -> str:
    """Return a goal without *please*, *can you* and the like at its beginning."""
    return _POLITE.sub("", goal.strip(), count=1)


def find_document_work(goal: str, *, documents: int = 1) -> DocumentWork | None:
    """Return what a goal asks to be done with its documents; ``None`` if no rule tells.

    A question is to be answered, whatever its words are: *What does the summary say?* asks for no summary. A question
    for the differences of several documents asks to compare them.
    """
    plain = strip_polite_words(goal)
    first = plain.split("\n", 1)[0]
    if documents > 1 and _DIFFERENCE.search(first):
        return "comparison"
    if _GIST.search(first):
        return "summary"
    if _INTERROGATIVE.match(first):
        return "answer"
    for work, pattern in _VERBS:
        if pattern.search(first):
            return work
    if _asks_for_several_sentences(first):
        return "summary"
    if _ASKING.match(first) or first.rstrip().endswith("?"):
        return "answer"
    return None


def _asks_for_several_sentences(goal: str) -> bool:
    """Return whether a goal wants more than the one sentence that answers a question."""
    return any(
        limit.unit in ("sentence", "bullet", "item", "paragraph") and limit.target > 1 and limit.high > 1
        for limit in find_limits(goal)
    )


_FIELDS = re.compile(
    r"(?:extract|tabulate|columns?|fields?|table(?: of| with)?|spreadsheet(?: of| with)?|csv(?: of| with)?|"
    r"extrahier\w*|"
    r"tabelle(?: mit| der| von)?|spalten|felder)\b[\s:]*(?P<fields>.+)",
    re.IGNORECASE | re.DOTALL,
)
_FIELDS_END = re.compile(
    r"\s+(?:from|of|in|out of|for|per|into|as|aus|von|der|des|dem|im|für|pro|als|de|du|des|depuis|del|di)\s+(?:each|"
    r"every|all|the|these|"
    r"this|both|a|an|my|our|jede[mnrs]?|alle[nr]?|de[nmrs]|die|diese[mnrs]?|beiden|chaque|le|la|les|cada|csv|json|"
    r"tabelle)\b.*$|"
    r"\s+(?:from|aus|as|into|als|im) \S+.*$|[.;\n].*$",
    re.IGNORECASE | re.DOTALL,
)
_LEADING = re.compile(
    r"^(?:(?:the|all|its|their|every|each|a|an|with|of|following|columns?|fields?|den|die|das|der|alle|mit|"
    r"folgende[nrs]?|spalten|"
    r"felder|le|la|les|el|los|las)\b[\s:]*|l')+",
    re.IGNORECASE,
)
MAX_FIELDS = 20
_MAX_FIELD_CHARS = 60


def find_fields(goal: str) -> list[str]:
    """Return the names of the fields that a goal wants extracted, in order; none if they are not listed."""
    match = _FIELDS.search(strip_polite_words(goal))
    if match is None:
        return []
    listed = re.split(r"\s+(?:from|aus)\s+", match["fields"], maxsplit=1)[0]
    previous = ""
    while previous != listed:
        previous, listed = listed, _FIELDS_END.sub("", listed)
    parts = re.split(r"\s*(?:,|;|/|\band\b|\bund\b|\bet\b|\by\b|&)\s*", listed)
    fields = [_LEADING.sub("", part.strip(" .:\"'“”")).strip() for part in parts]
    named = [field for field in fields if field and len(field) <= _MAX_FIELD_CHARS and len(field.split()) <= 5]
    return list({field.lower(): field for field in named}.values())[:MAX_FIELDS]


_PER_ENTRY = re.compile(rf"\b{_ALL}\s+(?:the\s+|of the\s+|der\s+|die\s+)?(?P<noun>[^\W\d_]+)", re.IGNORECASE)
_DOCUMENT_WORDS = """
document file invoice contract letter pdf page offer report email mail text agreement receipt resume cv application
dokument datei rechnung vertrag brief seite angebot bericht dokumente dateien rechnungen verträge briefe angebote
these them both two three contracts facture factura
"""
_DOCUMENT_STEMS = frozenset(stem(word) for word in _DOCUMENT_WORDS.split())


def wants_row_per_entry(goal: str, *, documents: int) -> bool:
    """Return whether a table has a row for each entry of a document, and not one for each document.

    *For each person* does; *of each invoice* does if one document holds several of them.
    """
    nouns = [stem(match["noun"].lower()) for match in _PER_ENTRY.finditer(goal)]
    return any(documents == 1 or noun not in _DOCUMENT_STEMS for noun in nouns)


_FOR_EACH_DOCUMENT = re.compile(
    r"\b(?:each|every|jede[mnrs]?|chaque|cada)(?: of)?(?: the| these)? (?P<noun>[^\W\d_]+)|\b(?:separately|"
    r"individually|einzeln)\b",
    re.IGNORECASE,
)  # fmt: skip


def wants_each_document(goal: str) -> bool:
    """Return whether a goal wants its work done for each document by itself."""
    match = _FOR_EACH_DOCUMENT.search(goal)
    return match is not None and (match["noun"] is None or stem(match["noun"].lower()) in _DOCUMENT_STEMS)


_GENERAL = """
summarize summarise summary sum recap condense outline shorten overview key main important most point bullet sentence
word paragraph line short brief concise briefly text content contents whole entire full following attached file list
all every each item compare comparison difference differ two both between translate translation rewrite rephrase
simplify table extract column field row english german french spanish italian make create write please version
versions fasse fass zusammen zusammenfassung kurz in stichpunkt stichpunkten satz sätzen wort wörtern drei zwei vier
fünf den die das der dem des ein eine einen einem einer und mit auf aus von im ins für wichtigsten punkte vergleiche
vergleich unterschied unterschiede zwischen beiden übersetze übersetzung deutsch deutsche englisch englische liste
alle schreibe um kürze txt md pdf docx xlsx pptx csv html eml one three four five six seven eight nine ten give me tl
dr gist get résume le la les en un une du phrases points resumen resume el los las frases
"""
_GENERAL_STEMS = frozenset(stem(word) for word in _GENERAL.split())


def find_focus(goal: str, names: Collection[str] = ()) -> frozenset[str]:
    """Return the stems of what a goal singles out, such as *the payment terms* of a contract.

    Words for the kind of work, its length and the documents say nothing, nor do the names of the files.
    """
    named = frozenset(stem(word) for name in names for word in content_words(re.sub(r"[._-]+", " ", name)))
    words = (stems(goal) - _GENERAL_STEMS - _DOCUMENT_STEMS) - named
    return frozenset(word for word in words if not word[0].isdigit())


_GERMAN = re.compile(
    r"\b(?:fass\w*|übersetz\w*|vergleich\w*|liste?|extrahier\w*|schreib\w*|formulier\w*|nenne?|erstelle?|"
    r"zusammenfass\w*|"
    r"unterschied\w*|auf deutsch|worum|stichpunkte?n?|überarbeite\w*|korrigier\w*|vereinfach\w*)\b(?! of\b| all\b|"
    r" the\b)",
    re.IGNORECASE,
)
_ENGLISH = re.compile(
    r"\b(?:summari[sz]e|summary|translate|compare|list|extract|rewrite|rephrase|simplify|the|what|give|make|explain)\b",
    re.IGNORECASE,
)


def find_result_language(goal: str) -> str:
    """Return the language that a goal wants its result in: the one that it names, else its own; empty if unknown."""
    requested = find_requested_language(goal)
    if requested is not None:
        return requested[0]
    found = detect_language(goal)
    if found:
        return found
    return "German" if _GERMAN.search(goal) else "English" if _ENGLISH.search(goal) else ""
