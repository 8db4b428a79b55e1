"""Date and time notations: which dates the texts of a column can be, by its shapes (see ``numbers``).

Whether ``03/04/2024`` is in March or in April is decided by a whole column: a part above 12 is the day.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from octollm.documents.numbers import Shape

DateOrder = Literal["dmy", "mdy", "ymd"]

_MONTHS = (
    "january jan janvier janv januar jänner januari enero ene gennaio gen janeiro styczeń stycznia",
    "february feb février févr februar februari febrero febbraio febr fevereiro fev fév luty lutego",
    "march mar mars märz mär mrz maart mrt marzo março marzec marca",
    "april apr avril avr abril abr aprile kwiecień kwietnia",
    "may mai mei mayo maggio mag maio maj maja",
    "june jun juin juni junio giugno giu junho czerwiec czerwca",
    "july jul juillet juil juli julio luglio lug julho lipiec lipca",
    "august aug août aou aoû augustus agosto ago sierpień sierpnia",
    "september sep sept septembre septiembre settembre set setembro wrzesień września",
    "october oct octobre oktober okt octubre ottobre ott outubro out październik października",
    "november nov novembre noviembre novembro listopad listopada",
    "december dec décembre déc dezember dez diciembre dic dicembre dezembro grudzień grudnia",
)
MONTH_NUMBERS = {name: number for number, names in enumerate(_MONTHS, 1) for name in names.split()}
"""Month names and abbreviations of English, German, French, Spanish, Italian, Portuguese, Dutch and Polish."""
_NAME = r"(?P<name>[^\W\d_]{3,12})\.?"
_WEEKDAY = r"(?:[^\W\d_]{2,10}[.,]{0,2}\s+)?"
_DATES = (
    r"(?P<a>9{1,4})(?P<mark>[-/.])\s?(?P<b>9{1,2})(?P=mark)\s?(?P<c>9{1,4})",
    r"(?P<a>9{4})(?P<mark>\.)\s?(?P<b>9{1,2})\.\s?(?P<c>9{1,2})\.",
    r"(?P<year>9{4})\s?[年년]\s?9{1,2}\s?[月월]\s?(?P<day>9{1,2})\s?[日일]",
    rf"(?P<day>9{{1,2}})(?:\.|st|nd|rd|th|er|º)?[\s\-/]*(?:de |of )?{_NAME}[\s\-/,]*(?:de |of )?"
    "(?P<year>9{4}|9{2})",
    rf"{_NAME}[\s\-]*(?P<day>9{{1,2}})(?:st|nd|rd|th)?,?[\s\-]+(?P<year>9{{4}})",
    rf"(?P<year>9{{4}})[\s\-/]{_NAME}[\s\-/](?P<day>9{{1,2}})",
    r"(?P<compact>9{8})",
)
_TIME = (
    r"(?:[T,]?\s*(?P<hour>9{1,2})(?P<colon>[:.h])99(?P<seconds>(?P=colon)99(?P<fraction>[.,]9{1,9})?)?"
    r"(?:\s*(?P<meridiem>[AaPp]\.?[Mm]\.?))?(?:\s?Uhr)?\s?(?P<offset>Z|UTC|GMT|[+-]99:?99)?)?"
)
_PATTERNS = tuple(re.compile(_WEEKDAY + date + _TIME, re.IGNORECASE) for date in _DATES)
_CLOCK = re.compile(r"9{1,2}:99(:99(\.9{1,6})?)?")


@dataclass(frozen=True, slots=True)
class DateShape:
    """A shape that is a date, with or without a time of day."""

    shape: Shape
    orders: frozenset[DateOrder]
    """The orders of day, month and year that are possible."""
    mark: str
    year_digits: int
    time: str
    """The format of the time of day in terms of ``strptime``; empty without one."""
    name: str
    """The name of the month; empty where it is a number."""
    has_meridiem: bool
    has_offset: bool
    is_compact: bool

    @property
    def may_begin_with_year(self) -> bool:
        """Return whether all dates are like 24/12/31, with one first number, which can be the year as well."""
        return self.year_digits == 2 and self.mark == "/" and self.shape.low[:2] == self.shape.high[:2]


def parse_date_shape(shape: Shape) -> DateShape | None:
    """Return how a shape is a date, or ``None`` when it is none."""
    match = next((found for pattern in _PATTERNS if (found := pattern.fullmatch(shape.pattern))), None)
    if match is None:
        return None
    parts = match.groupdict()
    name = (parts.get("name") or "").lower()
    if name and name not in MONTH_NUMBERS:
        return None
    orders, year_digits = _find_orders(parts, shape)
    if not orders:
        return None
    time = _find_time_format(parts)
    if time is None:
        return None
    return DateShape(
        shape,
        orders,
        mark=parts.get("mark") or "",
        year_digits=year_digits,
        time=time,
        name=name,
        has_meridiem=bool(parts["meridiem"]),
        has_offset=bool(parts["offset"]),
        is_compact=bool(parts.get("compact")),
    )


def _find_orders(parts: dict[str, str | None], shape: Shape) -> tuple[frozenset[DateOrder], int]:
    """Return the possible orders, and how many digits the year has."""
    year = parts.get("year")
    if year:
        if shape.pattern.startswith("9999"):
            return frozenset(("ymd",)), 4
        is_day_first = (parts.get("day") or "") and _is_before(shape.pattern, parts.get("name") or "")
        return frozenset(("dmy",) if is_day_first else ("mdy",)), len(year)
    if parts.get("compact"):
        return frozenset(("ymd",)), 4
    first, last, mark = parts["a"] or "", parts["c"] or "", parts["mark"]
    if len(first) == 4 and len(last) <= 2:
        return frozenset(("ymd",)), 4
    if len(first) > 2 or len(last) not in (2, 4):
        return frozenset(), 0
    if len(last) == 2 and mark == "-":
        return frozenset(), 0  # 12-34-56 is a sort code as well
    return frozenset(("dmy",) if mark == "." else ("dmy", "mdy")), len(last)


def _is_before(pattern: str, name: str) -> bool:
    at = pattern.find(name)
    return "9" in pattern[:at]


def _find_time_format(parts: dict[str, str | None]) -> str | None:
    """Return the format of the time of day once all that is no digit is a hyphen; ``None`` for one that is not read."""
    if not parts["hour"]:
        return ""
    text = "-%I-%M" if parts["meridiem"] else "-%H-%M"
    if parts["seconds"]:
        text += "-%S"
    if parts["fraction"] and parts["colon"] != ":":
        return None
    if parts["fraction"]:
        text += "-%f"
    return text


def is_clock(shapes: Sequence[Shape]) -> bool:
    """Say whether a column holds times of day."""
    return bool(shapes) and all(_CLOCK.fullmatch(shape.pattern) for shape in shapes)


@dataclass(frozen=True, slots=True)
class DateColumn:
    """A column of which each text is a date. ``orders`` are those that all its numeric dates allow."""

    shapes: tuple[DateShape, ...]
    orders: frozenset[DateOrder]

    @property
    def is_ambiguous(self) -> bool:
        """Return whether the order of day and month is open, as far as shapes tell."""
        return {"dmy", "mdy"} <= self.orders

    @property
    def has_time(self) -> bool:
        """Return whether a text has a time of day."""
        return any(shape.time for shape in self.shapes)

    @property
    def has_short_year(self) -> bool:
        """Return whether a year has two digits."""
        return any(shape.year_digits == 2 for shape in self.shapes)

    def narrowed(self, greatest: Sequence[int | None]) -> frozenset[DateOrder]:
        """Return the orders that are left, given the greatest first and second number of the ambiguous dates."""
        first, second = (number or 0 for number in greatest)
        orders = set(self.orders)
        if first > 12:
            orders.discard("mdy")
        if second > 12:
            orders.discard("dmy")
        return frozenset(orders)

    def greatest_sql(self, text: str) -> tuple[str, str]:
        """Return the SQL expressions of the greatest first and second number of dates in ``text``."""
        return tuple(  # pyright: ignore[reportReturnType]
            f"max(TRY_CAST(regexp_extract({text}, '^\\D*(\\d{{1,2}})[-/]\\s?(\\d{{1,2}})[-/]', {group}) AS INT))"
            for group in (1, 2)
        )

    def sql(self, text: str, order: DateOrder) -> str:
        """Return the SQL expression of the date in the SQL expression ``text``; NULL where it is none.

        ``order`` is that of the ambiguous dates. A UTC offset is left out.
        """
        digits = text
        if any(shape.has_offset for shape in self.shapes):
            digits = f"regexp_replace({digits}, '(\\d\\d:\\d\\d.*?)\\s?(?:Z|UTC|GMT|[+-]\\d\\d:?\\d\\d)$', '\\1')"
        names = sorted({shape.name for shape in self.shapes if shape.name}, key=len, reverse=True)
        if names:
            digits = f"lower({digits})"
            for name in names:
                digits = f"replace({digits}, '{name}', '-{MONTH_NUMBERS[name]}-')"
        if any(shape.is_compact for shape in self.shapes):
            digits = f"regexp_replace({digits}, '^(\\d{{4}})(\\d\\d)(\\d\\d)', '\\1-\\2-\\3')"
        if any(shape.time.endswith("%f") for shape in self.shapes):
            # %f takes microseconds: .5 and .500 are filled to .500000, and what is beyond is cut.
            digits = f"regexp_replace({digits}, '(:\\d\\d[.,]\\d+)', '\\1000000')"
            digits = f"regexp_replace({digits}, '(:\\d\\d[.,]\\d{{6}})\\d+', '\\1')"
        digits = f"trim(regexp_replace({digits}, '[^0-9]+', '-', 'g'), '-')"
        if any(shape.has_meridiem for shape in self.shapes):
            digits += (
                f" || CASE WHEN regexp_matches({text}, '(?i)p\\.?m\\.?$') THEN ' PM'"
                f" WHEN regexp_matches({text}, '(?i)a\\.?m\\.?$') THEN ' AM' ELSE '' END"
            )
        listed = ", ".join(f"'{each}'" for each in self._formats(order))
        return f"try_strptime({digits}, [{listed}])" + ("" if self.has_time else "::DATE")

    def _formats(self, order: DateOrder) -> list[str]:
        formats: set[str] = set()
        for shape in self.shapes:
            own = order if order in shape.orders else next(iter(shape.orders))
            year = "%Y" if shape.year_digits == 4 else "%y"
            date = {"dmy": f"%d-%m-{year}", "mdy": f"%m-%d-{year}", "ymd": f"{year}-%m-%d"}[own]
            formats.add(date + shape.time + (" %p" if shape.has_meridiem else ""))
        # %Y takes two digits as well (24 is the year 24), %y does not take four: it goes first.
        return sorted(formats, key=lambda each: ("%y" not in each, each))


def read_date_column(shapes: Sequence[Shape], *, is_named_date: bool) -> DateColumn | None:
    """Return how all shapes are dates, or ``None``. Eight digits are one only where ``is_named_date`` says so."""
    parsed: list[DateShape] = []
    orders: frozenset[DateOrder] = frozenset(("dmy", "mdy"))
    for shape in shapes:
        date = parse_date_shape(shape)
        if date is None or (date.is_compact and not is_named_date):
            return None
        if date.orders & {"dmy", "mdy"} and not date.name:
            orders &= date.orders
        parsed.append(date)
    if not parsed or len({shape.has_offset for shape in parsed}) > 1 or not orders:
        return None
    if not any(len(shape.orders) == 2 for shape in parsed):
        orders = parsed[0].orders
    return DateColumn(tuple(parsed), orders)
