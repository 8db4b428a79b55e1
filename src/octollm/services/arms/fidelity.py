"""Whether a text keeps to its source: numbers and dates, names and identifiers, and negations, compared by code."""

from __future__ import annotations

import re
from collections.abc import Collection

from octollm.documents.dates import MONTH_NUMBERS
from octollm.text.lexical import stems

_DATE = re.compile(r"(?<!\d)(\d{1,4})([./-])(\d{1,2})\2(\d{1,4})(?!\d)")
_NUMBER = re.compile(r"\d+(?:[.,'’\u00a0\u202f]\d+)*")
_GROUPED = re.compile(r"[1-9]\d{0,2}(?:(?P<mark>[.,'’\u00a0\u202f])\d{3}(?:(?P=mark)\d{3})*|,\d{2}(?:,\d{2})*,\d{3})")
"""Digits in groups of thousands, or as in India in groups of two before the last three."""
_DECIMAL = re.compile(r"(?P<whole>.*?\d)[.,](?P<places>\d+)")
_SEPARATORS = re.compile(r"[.,'’\u00a0\u202f]")
_PERCENT = re.compile(r"(\d+(?:[.,]\d+)*)\s?(?:%|per ?cent\b|prozent\b|pour ?cent\b|por ciento\b)", re.IGNORECASE)
_SAYS_PERCENT = re.compile(r"%|per ?cent|prozent|pour ?cent|por ciento|pct|v\.\s?H\.", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+")
_NAMED_MONTH = re.compile(
    r"\d{1,2}(?:\.|st|nd|rd|th|º)?\s+(?:of\s+|de\s+)?(?P<before>[^\W\d_]{3,12})\b|\b(?P<after>[^\W\d_]{3,12})\.?\s+\d{1,4}\b"
)
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen",
    "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf",
    "zéro un deux trois quatre cinq six _ huit neuf dix onze douze",
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez _ doce",
)
_TENS = (
    "twenty thirty forty fifty sixty seventy eighty ninety",
    "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig",
    "vingt trente quarante cinquante soixante",
    "veinte treinta cuarenta cincuenta sesenta setenta ochenta noventa",
)
_NUMBER_WORDS: dict[str, int] = {
    **{word: number for words in _UNITS for number, word in enumerate(words.split())},
    **{word: 10 * number for words in _TENS for number, word in enumerate(words.split(), 2)},
    # Not French seven, which is an abbreviated month, nor Spanish eleven, which is an English word.
    **dict.fromkeys(("eine", "einem", "einen", "einer", "eins", "a", "an", "une", "una"), 1),
}
_SCALES = {"hundred": 100, "hundert": 100, "cent": 100, "cien": 100, "thousand": 1000, "tausend": 1000, "mille": 1000,
           "mil": 1000, "million": 10**6, "millionen": 10**6, "millions": 10**6, "millones": 10**6}  # fmt: skip
_ONE = frozenset(("0", "1"))
"""What words for numbers say besides: *a fee*, *one of them*, *no*."""


def find_figures(text: str) -> frozenset[str]:
    """Return the numbers of a text, and the parts of its dates, in one notation: ``1.234,50`` is ``1234.5``.

    So the notations of two languages are the same: ``2024-12-31`` and ``31.12.2024``, ``1,234.50`` and ``1.234,50``.
    ``1.234`` counts as 1,234, which it mostly is.
    """
    figures: set[str] = set()

    def take_date(match: re.Match[str]) -> str:
        figures.update(_plain(match[part]) for part in (1, 3, 4))
        return " "

    rest = _DATE.sub(take_date, text)
    for match in _NUMBER.finditer(rest):
        figures.update(_normalize(match.group()))
    return frozenset(figures)


def _normalize(number: str) -> list[str]:
    """Return a number in plain notation; the numbers of a list such as ``1,2,3``."""
    if _GROUPED.fullmatch(number):
        return [_plain(_SEPARATORS.sub("", number))]
    decimal = _DECIMAL.fullmatch(number)
    if decimal and (_GROUPED.fullmatch(decimal["whole"]) or decimal["whole"].isdigit()):
        whole, places = _plain(_SEPARATORS.sub("", decimal["whole"])), decimal["places"].rstrip("0")
        return [f"{whole}.{places}" if places else whole]
    # A version or a section such as 2.13.1, or a list.
    return [_plain(each) for each in number.split(",")] if "," in number else [number]


def _plain(digits: str) -> str:
    return digits.lstrip("0") or "0"


def find_spelled_figures(text: str) -> frozenset[str]:
    """Return the numbers that a text may spell out: months by name, and numbers in words such as *twenty-five*."""
    months = {str(MONTH_NUMBERS[word]) for word in map(str.lower, _WORD.findall(text)) if word in MONTH_NUMBERS}
    return frozenset(months | _find_number_words(text))


def _find_number_words(text: str) -> set[str]:
    """Return the numbers in words: each run of such words is one number, and its words may be numbers by themselves."""
    found: set[str] = set()
    total = current = 0
    is_open = False
    for word in [*(match.lower() for match in _WORD.findall(text)), ""]:
        if word in _NUMBER_WORDS:
            value = _NUMBER_WORDS[word]
            if is_open and not (current % 100 >= 20 and value < 10) and current % 100:
                found.add(str(total + current))
                total = current = 0
            current, is_open = current + value, True
        elif is_open and word in _SCALES:
            scale = _SCALES[word]
            if scale == 100:
                current *= scale
            else:
                total, current = total + current * scale, 0
        elif not (is_open and word in ("and", "y", "et")):
            if is_open:
                found.add(str(total + current))
            total = current = 0
            is_open = False
    return found


