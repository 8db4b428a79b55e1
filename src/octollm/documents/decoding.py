"""Decoding of text in any encoding: byte order mark, UTF-8, UTF-16 and UTF-32 without a mark, then legacy encodings.

Every assumption becomes a note for the user.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from octollm.documents.model import DocumentError

SAMPLE_BYTES = 64 * 1024
"""Bytes that tell text from other content."""
GUESS_BYTES = 16 * 1024
"""Bytes around characters that are not ASCII which a guess of a legacy encoding looks at."""
MIN_PLAUSIBLE = 0.9
"""Share of characters that text has to consist of: letters, digits, punctuation and spaces."""
MAX_CONTROLS = 0.02
"""Share of control characters from which on bytes are no text."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    # Before UTF-16, whose little-endian mark is the beginning of this one.
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
_NAMES = {
    "cp1250": "Windows-1250", "cp1251": "Windows-1251", "cp1252": "Windows-1252", "cp1253": "Windows-1253",
    "cp1254": "Windows-1254", "cp1255": "Windows-1255", "cp1256": "Windows-1256", "cp932": "Shift JIS",
    "shift_jis": "Shift JIS", "gb18030": "GB 18030", "big5": "Big5", "euc_jp": "EUC-JP", "cp949": "EUC-KR",
    "iso2022_jp": "ISO-2022-JP", "koi8_r": "KOI8-R",
    **{name: name.upper().removesuffix("-LE").removesuffix("-BE") for name in ("utf-8", *_WIDE)},
}  # fmt: skip
_MULTI_BYTE = ("gb18030", "cp932", "euc_jp", "big5", "cp949")
_LATIN = ("cp1252", "cp1250", "cp1254")
_SINGLE_BYTE = (*_LATIN, "cp1251", "cp1253", "koi8_r", "cp1255", "cp1256")
_SUPERSETS = {
    "ascii": "cp1252", "latin_1": "cp1252", "iso8859_15": "cp1252", "cp1252": "cp1252", "gb2312": "gb18030",
    "gbk": "gb18030", "shift_jis": "cp932", "shift_jis_2004": "cp932", "shift_jisx0213": "cp932", "euc_kr": "cp949",
    "iso8859_2": "cp1250", "iso8859_5": "cp1251", "iso8859_7": "cp1253", "iso8859_9": "cp1254", "big5hkscs": "big5",
}  # fmt: skip
"""The encoding that Windows and browsers use where another one is declared (https://encoding.spec.whatwg.org/#names)."""
_NON_ASCII_RUN = re.compile(rb"[\x00-\x7f]{0,40}(?:[\x80-\xff]+[\x00-\x7f]{0,40})+")
_HIGH_RUN = re.compile(rb"[\x80-\xff]+")
_WORD = re.compile(rb"[A-Za-z\x80-\xff]+")
_ASCII_LETTER = re.compile(rb"[A-Za-z]")
_SIGN_IN_WORD = re.compile(r"[a-z][¡-¿×÷‚ƒ„…†‡ˆ‰‹›•˜™¨¸]+[a-z]")
_SIGN_IN_GREEK_WORD = re.compile(r"[Α-ώ][¢-³µ-·½]|[¢-³µ·½][Α-ώ]")
_POLISH_SIGNS = re.compile(r"£[a-z]|¯[a-zó]|œæ|\bz³|[a-zó]Ÿ[a-z]")
"""Polish in the table of Western Europe: Ł, Ż, ść, zł and ź."""
_CONTROLS = re.compile(r"[\x01-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]")
_BIDI_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class DecodedText:
    """Text with LF at its line ends, without NUL and lone surrogates; ``notes`` say what was assumed."""

    text: str
    notes: tuple[str, ...] = ()


def decode_text(data: bytes, declared: str = "") -> DecodedText:
    """Decode ``data``: by its byte order mark, else UTF-8, else by ``declared`` or the most likely encoding.

    ``declared`` is an encoding that the file itself names, for example in HTML. Raises :class:`DocumentError` for
    bytes that are no text.
    """
    notes: list[str] = []
    text = _decode(data, _normalise_name(declared), notes)
    if "\0" in text:
        notes.append(f"removed {text.count(chr(0))} NUL characters")
        text = text.replace("\0", "")
    text = clean_text(text)
    if not text.isascii() and any(control in text for control in _BIDI_CONTROLS):
        notes.append("has characters that change the direction of text, so it may not read as it looks")
    return DecodedText(text, tuple(notes))


