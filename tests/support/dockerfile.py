"""A reader of Dockerfiles: enough of the format (docs.docker.com/reference/dockerfile) to carry one out by hand.

What it does not know it refuses, so that a step can never be passed over in silence.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field

KNOWN = frozenset(
    {"FROM", "ARG", "ENV", "LABEL", "RUN", "COPY", "USER", "WORKDIR", "ENTRYPOINT", "CMD", "EXPOSE", "HEALTHCHECK"}
)


@dataclass(frozen=True)
class Step:
    """One instruction with its variables filled in."""

    word: str
    text: str

    @property
    def words(self) -> list[str]:
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)


@dataclass
class Stage:
    """What one FROM begins."""

    image: str
    name: str
    steps: list[Step] = field(default_factory=list)

    def last(self, word: str) -> Step:
        return [step for step in self.steps if step.word == word][-1]

    @property
    def environment(self) -> dict[str, str]:
        pairs = [part for step in self.steps if step.word == "ENV" for part in step.words]
        return dict(part.split("=", 1) for part in pairs)


def read_dockerfile(text: str, arguments: dict[str, str] | None = None) -> list[Stage]:
    """Return the stages of a Dockerfile; ``arguments`` stand in place of the defaults of ``ARG``."""
    given = dict(arguments or {})
    everywhere: dict[str, str] = {}
    known: dict[str, str] = {}
    stages: list[Stage] = []
    for line in _lines(text):
        word, _, rest = line.partition(" ")
        if word not in KNOWN:
            raise ValueError(f"unknown instruction: {line}")
        rest = rest.strip()
        if word == "ARG":
            name, _, default = rest.partition("=")
            known[name] = given.get(name, default or everywhere.get(name, ""))
            if not stages:
                everywhere[name] = known[name]
            continue
        if word == "FROM":
            # Arguments from before the first FROM are known to FROM alone.
            image, *named = _filled(rest, everywhere).split()
            stages.append(Stage(image, named[1] if named else str(len(stages))))
            known = {}
            continue
        # A shell fills in the variables of RUN, with the arguments in its environment.
        stages[-1].steps.append(Step(word, _exported(rest, known) if word == "RUN" else _filled(rest, known)))
    return stages


def _lines(text: str) -> list[str]:
    kept = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [" ".join(line.split("\\\n")) for line in re.sub(r"\\\n\s*", " ", "\n".join(kept)).splitlines()]


def _filled(text: str, values: dict[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        return values[found[1]]

    return re.sub(r"\$\{(\w+)\}", value, text)


def _exported(text: str, values: dict[str, str]) -> str:
    return "".join(f"{name}={shlex.quote(value)}; " for name, value in values.items()) + text
