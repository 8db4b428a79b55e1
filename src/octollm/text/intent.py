"""Intent classification of a goal by keywords: does it ask for a program? A small model cannot tell reliably."""

from __future__ import annotations

import re

_QUESTION = re.compile(
    r"^\W*(?:please\s+)?(?:explain|describe|summari[sz]e|translate|compare|what|why|who|whom|whose|which|when|where|how|is|are|"
    r"was|were|does|do|did|should|list|discuss|define|tell|rewrite|proofread|find|look up|search)\b(?!\s*\()",
    re.IGNORECASE,
)
_PROGRAMMING_NOUN = re.compile(
    r"\b(?:functions?|classe?s?|scripts?|programs?|modules?|code|methods?|algorithms?|unit\s*tests?|tests?|decorators?|"
    r"generators?|iterators?|parsers?|cli|command[- ]line|regex(?:es)?|regular expressions?|librar(?:y|ies)|snippets?|"
    r"subroutines?|routines?|python|dataclass(?:es)?|coroutines?|context managers?)\b",
    re.IGNORECASE,
)
_PROGRAMMING_VERB = re.compile(r"^\W*(?:please\s+)?(?:implement|code|program|refactor|debug)\b", re.IGNORECASE)
_CREATION_VERB = re.compile(
    r"\b(?:write|create|build|make|add|fix|implement|generate|extend|port|develop)\b", re.IGNORECASE
)
_CALL_SIGNATURE = re.compile(r"(?<![\w.])[a-z_][a-z0-9_]*\((?:[\w\s,=*:.'\"\[\]|]*)\)")


def is_programming_goal(goal: str, *, has_files: bool = False) -> bool:
    """Return whether a goal asks for code to be written.

    It does when it shows a call such as ``name(argument)``, begins with a verb of programming, or names a thing of
    programming without being a question or a request to explain. A goal that comes ``with_files`` must also say that
    something is to be made, since it may well speak of the code in them.
    """
    if _QUESTION.match(goal):
        return False
    if _PROGRAMMING_VERB.match(goal):
        return True
    if has_files and not _CREATION_VERB.search(goal):
        return False
    return bool(_CALL_SIGNATURE.search(goal) or _PROGRAMMING_NOUN.search(goal))
