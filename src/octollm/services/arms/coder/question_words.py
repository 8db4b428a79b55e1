"""Words of questions that say what a query has to do, in English, German, French and Spanish.

Superlatives with their direction and measure, comparisons, negations, and the names of columns that have a measure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from octollm.services.arms.coder.query_parts import Direction

Measure = Literal["any", "slowness", "age", "time", "price", "weight"]
"""What a superlative compares. ``slowness`` and ``age`` have opposite directions in durations and speeds, or in ages
and dates."""


@dataclass(frozen=True, slots=True)
class Superlative:
    """Words that ask for an extreme of a measure. A weak one has other meanings, too: *first*, *most*."""

    pattern: re.Pattern[str]
    direction: Direction
    measure: Measure
    is_weak: bool = False


def _superlative(words: str, direction: Direction, measure: Measure = "any", *, is_weak: bool = False) -> Superlative:
    alternatives = "|".join(f"(?:{word.replace('_', ' ')})" for word in words.split())
    return Superlative(re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)"), direction, measure, is_weak)


_PERIOD = (
    r"(?!_(?:\d|name|names|row|rows|line|lines|column|two|three|four|five|six|ten|few|half|quarter|week|month|year|day|"
    r"days|weeks|months|years|halbjahr|quartal|woche|monat|jahr|tage?n?|trimestre|semestre|semaine|mois|année|jours?|"
    r"nom|mes|meses|semana|año|días|nombre)(?!\w))"
)
"""*The last month* is a period, and *the first name* a column."""
# The order matters: what one pattern has matched, the later ones do not see.
SUPERLATIVES = (
    _superlative(
        "most_(?:expensive|costly) priciest dearest costliest least_(?:affordable|cheap) "
        r"teuerste[nrsm]? plus_ch(?:er|ère)s? plus_coûteu(?:x|se)s? más_car[oa]s?",
        "max", "price",
    ),
    _superlative(
        "cheapest most_(?:affordable|economical|inexpensive) least_(?:expensive|costly) "
        "(?:günstig|billig|preiswert|preisgünstig)ste[nrsm]? moins_ch(?:er|ère)s? más_barat[oa]s? menos_car[oa]s?",
        "min", "price",
    ),
    _superlative("slowest langsamste[nrsm]? plus_lente?s? más_lent[oa]s? most_slowly", "max", "slowness"),
    _superlative("fastest quickest schnellste[nrsm]? plus_(?:rapide|vite)s? más_rápid[oa]s?", "min", "slowness"),
    _superlative("oldest eldest älteste[nrsm]? plus_(?:âgée?|vieux|vieille|ancien|ancienne)s? "
                 "más_(?:viej[oa]|antigu[oa])s?", "max", "age"),
    _superlative("youngest jüngste[nrsm]? plus_jeunes? más_jóven(?:es)? más_joven", "min", "age"),
    _superlative("earliest früh(?:e)?ste[nrsm]? plus_tôt más_tempran[oa]s?", "min", "time"),
    _superlative("latest most_recent newest spätes?te[nrsm]? neu(?:e)?ste[nrsm]? plus_(?:récent|récente|tard)s? "
                 "más_(?:reciente|tarde|nuev[oa])s?", "max", "time"),
    _superlative("heaviest schwerste[nrsm]? plus_lourde?s? más_pesad[oa]s?", "max", "weight"),
    _superlative("lightest leichteste[nrsm]? plus_lég(?:er|ère)s? más_liger[oa]s?", "min", "weight"),
    _superlative(
        "highest largest biggest greatest longest tallest deepest hottest warmest busiest richest strongest "
        "furthest farthest widest steepest größte[nrsm]? (?:höch|läng|tief|wärm|heiße|stärk|weite|breite)ste[nrsm]? "
        "plus_(?:élevée?|grande?|haute?|longue?|long|forte?|chaude?|gros|grosse|profonde?)s? "
        "más_(?:alt[oa]|grande|larg[oa]|caliente|cálid[oa]|fuerte|profund[oa])s?",
        "max",
    ),
    _superlative(
        "lowest smallest shortest coldest coolest fewest poorest weakest narrowest shallowest tiniest "
        "(?:niedrig|klein|kürze|kälte|kühl|schwäch|gering|ärm)ste[nrsm]? "
        "plus_(?:bas|basse|petite?|courte?|faible|froide?)s? más_(?:baj[oa]|pequeñ[oa]|cort[oa]|frí[oa]|débil)s?",
        "min",
    ),
    _superlative("(?<!at_)(?<!in_)(?<!for_)most(?!_(?:of|efficient|effective|successful|likely|important)(?!\\w)) "
                 "meiste[nrsm]? le_plus_de le_plus_d['’]\\w+ le_plus(?=$|_(?:souvent|vendue?s?|visitée?s?)) "
                 "maximum maximale[nrsm]? máxim[oa]s? "
                 "con_más(?!_(?:de|que)(?!\\w)) mayor(?:es)?(?!_(?:de|que|a|o)(?!\\w))", "max", is_weak=True),
    _superlative("(?<!at_)least wenigste[nrsm]? le_moins_de le_moins_d['’]\\w+ le_moins "
                 "minimum minimale[nrsm]? mínim[oa]s? "
                 "con_menos(?!_(?:de|que)(?!\\w)) menor(?:es)?(?!_(?:de|que|a|o)(?!\\w))", "min", is_weak=True),
    _superlative(f"(?<=the_)first{_PERIOD} (?<=(?:der|die|das|den)_)erste[nrsm]?{_PERIOD} premi(?:er|ère)s?{_PERIOD} "
                 f"primer[oa]?s?{_PERIOD}", "min", "time", is_weak=True),
    _superlative(f"(?<=the_)last{_PERIOD} (?<=(?:der|die|das|den)_)letzte[nrsm]?{_PERIOD} derni(?:er|ère)s?{_PERIOD} "
                 f"últim[oa]s?{_PERIOD}", "max", "time", is_weak=True),
)  # fmt: skip
LISTS_ALL = re.compile(
    r"\b(?:sort|rank|order(?:ed)? by|list|from the|sortier|ordne|liste|tri[eé]|classe|ordena|sorted)\w*\b"
)
"""Questions whose answer may be every row in an order."""

_DURATIONS_TEXT = """
ms s sec secs second seconds mins minute minutes h hour hours duration latency elapsed took runtime wait delay time
dauer zeit laufzeit sekunden minuten stunden durée temps délai secondes heures duración tiempo segundos minutos horas
"""
DURATIONS = frozenset(_DURATIONS_TEXT.split())
_SPEEDS_TEXT = """
speed mph kmh kph knots velocity throughput rate rps qps mbps pace_kmh geschwindigkeit tempo vitesse débit velocidad
per
"""
SPEEDS = frozenset(_SPEEDS_TEXT.split())
AGES = frozenset(("age", "alter", "âge", "edad"))
YEARS = frozenset(("year", "jahr", "année", "annee", "año", "built", "born", "founded", "baujahr", "geburtsjahr"))
_PRICES_TEXT = """
price prices cost costs fee fare rent unitprice preis preise einzelpreis kosten miete prix coût cout tarif loyer
precio precios coste costo alquiler
"""
PRICES = frozenset(_PRICES_TEXT.split())
_WEIGHTS_TEXT = """
weight mass kg lbs grams tonnes gewicht masse poids peso
"""
WEIGHTS = frozenset(_WEIGHTS_TEXT.split())
_QUANTITIES_TEXT = """
count quantity qty stock pieces pcs units anzahl menge stück bestand quantité cantidad
"""
QUANTITIES = frozenset(_QUANTITIES_TEXT.split())
_GENERIC_NAMES_TEXT = """
name id date time number count total value type year month day row item code no nr amount status order state datum
zahl wert typ jahr monat tag nom nombre fecha valor tipo
"""
GENERIC_NAMES = frozenset(_GENERIC_NAMES_TEXT.split())
"""Names of columns that a question uses as plain words."""

_NUMBER = r"(?P<number>-?\d+(?:[.,]\d+)*|zero|null|zéro|cero)"
_THAN = {
    ">": "more|greater|higher|larger|bigger|longer|heavier|mehr|größer|höher|länger|plus|más|mayor(?:es)?",
    "<": "less|fewer|lower|smaller|shorter|lighter|cheaper|weniger|kleiner|niedriger|kürzer|billiger|günstiger|moins"
    "|menos|menor(?:es)?",
}
COMPARED = tuple(
    (sign, re.compile(rf"(?<!\w)(?:{words}) (?:than|als|que|de|a) {_NUMBER}(?![\w%])")) for sign, words in _THAN.items()
) + tuple(
    (sign, re.compile(rf"(?<!\w)(?:{words}) {_NUMBER}(?![\w%])"))
    for sign, words in (
        (">=", "at least|mindestens|au moins|al menos|no less than|not less than"),
        ("<=", "at most|höchstens|au plus|como máximo|no more than|not more than|up to|bis zu"),
        (">", "above|over|exceeding|exceeds|über|au-dessus de|por encima de"),
        ("<", "below|under|unter|en dessous de|por debajo de"),
    )
)
NEGATION = re.compile(
    r"(?<!\w)(?:not|no|non|except|excluding|without|other than|but|nicht|kein\w*|ohne|außer|pas|sans|sauf|hors|sin|"
    r"excepto|never|unless|n['’]t|isn['’]t|aren['’]t|wasn['’]t|different|rather|neither|nor)(?!\w)|n['’]t(?!\w)",
    re.IGNORECASE,
)
COUNTED = re.compile(
    r"(?<!\w)(?:how many|number of|wie viele|anzahl(?: der)?|combien d(?:e |['’])|nombre d(?:e |['’])|cuánt[oa]s|"
    r"número de) ?(?:different |verschiedene |distinct )?(?P<noun>[^\W\d_]+)"
)
ASKS_FOR_LABEL = (
    r"(?<!\w)(?:which|what|whose|per|each|every|by|welche[nrsm]?|je|pro|nach|quel(?:le)?s?|par|chaque|qué|cuál|por|"
    r"cada) "
)
"""Before the name of a column that the rows of the answer have to show."""
