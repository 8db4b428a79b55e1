"""Queries for plain questions over one table, written by rules: sums, counts, extremes, conditions, groups.

A model of half a billion parameters writes every second query right; a rule writes all of those that it knows. It must
account for every word of the question: one word that it does not know, and the question is left to the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from octollm.services.arms.coder.table_schema import TableColumn, TableSchema, quote_identifier

MAX_QUESTION = 300
"""Characters of a question that rules look at."""

_SUMS = """
sum total totals summe gesamt gesamtsumme insgesamt zusammen somme totale total somma suma suman soma totaal som
summa summan sammanlagt yhteensä součet celkem razem toplam toplamı άθροισμα összege összesen итого сумма сумму
合計 总和 合计 总计 總和 합계 总额 المجموع مجموع
"""
_AVERAGES = """
average mean avg durchschnitt durchschnittliche durchschnittlicher mittelwert moyenne media promedio média
gemiddelde średnia průměr medel genomsnitt keskiarvo среднее средняя ortalama átlag 平均 평균 متوسط
"""
_HIGHEST = """
highest largest biggest maximum max greatest höchste höchster höchstes größte größter größtes maximale
élevé maximal más alto alta massimo massima maior máximo hoogste grootste najwyższa największa nejvyšší högsta
största suurin максимальный максимальная наибольшая yüksek legmagasabb 最大 最高 최대
"""
_LOWEST = """
lowest smallest minimum min least niedrigste niedrigster niedrigstes kleinste kleinster kleinstes minimale
minimal mínimo minimo minima menor laagste kleinste najniższa nejnižší lägsta minsta pienin минимальный
минимальная наименьшая düşük legalacsonyabb 最小 最低 최소
"""
_EARLIEST, _LATEST = "earliest first früheste frühestes erste oldest", "latest last späteste spätestes letzte newest"
_FILLERS = """
what is are was the of a an in for all column columns give me tell find calculate compute show please s value
values over wie hoch war waren ist sind der die das des den dem von was für im spalte werte gib mir quelle quel
est la le les de du des cuál es el los columna qual è il lo di della del é a o da do coluna wat van het een jaka
jest kolumny jaký je sloupce vad är av i mikä on какова каков в столбце столбца по nedir ποιο είναι το του η της
mennyi az sütun का ما هو هي
"""
_ASIAN_FILLERS = """
はいくらですか はいくら はいくつですか はどれくらいですか 是多少 多少 是什么 是 的 の 얼마입니까 의 는 은 は ですか
"""


@dataclass(frozen=True, slots=True)
class _Function:
    """An SQL function, and the types of the columns that it takes."""

    sql: str
    types: str


_NUMBERS = r"(?:U?(?:TINYINT|SMALLINT|INTEGER|BIGINT|HUGEINT)|FLOAT|DOUBLE|DECIMAL.*)"
_DATES = r"(?:DATE|TIMESTAMP.*)"
_FUNCTIONS = {
    word: function
    for words, function in (
        (_SUMS, _Function("sum", _NUMBERS)),
        (_AVERAGES, _Function("avg", _NUMBERS)),
        (_HIGHEST, _Function("max", _NUMBERS)),
        (_LOWEST, _Function("min", _NUMBERS)),
        (_EARLIEST, _Function("min", _DATES)),
        (_LATEST, _Function("max", _DATES)),
    )
    for word in words.split()
}
_KNOWN_FILLERS = frozenset(_FILLERS.split())
_MONTHS = ("january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
           "december")  # fmt: skip
_ROW_COUNT = re.compile(
    r"(?:please )?(?:how many|(?:what is |tell me )?the number of|count(?: all)?(?: the)?) (?:data )?"
    r"(?:rows|records|entries|lines|zeilen)(?: of data)?"
    r"(?: (?:are|is|does|do|has|have|there|it|in|of|this|that|the|file|table|data|csv|sheet|spreadsheet|contains?"
    r"|holds?|[\w.-]+\.\w{2,4}))*\W*|wie viele zeilen(?: \w+){0,4}\W*",
    re.IGNORECASE,
)
_COUNTED = re.compile(r"(?:how many|(?:what is )?the number of) (?P<noun>\w+) (?:are there )?(?P<rest>.+)")
_WHICH = re.compile(
    r"(?:which|what) (?P<label>⟦\d+⟧) (?:has|have|had|is|with) the (?P<word>\w+)(?: (?P<sum>total|sum of))? "
    r"(?P<number>⟦\d+⟧)(?P<rest>.*)"
)
_LOOKUP = re.compile(r"what (?:is|was) the (?P<wanted>⟦\d+⟧) (?:of|for) (?:the )?(?P<label>⟦\d+⟧) (?P<value>.+)")
_PER = re.compile(r"\b(?:per|by|for each|for every|of each|in each|je|pro|par|por|per ogni|на)\s+(?P<column>⟦\d+⟧)\s*$")
_WHERE = re.compile(r"\b(?:where|with|having|have|has|whose|and)\s+")
_COMPARISONS = (
    (r"(?:is |are )?(?:greater|more|higher|larger|bigger) than|(?:is )?(?:above|over)|>", ">"),
    (r"(?:is |of )?at least|>=|≥", ">="),
    (r"(?:is |are )?(?:less|lower|smaller|fewer) than|(?:is )?(?:below|under)|<", "<"),
    (r"(?:is |of )?at most|<=|≤", "<="),
    (r"is equal to|equals|equal to|is|was|are|==?", "="),
)
_CONDITION = re.compile(
    r"⟦(?P<column>\d+)⟧ ?(?:"
    + "|".join(f"(?P<c{n}>{words})" for n, (words, _) in enumerate(_COMPARISONS))
    + r") (?P<value>.+)"
)
_PERIOD = re.compile(rf"\b(?:in|during|of) (?:(?P<month>{'|'.join(_MONTHS)}) )?(?P<year>(?:19|20)\d\d)$")


def row_count_query(goal: str, tables: tuple[TableSchema, ...]) -> str | None:
    """Return the query that answers ``goal``, when that asks for nothing but the rows of the only table."""
    if len(tables) != 1 or not _ROW_COUNT.fullmatch(goal.strip()):
        return None
    return f"SELECT count(*) AS row_count FROM {quote_identifier(tables[0].table)}"  # noqa: S608


def plain_query(goal: str, tables: tuple[TableSchema, ...]) -> str | None:
    """Return the query that answers ``goal``, when every word of it is known and one table alone has its columns."""
    counted = row_count_query(goal, tables)
    question = " ".join(goal.split()).rstrip(" ?.!。？؟;")
    if counted is not None or len(question) > MAX_QUESTION or "⟦" in question:
        return counted
    found = [
        query
        for table in tables
        if (query := _Question(table).parse(question)) is not None and not _mentions_others(question, table, tables)
    ]
    return found[0] if len(found) == 1 else None


def _mentions_others(question: str, table: TableSchema, tables: Sequence[TableSchema]) -> bool:
    """Say whether a question has a word of another table, so that it may ask for a join."""
    own = {column.name.lower() for column in table.columns}
    others = {c.name.lower() for each in tables if each is not table for c in each.columns} - own
    others |= {each.table.lower() for each in tables if each is not table}
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", question.lower()) for name in others)


class _Question:
    """Parses questions over one table. A column in a question is written as its number between brackets."""

    def __init__(self, table: TableSchema) -> None:
        self._table = table
        self._source = quote_identifier(table.table)
        self._names = frozenset(re.findall(r"[^\W_]+", table.table.lower()))
        """The words of the table's name, which a question may use for the whole table."""

    def parse(self, question: str) -> str | None:
        """Return the query, or ``None`` when a word is not known."""
        # A value must be looked up as it is written, so lower case is for the words alone.
        text = self._mark_columns(question)
        counted = _COUNTED.fullmatch(_lower(text))
        if counted and counted["noun"] in {"rows", "records", "entries", "lines", *self._names}:
            return self._count(text[counted.start("rest") :])
        which = _WHICH.fullmatch(_lower(text))
        if which:
            return self._which(which, text[which.start("rest") :])
        lookup = _LOOKUP.fullmatch(_lower(text))
        if lookup:
            return self._look_up(lookup, text[lookup.start("value") :])
        return self._aggregate(text)

    def _mark_columns(self, question: str) -> str:
        order = sorted(enumerate(self._table.columns), key=lambda each: -len(each[1].name))
        for number, column in order:
            for name in dict.fromkeys((column.name, column.name.replace("_", " "))):
                start = r"(?<![\w⟦])" if name[:1].isascii() else "(?<!⟦)"
                end = r"(?![\w⟧])" if name[-1:].isascii() or (name[-1:].isalpha() and not _is_asian(name)) else ""
                pattern = start + re.escape(name) + end
                # "Summa" is a column and "summa" a word of the question, where both occur.
                flags = 0 if re.search(pattern, question) else re.IGNORECASE
                question = re.sub(pattern, f"⟦{number}⟧", question, flags=flags)
        return question

    def _column(self, mark: str) -> TableColumn:
        return self._table.columns[int(mark.strip("⟦⟧"))]

    def _count(self, rest: str) -> str | None:
        per = _PER.search(_lower(rest))
        if per and not rest[: per.start()].strip():
            name = quote_identifier(self._column(per["column"]).name)
            return f"SELECT {name}, count(*) AS row_count FROM {self._source} GROUP BY {name} ORDER BY {name}"  # noqa: S608
        where = self._conditions(rest)
        return f"SELECT count(*) AS row_count FROM {self._source} WHERE {where}" if where else None  # noqa: S608

    def _which(self, match: re.Match[str], rest: str) -> str | None:
        label, number = self._column(match["label"]), self._column(match["number"])
        function = _FUNCTIONS.get(match["word"])
        if function is None or function.sql not in ("max", "min") or not _takes(function, number) or label == number:
            return None
        where = self._conditions(rest) if rest.strip() else ""
        if where is None:
            return None
        name, value = quote_identifier(label.name), quote_identifier(number.name)
        condition = f" WHERE {where}" if where else ""
        if match["sum"]:
            value = f"sum({value})"
            source = f"(SELECT {name}, {value} AS total FROM {self._source}{condition} GROUP BY {name})"  # noqa: S608
            return f"SELECT {name}, total FROM {source} WHERE total = (SELECT {function.sql}(total) FROM {source})"  # noqa: S608
        best = f"(SELECT {function.sql}({value}) FROM {self._source}{condition})"  # noqa: S608
        conditions = " AND ".join(filter(None, (f"{value} = {best}", where)))
        return f"SELECT DISTINCT {name}, {value} FROM {self._source} WHERE {conditions}"  # noqa: S608

    def _look_up(self, match: re.Match[str], value: str) -> str | None:
        wanted, label = self._column(match["wanted"]), self._column(match["label"])
        condition = self._compare(label, "=", value)
        if condition is None or wanted == label:
            return None
        return f"SELECT {quote_identifier(wanted.name)} FROM {self._source} WHERE {condition}"  # noqa: S608

    def _aggregate(self, text: str) -> str | None:
        group: TableColumn | None = None
        per = _PER.search(_lower(text))
        if per:
            group, text = self._column(per["column"]), text[: per.start()]
        where = _WHERE.search(_lower(text))
        conditions: list[str] = []
        if where:
            found = self._conditions(text[where.start() :])
            if found is None:
                return None
            conditions.append(found)
            text = text[: where.start()]
        elif period := self._find_period(text):
            conditions.append(period[0])
            text = period[1]
        columns = set(re.findall(r"⟦\d+⟧", text))
        rest = self._take_values(re.sub(r"⟦\d+⟧", " ", text), conditions)
        if rest is None:
            return None
        words = _split_words(rest)
        functions = list({_FUNCTIONS[word] for word in words if word in _FUNCTIONS})
        unknown = [word for word in words if word not in _FUNCTIONS and word not in _KNOWN_FILLERS | self._names]
        if len(columns) != 1 or len(functions) != 1 or unknown:
            return None
        column, function = self._column(columns.pop()), functions[0]
        if function.sql in ("max", "min") and re.fullmatch(_DATES, column.type):
            function = _Function(function.sql, _DATES)
        if not _takes(function, column):
            return None
        value = f"{function.sql}({quote_identifier(column.name)})"
        condition = f" WHERE {' AND '.join(conditions)}" if conditions else ""
        if group is None:
            return f"SELECT {value} FROM {self._source}{condition}"  # noqa: S608
        name = quote_identifier(group.name)
        return f"SELECT {name}, {value} FROM {self._source}{condition} GROUP BY {name} ORDER BY {name}"  # noqa: S608

    def _take_values(self, text: str, conditions: list[str]) -> str | None:
        """Return the text without known values, each of which becomes a condition; ``None`` for one of two columns."""
        homes: dict[str, list[TableColumn]] = {}
        for column in self._table.columns:
            for value in column.values if column.is_text else ():
                if len(value) > 1 and value.lower() not in _KNOWN_FILLERS and value.lower() not in _FUNCTIONS:
                    homes.setdefault(value, []).append(column)
        for value in sorted(homes, key=lambda each: -len(each)):
            pattern = rf"(?<!\w){re.escape(value)}(?!\w)"
            if re.search(pattern, text):
                if len(homes[value]) > 1:
                    return None
                text = re.sub(pattern, " ", text)
                conditions.append(f"{quote_identifier(homes[value][0].name)} = {_literal(value)}")
        # Two values of one column are two groups, or one of either; a condition on both holds for no row.
        names = [condition.partition(" = ")[0] for condition in conditions if " = '" in condition]
        return text if len(set(names)) == len(names) else None

    def _find_period(self, text: str) -> tuple[str, str] | None:
        """Return the condition of a month or year at the end of a question, and the question before it."""
        match = _PERIOD.search(_lower(text).rstrip())
        dates = [column for column in self._table.columns if re.fullmatch(_DATES, column.type)]
        if match is None or len(dates) != 1:
            return None
        year = int(match["year"])
        month = _MONTHS.index(match["month"]) + 1 if match["month"] else 0
        first = f"{year}-{month or 1:02}-01"
        last = f"{year + (month in (0, 12))}-{month % 12 + 1 if month else 1:02}-01"
        name = quote_identifier(dates[0].name)
        return f"{name} >= DATE '{first}' AND {name} < DATE '{last}'", text[: match.start()]

    def _conditions(self, text: str) -> str | None:
        """Return the conditions of ``where … and …`` in SQL."""
        found: list[str] = []
        pieces = [piece for piece in _split(_WHERE, text) if piece.strip()]
        for piece in pieces:
            match = _CONDITION.fullmatch(_lower(piece).strip())
            if match is None:
                return None
            sign = next(sign for n, (_, sign) in enumerate(_COMPARISONS) if match[f"c{n}"])
            start = len(piece) - len(piece.lstrip()) + match.start("value")
            condition = self._compare(self._table.columns[int(match["column"])], sign, piece[start:].strip())
            if condition is None:
                return None
            found.append(condition)
        return " AND ".join(found) or None

    def _compare(self, column: TableColumn, sign: str, value: str) -> str | None:
        """Return a condition, or ``None`` when the value is none of the column's type or is not in the column."""
        name = quote_identifier(column.name)
        if "⟦" in value:
            return None
        if re.fullmatch(_NUMBERS, column.type):
            return f"{name} {sign} {value}" if re.fullmatch(r"-?\d+(?:\.\d+)?", value) else None
        if re.fullmatch(_DATES, column.type):
            is_day = re.fullmatch(r"\d{4}-\d\d-\d\d", value) and not (column.type != "DATE" and sign == "=")
            return f"{name} {sign} DATE '{value}'" if is_day else None
        if sign != "=":
            return None
        if column.type == "BOOLEAN":
            known = {"true": "true", "yes": "true", "false": "false", "no": "false"}.get(value.lower())
            return f"{name} = {known}" if known else None
        if not column.is_text:
            return None
        known = [each for each in column.values if each.casefold() == value.casefold()]
        if column.values and len(known) != 1 and value not in known:
            return None
        return f"{name} = {_literal(known[0] if len(known) == 1 else value)}"


def _split_words(text: str) -> list[str]:
    text = text.lower()
    if _is_asian(text):
        for filler in _ASIAN_FILLERS.split():
            text = text.replace(filler, " ")
    return re.findall(r"[^\W_]+|[^\w\s'’,¿¡]", text)


def _split(pattern: re.Pattern[str], text: str) -> list[str]:
    """Split ``text`` where its lower case matches."""
    pieces: list[str] = []
    start = 0
    for match in pattern.finditer(_lower(text)):
        pieces.append(text[start : match.start()])
        start = match.end()
    return [*pieces, text[start:]]


def _lower(text: str) -> str:
    """Return ``text`` in lower case, with each character at its place."""
    return "".join(char.lower() if len(char.lower()) == 1 else char for char in text)


def _is_asian(text: str) -> bool:
    return any(
        "\u3040" <= char <= "\u30ff" or "\u4e00" <= char <= "\u9fff" or "\uac00" <= char <= "\ud7a3" for char in text
    )


def _takes(function: _Function, column: TableColumn) -> bool:
    return re.fullmatch(function.types, column.type) is not None


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
