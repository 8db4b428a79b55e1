"""Intent classification: whether a goal asks for a program, by keywords.

It is a rule because a small model does not answer this question reliably.
"""

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
    """Return whether ``goal`` asks for code.

    It does when it contains a call such as ``name(argument)``, begins with a programming verb, or names a programming
    noun without being a question or a request to explain. A goal that ``has_files`` also needs a verb of creation,
    since it may just talk about the code in those files.
    """
    if _QUESTION.match(goal):
        return False
    if _PROGRAMMING_VERB.match(goal):
        return True
    if has_files and not _CREATION_VERB.search(goal):
        return False
    return bool(_CALL_SIGNATURE.search(goal) or _PROGRAMMING_NOUN.search(goal))
