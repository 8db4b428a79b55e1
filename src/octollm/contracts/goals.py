"""Does a goal want a program? It is told by the words of the trade, since a small model cannot tell reliably."""

from __future__ import annotations

import re

_ASKS = re.compile(
    r"^\W*(?:please\s+)?(?:explain|describe|summari[sz]e|translate|compare|what|why|who|whom|whose|which|when|where|how|is|are|"
    r"was|were|does|do|did|should|list|discuss|define|tell|rewrite|proofread|find|look up|search)\b(?!\s*\()",
    re.IGNORECASE,
)
_NOUNS = re.compile(
    r"\b(?:functions?|classe?s?|scripts?|programs?|modules?|code|methods?|algorithms?|unit\s*tests?|tests?|decorators?|"
    r"generators?|iterators?|parsers?|cli|command[- ]line|regex(?:es)?|regular expressions?|librar(?:y|ies)|snippets?|"
    r"subroutines?|routines?|python|dataclass(?:es)?|coroutines?|context managers?)\b",
    re.IGNORECASE,
)
_VERBS = re.compile(r"^\W*(?:please\s+)?(?:implement|code|program|refactor|debug)\b", re.IGNORECASE)
_MAKES = re.compile(r"\b(?:write|create|build|make|add|fix|implement|generate|extend|port|develop)\b", re.IGNORECASE)
_HEAD = re.compile(r"(?<![\w.])[a-z_][a-z0-9_]*\((?:[\w\s,=*:.'\"\[\]|]*)\)")


def wants_program(goal: str, *, with_files: bool = False) -> bool:
    """Return whether a goal asks for code to be written.

    It does when it shows a call such as ``name(argument)``, begins with a verb of programming, or names a thing of
    programming without being a question or a request to explain. A goal that comes ``with_files`` must also say that
    something is to be made, since it may well speak of the code in them.
    """
    if _ASKS.match(goal):
        return False
    if _VERBS.match(goal):
        return True
    if with_files and not _MAKES.search(goal):
        return False
    return bool(_HEAD.search(goal) or _NOUNS.search(goal))
