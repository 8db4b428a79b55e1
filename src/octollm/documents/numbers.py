"""Number notations: which numbers the texts of a column can be.

A column is judged by its *shapes*, its texts with each digit written as ``9``: there are few of them however many rows
there are. A notation is decided for the whole column, never for one cell.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

DecimalMark = Literal[".", ","]

MAX_DIGITS = 15
"""Digits of an integer that a double represents exactly; a longer one is an identifier."""
_MIN_PHONE_DIGITS = 8

_CURRENCY_CODES = (
    "AED AUD BGN BRL CAD CHF CLP CNY COP CZK DKK EGP EUR GBP HKD HRK HUF IDR ILS INR ISK JPY KES KRW MAD MXN MYR NGN "
    "NOK NZD PEN PHP PKR PLN QAR RON RSD RUB SAR SEK SGD THB TRY TWD UAH USD VND ZAR"
)
_CURRENCY_SIGNS = (
    "US$ A$ AU$ C$ CA$ HK$ MX$ NT$ NZ$ R$ S$ $ € £ ¥ ￥ ₹ ₽ ₺ ₩ ￦ ₪ ₫ ฿ ₦ ₴ ₸ ₾ ₡ ₲ ₱ ₵ ৳ ﷼ zł kr. kr Kč Ft lei Rs. "
    "Rs Fr. SFr. Euro Eur TL Rp RM S/ KSh руб. руб р. грн. грн лв. лв din. 円 元 圓 원"
)
_UNITS = (
    "°C °F % ‰ ppm ppb mm cm dm m km mi ft in yd m² km² ha m³ l L ml mL cl hl gal mg g kg t lb lbs oz s sec min "
    "h hrs hours d days ms µs Hz kHz MHz GHz V mV kV A mA W kW MW Wh kWh MWh J kJ kcal cal N Pa hPa kPa MPa bar mbar "
    "psi dB lx lm rpm km/h m/s mph l/h m³/h pcs pc Stk Stk. Stück St. KB MB GB TB KiB MiB GiB bit Mbit/s "
    "Std Std. Tage Jahre years Bq mol pH"
)
_WITHOUT_THOUSANDTHS = frozenset(("円", "元", "圓", "원", "¥", "￥", "₩", "￦", "₫", "JPY", "CNY", "KRW", "VND", "CLP"))
"""Currencies of which three digits after a mark are thousands, for nobody writes prices to a thousandth in them."""
_DIGIT_ZEROS = "٠۰०০๐０"
"""The zeros of the scripts whose digits are read: Arabic, Persian, Devanagari, Bengali, Thai and full-width ones."""
FOREIGN_DIGITS = "".join(chr(ord(zero) + digit) for zero in _DIGIT_ZEROS for digit in range(10)) + "٫٬．，"
ASCII_DIGITS = "0123456789" * len(_DIGIT_ZEROS) + ".,.,"
"""What each of :data:`FOREIGN_DIGITS` is in ASCII."""
_SPACES = " \u00a0\u202f\u2009"
_MINUS = "-−–"


def _alternatives(words: Sequence[str]) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


_MONEY = _alternatives([*_CURRENCY_SIGNS.split(), *_CURRENCY_CODES.split()])
_SPACE = f"[{_SPACES}]*"
_SHAPE = re.compile(
    rf"(?P<open>\()?{_SPACE}(?P<sign1>[{_MINUS}+])?{_SPACE}(?P<before>{_MONEY})?{_SPACE}(?P<sign2>[{_MINUS}+])?{_SPACE}"
    rf"(?P<core>[.,]?9(?:[9.,'’{_SPACES}]*9)?)(?P<dash>[.,][{_MINUS}—]{{1,2}})?(?P<exponent>[eE][-+]?9{{1,3}})?{_SPACE}"
    rf"(?P<sign3>[{_MINUS}+])?{_SPACE}(?P<after>{_MONEY}|{_alternatives(_UNITS.split())})?{_SPACE}(?P<sign4>[{_MINUS}+])?{_SPACE}"
    rf"(?P<side>[CcDd][Rr]\.?)?(?P<close>\))?"
)
_UNKNOWN_UNIT = re.compile(rf"9(?P<gap>[{_SPACES}]?)(?P<word>[^\W\d_]{{1,12}}\.?)$")
_NO_UNITS = frozenset({"am", "pm", "uhr", "e", "x"})
_UNIT_CELL = re.compile(rf"[\[(]\s*[^\d\])]{{1,20}}\s*[\])]|{_MONEY}|{_alternatives(_UNITS.split())}|%")


def is_unit(text: str) -> bool:
    """Say whether a cell is nothing but a unit, such as ``kg``, ``[°C]`` or ``(EUR)``."""
    return bool(_UNIT_CELL.fullmatch(text.strip()))


@dataclass(frozen=True, slots=True)
class Shape:
    """The texts of a column that differ in their digits alone: how many, and the least and the greatest of them."""

    pattern: str
    count: int
    low: str
    high: str


@dataclass(frozen=True, slots=True)
class NumberShape:
    """A shape that is a number. ``marks`` are the decimal marks under which it is one."""

    shape: Shape
    marks: frozenset[DecimalMark]
    fraction: dict[DecimalMark, bool]
    """Whether it has decimal places, by decimal mark."""
    integer_digits: int
    unit: str
    is_grouped: bool
    has_leading_zero: bool
    has_plain_sign: bool
    """Whether at most a leading ``-`` is its sign."""

    @property
    def is_ambiguous(self) -> bool:
        """Return whether the two decimal marks give two numbers, as in ``1.234``."""
        return len(self.marks) == 2 and self.fraction["."] != self.fraction[","]


def _is_grouping(groups: list[str]) -> bool:
    """Say whether digit groups are thousands (1 234 567) or Indian lakhs and crores (12,34,567)."""
    first, *rest = groups
    if not 1 <= len(first) <= 3 or len(rest[-1]) != 3:
        return False
    if all(len(group) == 3 for group in rest):
        return True
    return len(first) <= 2 and all(len(group) == 2 for group in rest[:-1])


def _core_fits(core: str, mark: DecimalMark) -> bool:
    """Say whether the digits and marks of a number are one with this decimal mark."""
    whole, found, places = core.partition(mark)
    if found and not (places.isdigit() and mark not in places):
        return False
    other = "," if mark == "." else "."
    separators = {char for char in whole if char != "9"}
    if len(separators) > 1 or not separators <= {other, "'", "’", *_SPACES}:
        return False
    if not separators:
        return True
    return _is_grouping(whole.split(separators.pop()))


def find_common_unit(shapes: Sequence[Shape]) -> tuple[str, ...]:
    """Return the unknown words after the numbers of a column, such as ``rooms``; none unless each text has one.

    A letter right after the digits, or a single one, is part of an identifier: ``12a`` and ``12 B`` are no numbers.
    """
    words: set[str] = set()
    for shape in shapes:
        match = _UNKNOWN_UNIT.search(shape.pattern)
        if match is None or match["word"].lower() in _NO_UNITS:
            return ()
        if match["word"].isascii() and (not match["gap"] or len(match["word"].rstrip(".")) == 1):
            return ()
        words.add(match["word"])
    return tuple(sorted(words))


def parse_number_shape(shape: Shape, unit: str = "") -> NumberShape | None:
    """Return how a shape is a number, or ``None`` when it is none. ``unit`` is a word that stands after it."""
    if unit:
        plain = Shape(shape.pattern.removesuffix(unit).rstrip(_SPACES), shape.count, shape.low, shape.high)
        number = parse_number_shape(plain) if plain.pattern != shape.pattern else None
        return replace(number, shape=shape, unit=unit) if number and not number.unit else None
    match = _SHAPE.fullmatch(shape.pattern)
    if match is None or bool(match["open"]) != bool(match["close"]):
        return None
    signs = [match[name] for name in ("sign1", "sign2", "sign3", "sign4") if match[name]]
    if len(signs) + bool(match["open"]) + bool(match["side"]) > 1 or (match["before"] and match["after"]):
        return None
    core = match["core"]
    start = match.start("core")
    # All texts of a shape have their digits in the same places, so the least one begins with 0 if any does.
    first_is_zero = shape.low[start] == "0"
    marks: set[DecimalMark] = set()
    fraction: dict[DecimalMark, bool] = {".": False, ",": False}
    for mark in (".", ","):
        if _core_fits(core, mark) and not (first_is_zero and re.match("9{1,3}[^9]", core) and mark not in core):
            marks.add(mark)
            fraction[mark] = mark in core
    if match["dash"]:
        # "12.-" is a price without cents.
        marks = {mark for mark in marks if mark not in core}
    if match["exponent"]:
        if "." not in core and not re.search("[-+]", match["exponent"]):
            return None  # 12E5 is an article number as well
        marks &= {"."}
        fraction["."] = True
    unit = match["before"] or match["after"] or ""
    if unit in _WITHOUT_THOUSANDTHS and len(marks) == 2:
        marks = {mark for mark in marks if not re.search(rf"[{mark}]999$", core)} or marks
    if not marks:
        return None
    separators = sum(char != "9" for char in core)
    return NumberShape(
        shape,
        frozenset(marks),
        fraction,
        integer_digits=min(len(re.sub("[^9]", "", core.split(mark)[0])) for mark in marks),
        unit=unit,
        is_grouped=separators > (1 if any(fraction.values()) else 0),
        has_leading_zero=first_is_zero and len(core) > 1 and core[1] == "9",
        has_plain_sign=match["sign1"] == "-" and start == 1
        if signs
        else not (match["open"] or match["side"] or match["dash"]),
    )


@dataclass(frozen=True, slots=True)
class NumberColumn:
    """A column of which each text is a number. ``marks`` are the decimal marks that all of them allow."""

    shapes: tuple[NumberShape, ...]
    marks: frozenset[DecimalMark]

    @property
    def is_ambiguous(self) -> bool:
        """Return whether the decimal mark is open and matters."""
        return len(self.marks) == 2 and any(shape.is_ambiguous for shape in self.shapes)

    @property
    def evidence(self) -> DecimalMark | None:
        """Return the decimal mark that this column proves by itself, if it does."""
        return next(iter(self.marks)) if len(self.marks) == 1 else None

    @property
    def units(self) -> tuple[str, ...]:
        """Return the currencies and units beside the numbers, without those that are left out."""
        return tuple(dict.fromkeys(shape.unit for shape in self.shapes if shape.unit))

    @property
    def likely_mark(self) -> DecimalMark | None:
        """Return the decimal mark that an ambiguous column makes likely by itself; no proof."""
        ambiguous = next(shape for shape in self.shapes if shape.is_ambiguous)
        mark = "." if ambiguous.fraction["."] else ","
        others = [shape for shape in self.shapes if not shape.is_ambiguous]
        if any(shape.integer_digits > 3 for shape in others):
            return mark  # 1234 stands without a separator, so the separator of 1.234 is a decimal mark
        return ("," if mark == "." else ".") if others else None

    def is_integer(self, mark: DecimalMark) -> bool:
        """Return whether no number has decimal places under a decimal mark."""
        return not any(shape.fraction[mark] for shape in self.shapes)

    def example(self) -> str:
        """Return an ambiguous text of the column."""
        return next(shape.shape.low for shape in self.shapes if shape.is_ambiguous)

    def sql(self, text: str, mark: DecimalMark) -> str:
        """Return the SQL expression of the number in the SQL expression ``text``; NULL where it is none."""
        patterns = "".join(shape.shape.pattern for shape in self.shapes)
        has_exponent = any(re.search("9[eE][-+9]", shape.shape.pattern) for shape in self.shapes)
        kept = {"9", mark, *("eE-+" if has_exponent else "")}
        plain = all(shape.has_plain_sign for shape in self.shapes)
        kept |= {"-"} if plain else set()
        removed = "".join(sorted(set(patterns) - kept))
        changes = bool(removed) or (mark == "," and not self.is_integer(mark))
        number = f"translate({text}, {_literal(mark + removed)}, '.')" if changes else text
        if not plain and not has_exponent:
            whole = f"regexp_replace({text}, '[.,][{_MINUS}—]+', '')"
            number = f"translate({whole}, {_literal(mark + removed)}, '.')"
            negative = f"regexp_matches({whole}, '[{_MINUS}(]|[Dd][Rr]\\.?$')"
            number = f"CASE WHEN {negative} THEN '-' ELSE '' END || {number}"
        if has_exponent:
            number = f"replace({number}, '−', '-')"
        if any(shape.unit.endswith(".") for shape in self.shapes):
            # The point of "Rs." is no decimal point.
            number = number.replace(text, f"regexp_replace({text}, '\\p{{L}}+\\.', '')")
        return f"TRY_CAST({number} AS {'BIGINT' if self.is_integer(mark) else 'DOUBLE'})"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def read_number_column(shapes: Sequence[Shape]) -> NumberColumn | str:
    """Return how all shapes are numbers, or why the column stays text."""
    parsed: list[NumberShape] = []
    marks: frozenset[DecimalMark] = frozenset((".", ","))
    units = find_common_unit(shapes)
    for shape in shapes:
        number = parse_number_shape(shape) or parse_number_shape(shape, units[0] if len(units) == 1 else "")
        if number is None:
            return f"{shape.low[:40]!r} is no number"
        if not marks & number.marks:
            return f"{parsed[0].shape.low!r} and {shape.low!r} are in different notations"
        marks &= number.marks
        parsed.append(number)
    zero = next((number for number in parsed if number.has_leading_zero), None)
    if zero is not None:
        return f"leading zeros, as in {zero.shape.low!r}"
    # A mark that is open decides about digits of fractions, never about those of identifiers.
    digits = next((number for number in parsed if number.integer_digits > MAX_DIGITS), None)
    if digits is not None and not any(any(number.fraction.values()) for number in parsed):
        return f"{digits.integer_digits} digits, as in {digits.shape.low!r}"
    phone = next((n for n in parsed if n.shape.pattern.startswith("+") and n.integer_digits >= _MIN_PHONE_DIGITS), None)
    if phone is not None and not any(phone.fraction.values()):
        return f"phone numbers, as in {phone.shape.low!r}"
    column = NumberColumn(tuple(parsed), marks)
    if len(parsed) == 1 and re.fullmatch(f"9{{2,3}}(?:[{_SPACES}]999){{2,}}", shapes[0].pattern):
        return f"digit groups of one length, as in {shapes[0].low!r}, which may be identifiers"
    if any(n.has_plain_sign is False and re.search("9[eE]", n.shape.pattern) for n in parsed):
        return "exponents beside other signs"
    return column
