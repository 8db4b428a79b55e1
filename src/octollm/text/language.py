"""Languages: which one a text is in, and which one a request names."""

from __future__ import annotations

import re

_SCRIPTS: dict[str, str] = {
    "Russian": "\u0400-\u04ff", "Ukrainian": "\u0400-\u04ff", "Bulgarian": "\u0400-\u04ff", "Greek": "\u0370-\u03ff",
    "Chinese": "\u4e00-\u9fff", "Japanese": "\u3040-\u30ff\u4e00-\u9fff", "Korean": "\uac00-\ud7af",
    "Arabic": "\u0600-\u06ff", "Hebrew": "\u0590-\u05ff", "Hindi": "\u0900-\u097f", "Thai": "\u0e00-\u0e7f",
}  # fmt: skip
_COMMON_WORDS: dict[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "English": "the and of to is are was were that this with for from have has it they which would not you be by",
        "German": "der die das und ist sind war nicht ein eine einen mit von zu den dem auf für im sich auch wird es",
        "French": "le les des et est sont une dans que qui pour pas du au avec sur ce cette il elle nous vous par",
        "Spanish": "el los las y es son una que para no del con por como se su está más lo al pero este esta",
        "Italian": "il gli di e è sono una che per non del con della nel come si più questo questa alla da ma",
        "Portuguese": "os as e é são uma que para não do da com por como se mais em ao pelo pela este esta um",
        "Dutch": "de het een en is zijn van niet met op te voor dat die aan er ook wordt bij naar om door",
        "Polish": "i w na jest nie się z do że to są jak po od za przez dla oraz ale był która który",
        "Swedish": "och är att det som en på för av med inte den till har var ett om från så kan vid men",
    }.items()
}
MIN_LANGUAGE_WORDS = 6
"""Words of a text whose language can be detected."""

_OTHER_NAMES: dict[str, str] = {
    "Deutsch": "German", "Englisch": "English", "Französisch": "French", "Spanisch": "Spanish",
    "Italienisch": "Italian", "Portugiesisch": "Portuguese", "Niederländisch": "Dutch", "Polnisch": "Polish",
    "Schwedisch": "Swedish", "Russisch": "Russian", "Chinesisch": "Chinese", "Japanisch": "Japanese",
    "français": "French", "anglais": "English", "allemand": "German", "espagnol": "Spanish", "italien": "Italian",
    "español": "Spanish", "inglés": "English", "alemán": "German", "francés": "French", "italiano": "Italian",
}  # fmt: skip
"""Names of languages in languages other than English."""
_NAMES = {name.lower(): name for name in (*_COMMON_WORDS, *_SCRIPTS)} | {
    name.lower(): language for name, language in _OTHER_NAMES.items()
}
_ENGLISH_NAMES = "|".join([*_COMMON_WORDS, *_SCRIPTS])
_REQUEST = re.compile(
    rf"\b(?:(?:in|into|to) (?P<english>{_ENGLISH_NAMES})\b(?!\s+(?!and\b|or\b|only\b|with\b|in\b|using\b)[a-z])|"
    rf"(?:(?:auf|ins|in|en|al|em|in het|naar het) )(?P<other>{'|'.join(map(re.escape, _OTHER_NAMES))})(?:e|en)?\b)"
)
"""``in German`` asks for a language, and ``in German law`` does not."""


def detect_language(text: str) -> str:
    """Return the English name of a text's language, or an empty string where that is not clear.

    The script of the letters decides, else the common words of the language.
    """
    letters = [char for char in text if char.isalpha()]
    for language, script in _SCRIPTS.items():
        if letters and len(re.findall(f"[{script}]", text)) * 2 > len(letters):
            return language
    words = re.findall(r"[^\W\d_]+", text.lower())
    if len(words) < MIN_LANGUAGE_WORDS:
        return ""
    hits = {language: sum(word in common for word in words) for language, common in _COMMON_WORDS.items()}
    best, second = sorted(hits, key=lambda each: -hits[each])[:2]
    return best if hits[best] >= 2 and hits[best] >= 1.5 * hits[second] else ""


def is_same_language(one: str, other: str) -> bool:
    """Return whether two languages are the same as far as their script tells: Russian and Ukrainian share theirs."""
    if one == other:
        return True
    return one in _SCRIPTS and other in _SCRIPTS and _SCRIPTS[one] in (_SCRIPTS[other], _SCRIPTS["Japanese"])


def find_requested_language(text: str) -> tuple[str, tuple[int, int]] | None:
    """Return the language that a text asks for, such as ``in German`` or ``auf Englisch``, and where it does.

    ``None`` if it names none, or several.
    """
    found = {match["english"] or _NAMES[match["other"].lower()]: match.span() for match in _REQUEST.finditer(text)}
    if len(found) != 1:
        return None
    [(name, span)] = found.items()
    return name, span