def find_changed_figures(source: str, text: str) -> tuple[list[str], list[str]]:
    """Return the numbers that ``text`` lacks of its source, and those that it adds. Either may spell them out.

    A month of a date by name counts as well, as ``month 3``, and so does a percentage of what is none in the source. A
    date whose day and month changed places is an addition.
    """
    here, there = find_figures(text), find_figures(source)
    spelled_here, spelled_there = find_spelled_figures(text), find_spelled_figures(source)
    ours, theirs = _find_named_months(text), _find_named_months(source)
    missing = sorted(there - here - spelled_here)
    added = sorted(here - there - spelled_there)
    # A month by name is compared below: as a number it may stand for anything.
    words = _find_number_words(text) - _ONE
    added += sorted(words - there - spelled_there)
    missing += [f"month {month}" for month in sorted(theirs - ours - here)]
    added += [f"month {month}" for month in sorted(ours - theirs - there)]
    if _PERCENT.search(source) or not _SAYS_PERCENT.search(source):
        wrong = _find_percentages(text) & (there | spelled_there) - _find_percentages(source)
        added += [f"{number} %" for number in sorted(wrong)]
    return missing, [*dict.fromkeys(added), *_find_swapped_dates(source, text)]


def find_unsupported_figures(question: str, cited: str, answer: str) -> list[str]:
    """Return the numbers of an answer that neither its cited lines nor its question have.

    A number of the question is no support where the lines have others, and the answer has none of these: it repeats
    what was asked.
    """
    _, added = find_changed_figures(f"{cited}\n{question}", answer)
    figures, known = find_figures(answer), find_figures(cited)
    repeated = (figures & find_figures(question)) - known - find_spelled_figures(cited)
    return [*added, *(sorted(repeated) if known and not figures - repeated else [])]


def _find_percentages(text: str) -> frozenset[str]:
    return frozenset(each for match in _PERCENT.finditer(text) for each in _normalize(match[1]))


def _find_swapped_dates(source: str, text: str) -> list[str]:
    """Return the dates of a text whose day and month stand the other way round in the source, in its notation."""
    known = {(match[2], *(_plain(match[part]) for part in (1, 3, 4))) for match in _DATE.finditer(source)}
    swapped: list[str] = []
    for match in _DATE.finditer(text):
        mark, first, second, third = match[2], *(_plain(match[part]) for part in (1, 3, 4))
        other = (mark, first, third, second) if len(match[1]) == 4 else (mark, second, first, third)
        if (mark, first, second, third) not in known and other in known:
            swapped.append(match.group())
    return swapped


def _find_named_months(text: str) -> frozenset[str]:
    """Return the months that stand by name beside a number: *may* alone is no month."""
    words = (match["before"] or match["after"] for match in _NAMED_MONTH.finditer(text))
    return frozenset(str(MONTH_NUMBERS[word.lower()]) for word in words if word.lower() in MONTH_NUMBERS)


_IDENTIFIER = re.compile(
    r"https?://[^\s<>\"')\]]+|[\w.+-]+@[\w-]+(?:\.[\w-]+)+|\b(?=[\w/-]*\d)(?=[\w/-]*[A-Z])[A-Z0-9][\w/-]{2,}\b"
)
_NAME = re.compile(r"\b[A-ZÀ-ÖØ-Þ][\w'’-]+(?: (?:von|van|de|der|del|da|di|la|le|of|&))?(?: [A-ZÀ-ÖØ-Þ][\w'’-]+)+")
_LOWER = re.compile(r"\b[a-zà-öø-ÿ]{2,}")
_MIN_PROSE = 3
"""Words in lower case that a line of prose has; in a heading every word may be capitalised."""


def find_identifiers(text: str) -> list[str]:
    """Return the addresses and identifiers of a text, such as ``AB-1234``: they are the same in every language."""
    return list(dict.fromkeys(match.group().rstrip(".,;:/-") for match in _IDENTIFIER.finditer(text)))


def find_names(text: str) -> list[str]:
    """Return what may be names in a text: capitalised words that follow each other in a line of prose."""
    found: list[str] = []
    for line in text.split("\n"):
        if len(_LOWER.findall(line)) >= _MIN_PROSE:
            found += [match.group() for match in _NAME.finditer(line)]
    return list(dict.fromkeys(found))


def find_missing(wanted: Collection[str], text: str) -> list[str]:
    """Return those of ``wanted`` that a text does not have, whatever their case and white space."""
    plain = " ".join(text.split()).casefold()
    return [each for each in wanted if " ".join(each.split()).casefold() not in plain]


_NEGATION = re.compile(
    r"\b(?:not|no(?!\.)|never|none|neither|nor|without|cannot|nicht|kein\w*|nie|niemals|ohne|weder|pas|jamais|"
    r"aucun\w*|sans|"
    r"nunca|sin|ning[uú]n\w*|senza|niet|geen|nie|bez|inte|ingen)\b|n['’]t\b",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(r"(?<=[.!?;])\s+|\n+")


def contradicts(claim: str, source: str) -> bool:
    """Return whether a claim negates what its source affirms, or the reverse, as far as words tell.

    The sentence of the source that shares most with the claim is compared with it. Both must be of one language.
    """
    negates = bool(_NEGATION.search(claim))
    if negates and not _NEGATION.search(source):
        return True
    own = stems(claim)
    nearest = max(_CLAUSE_END.split(source), key=lambda each: len(own & stems(each)), default="")
    return not negates and bool(_NEGATION.search(nearest))
