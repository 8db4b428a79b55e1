"""The whole corpus, its size, and the guard of its digest.

``python -m answer_corpus.corpus FOLDER`` writes the files, to look at them.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from pathlib import Path

from answer_corpus import countries, documents, hostile, joined_and_open, model, structured_tables, text_tables
from answer_corpus.model import Case

FROZEN = Path(__file__).with_name("frozen.json")
"""When the corpus was frozen, and its digest then. Questions that are added later go into a case of their own."""


@functools.cache
def build() -> tuple[Case, ...]:
    """Return every case, in one order."""
    parts = (countries, text_tables, structured_tables, joined_and_open, documents, hostile)
    return tuple(case for part in parts for case in part.build())


def summarise() -> dict[str, object]:
    """Return what ``frozen.json`` has."""
    cases = build()
    return {
        "sha256": model.digest(cases),
        "cases": len(cases),
        "files": sum(len(case.files) for case in cases),
        "questions": sum(len(case.questions) for case in cases),
        "kinds": dict(Counter(case.kind for case in cases)),
    }


def load_frozen() -> dict[str, object]:
    return json.loads(FROZEN.read_text("utf-8"))


def main() -> None:
    folder = Path(sys.argv[1])
    for case in build():
        (folder / case.id).mkdir(parents=True, exist_ok=True)
        for name, data in case.files.items():
            (folder / case.id / name).write_bytes(data)
    print(json.dumps(summarise(), indent=1))


if __name__ == "__main__":
    main()