def clean_text(text: str) -> str:
    """Return ``text`` with LF at the ends of its lines, and with U+FFFD for each lone surrogate; NUL is removed."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        text = text.replace("\0", "")
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATES.sub("\ufffd", text)
    return text


def is_text(data: bytes) -> bool:
    """Say whether the beginning of ``data`` is text in some encoding."""
    try:
        decode_text(data[:SAMPLE_BYTES])
    except DocumentError:
        return False
    return True


def _decode(data: bytes, declared: str, notes: list[str]) -> str:
    for mark, name in _MARKS:
        if data.startswith(mark):
            if name != "utf-8":
                notes.append(f"read as {_NAMES[name]}")
            return _decode_marked(data[len(mark) :], name, notes)
    if b"\0" in data:
        return _decode_with_nul(data, notes)
    try:
        # The last character may be incomplete where the caller has only the beginning of a file.
        text, used = codecs.utf_8_decode(data, "strict", False)
    except UnicodeDecodeError:
        name = declared or _guess_encoding(data)
        notes.append(f"read as {_NAMES.get(name, name)}")
        return _check_plausible(_decode_marked(data, name, notes))
    if used < len(data):
        if used < len(data) - 3 or len(data) < SAMPLE_BYTES:
            name = declared or _guess_encoding(data)
            notes.append(f"read as {_NAMES.get(name, name)}")
            return _check_plausible(_decode_marked(data, name, notes))
        return text
    if b"\x1b$" in data[:SAMPLE_BYTES]:
        try:
            text = data.decode("iso2022_jp")
        except UnicodeDecodeError:
            return _check_plausible(text)
        notes.append("read as ISO-2022-JP")
        return text
    return _check_plausible(text)


def _decode_marked(data: bytes, name: str, notes: list[str]) -> str:
    try:
        return data.decode(name)
    except (UnicodeDecodeError, LookupError):
        text = data.decode(name, "replace")
        notes.append(f"replaced {text.count(chr(0xFFFD))} characters that are not valid {_NAMES.get(name, name)}")
        return text


def _decode_with_nul(data: bytes, notes: list[str]) -> str:
    """Decode data that has NUL bytes: UTF-16 or UTF-32 without a mark, or UTF-8 with stray NUL characters."""
    name = _find_wide_encoding(data)
    if name:
        notes.append(f"read as {_NAMES[name]} without a byte order mark")
        return _decode_marked(data, name, notes)
    try:
        text = data.decode()
    except UnicodeDecodeError as exc:
        raise DocumentError("The file is binary: its bytes are no text in any encoding.") from exc
    # Text has a stray NUL at most; a format of fixed fields is full of them.
    if text.count("\0") > max(16, len(text) // 100):
        raise DocumentError("The file is binary: its bytes are no text in any encoding.")
    return _check_plausible(text)


def _find_wide_encoding(data: bytes) -> str:
    """Return the encoding of ``data`` if it is UTF-16 or UTF-32; else empty."""
    sample = data[:SAMPLE_BYTES]
    # Every second byte of ASCII in UTF-16 is NUL. Other scripts have control characters or bytes from 0x80 on.
    if sample.isascii() and sample.count(0) < 0.2 * len(sample) and not _has_controls(sample.decode()):
        return ""
    best, best_rank = "", 0.0
    for name in _WIDE:
        if len(data) % (4 if "32" in name else 2):
            continue
        try:
            text = sample.decode(name)
        except UnicodeDecodeError as error:
            # The sample may end within a pair of surrogates.
            if error.start < len(sample) - 4:
                continue
            text = sample[: error.start].decode(name)
        score = _plausibility(text)
        # Of two byte orders that both give letters, the one with spaces, digits and line ends is right.
        rank = score + sum(char < "\x80" for char in text) / max(1, len(text))
        if score >= MIN_PLAUSIBLE and "\0" not in text and rank > best_rank:
            best, best_rank = name, rank
    return best


def _check_plausible(text: str) -> str:
    if _has_controls(text[:SAMPLE_BYTES]):
        raise DocumentError("The file is binary: its bytes are no text in any encoding.")
    return text


def _has_controls(sample: str) -> bool:
    return len(_CONTROLS.findall(sample)) > max(2, MAX_CONTROLS * len(sample))


def _plausibility(text: str) -> float:
    """Return the share of characters that text consists of, less for characters of many scripts at once."""
    if not text:
        return 0.0
    counts = Counter(text)
    good = sum(
        number for char, number in counts.items() if char in "\t\r\n" or unicodedata.category(char)[0] in "LMNPSZ"
    )
    # Wrong byte order gives letters of scripts that do not stand together.
    blocks = Counter[int]()
    for char, number in counts.items():
        point = ord(char)
        blocks[0x4E if 0x3000 <= point < 0xA000 else 0xAC if 0xAC00 <= point < 0xD7A4 else point >> 8] += number
    main = sum(number for _, number in blocks.most_common(4))
    return good / len(text) * (main / len(text))


def _guess_encoding(data: bytes) -> str:
    """Return the most likely legacy encoding of ``data``, which is no UTF-8 and has no NUL."""
    import charset_normalizer  # noqa: PLC0415  a twentieth of the start of a command, for a rare file

    sample = _sample_non_ascii(data)
    found = charset_normalizer.from_bytes(sample, cp_isolation=[*_MULTI_BYTE, *_SINGLE_BYTE], enable_fallback=False)
    names = [match.encoding for match in found if _is_consistent(sample, match.encoding)]
    if _has_latin_letters(sample):
        return _choose_latin(sample, names)
    names = [name for name in names if name not in _LATIN]
    if not names:
        return "cp1252" if _decode_or_none(data, "cp1252") is not None else "gb18030"
    if names[0] == "cp1251" and _looks_hebrew(sample):
        return "cp1255"
    if names[0] == "cp1253" and _looks_chinese(sample):
        return "gb18030"
    return names[0]


def _looks_chinese(sample: bytes) -> bool:
    """Say whether text that may be Greek is Chinese: bytes in pairs, which in Greek would be signs within words."""
    if any(len(run) % 2 for run in _HIGH_RUN.findall(sample)):
        return False
    return bool(_SIGN_IN_GREEK_WORD.search(sample.decode("cp1253", "replace")))


def _sample_non_ascii(data: bytes) -> bytes:
    parts: list[bytes] = []
    size = 0
    for match in _NON_ASCII_RUN.finditer(data):
        parts.append(match.group()[:4096])
        size += len(parts[-1])
        if size >= GUESS_BYTES:
            break
    return b" ".join(parts)


def _decode_or_none(data: bytes, name: str) -> str | None:
    try:
        return data.decode(name)
    except UnicodeDecodeError:
        return None


def _is_consistent(sample: bytes, name: str) -> bool:
    """Say whether a multi-byte encoding gives what its language is written in, which chance does not."""
    if name not in ("cp949", "cp932", "euc_jp"):
        return True
    text = [char for char in sample.decode(name, "replace") if char > "\x7f"]
    hangul = sum("\uac00" <= char <= "\ud7a3" for char in text)
    kana = sum("\u3040" <= char <= "\u30ff" for char in text)
    half_width = sum("\uff61" <= char <= "\uff9f" for char in text)
    if name == "cp949":
        return hangul >= 0.9 * len(text)
    if name == "euc_jp":
        return kana > 0.1 * len(text)
    # Each byte from A1 to DF is a half-width letter: a few of them are letters of a Western language.
    return half_width <= 0.5 * len(text) or half_width >= 4


def _has_latin_letters(sample: bytes) -> bool:
    """Say whether the bytes from 0x80 on are letters among ASCII ones: single, or a few in one word with them."""
    high = sum(byte >= 0x80 for byte in sample)
    letters = high + sum(chr(byte).isalnum() for byte in sample if byte < 0x80)
    runs = _HIGH_RUN.findall(sample)
    if high >= 0.5 * letters:
        return False
    words = [word for word in _WORD.findall(sample) if not word.isascii()]
    mixed = sum(_ASCII_LETTER.search(word) is not None for word in words)
    is_mixed = mixed >= 0.5 * len(words) and max(map(len, runs)) <= 3
    return is_mixed or sum(len(run) == 1 for run in runs) >= 0.5 * len(runs)


def _choose_latin(sample: bytes, names: Sequence[str]) -> str:
    """Choose among the tables of Latin letters. Western Europe's is the most common one, so doubts go to it."""
    text = _decode_or_none(sample, "cp1252")
    if text is None:
        return next(iter(names), "cp1252")
    icelandic = set(text) & set("ðýþÝÞ")
    # The letters that Turkish has in their places. Icelandic and Czech text has vowels with an acute accent, too.
    if icelandic and (names[:1] == ["cp1254"] or (len(icelandic) > 1 and not set(text) & set("áéíóúæÁÉÍÓÚÆ"))):
        return "cp1254"
    if names[:1] == ["cp932"] and "ƒ" in text:
        return "cp932"
    # In Polish the table of Western Europe puts signs into words, and Czech is full of letters that are rare there.
    eastern = _SIGN_IN_WORD.search(text) or _POLISH_SIGNS.search(text) or len(set(text) & set("šžŠŽìòø")) > 1
    return "cp1250" if eastern and _decode_or_none(sample, "cp1250") is not None else "cp1252"


def _looks_hebrew(sample: bytes) -> bool:
    """Say whether text that may be Russian is Hebrew: no capitals, and few of the bytes that are Russian vowels."""
    high = [byte for byte in sample if byte >= 0x80]
    vowels = sum(byte in b"\xe0\xe5\xe8\xee\xf3" for byte in high)
    return all(0xE0 <= byte <= 0xFA for byte in high) and vowels < 0.33 * len(high)


def _normalise_name(declared: str) -> str:
    """Return Python's name of a declared encoding; empty when it is none, or no encoding of text."""
    if not declared:
        return ""
    try:
        info = codecs.lookup(declared.strip().strip("\"'"))
    except (LookupError, ValueError):
        return ""
    name = info.name.replace("-", "_")
    # `codecs` knows transformations such as rot13 as well.
    if not getattr(info, "_is_text_encoding", True) or name.startswith(("utf", "unicode", "raw", "idna", "punycode")):
        return ""
    return _SUPERSETS.get(name, info.name)
