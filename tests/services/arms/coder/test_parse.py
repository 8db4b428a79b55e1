from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.services.arms.coder.python_source import (
    extract_code,
    find_definition,
    find_main_definition,
    format_signature,
    keep_definitions,
    try_parse,
)

CODE = "def double(n):\n    return n * 2"


@pytest.mark.parametrize(
    "answer",
    [
        f"```python\n{CODE}\n```",
        f"Sure! Here it is:\n\n```python\n{CODE}\n```\nIt doubles a number.",
        f"```\n{CODE}\n```",
        f"```Python\n{CODE}\n",
        f"~~~py\n{CODE}\n~~~",
        f"```python\r\n{CODE.replace(chr(10), chr(13) + chr(10))}\r\n```",
        CODE,
        f"Here is the function.\n\n{CODE}\n\nI hope that it helps you!",
        f"```python\n{CODE}\n\ndef cut(a, b):\n    return (a +",
        f"```bash\npip install x\n```\n```python\n{CODE}\n```",
    ],
)
def test_takes_the_code_out_of_an_answer(answer: str) -> None:
    assert extract_code(answer).strip() == CODE


def test_joins_blocks_that_belong_together() -> None:
    code = extract_code(f"```python\nimport math\n```\nand\n```python\n{CODE}\n```")
    assert "import math" in code
    assert "def double" in code


def test_takes_the_longest_of_blocks_that_define_the_same() -> None:
    longer = f"{CODE}\n\n\ndef half(n):\n    return n / 2"
    assert extract_code(f"```python\n{CODE}\n```\nBetter:\n```python\n{longer}\n```").strip() == longer


@pytest.mark.parametrize("answer", ["", "I cannot do that.", "```python\n```", "```json\n{}\n```"])
def test_gives_nothing_where_there_is_no_code(answer: str) -> None:
    assert extract_code(answer) == ""


@given(st.text(max_size=300))
def test_any_answer_gives_python_or_nothing(answer: str) -> None:
    code = extract_code(answer)
    assert not code or try_parse(code) is not None


def test_leaves_out_examples_and_tests() -> None:
    code = keep_definitions(
        "import re\nimport unittest\nLIMIT = 3  # at most\nunused = 1\n\n"
        "# doubles\ndef double(n):\n    # twice\n    return min(n * 2, LIMIT) if re else n\n\n"
        "# Example\nprint(double(2))\nassert double(1) == 2\n"
        "def test_double():\n    assert double(1) == 2\n"
        "class DoubleTest(unittest.TestCase):\n    pass\n"
        "if __name__ == '__main__':\n    unittest.main()\n"
    )
    assert code == (
        "import re\nLIMIT = 3  # at most\n\n# doubles\ndef double(n):\n    # twice\n"
        "    return min(n * 2, LIMIT) if re else n\n"
    )


def test_keeps_decorators_docstring_and_future() -> None:
    text = (
        '"""Doc."""\nfrom __future__ import annotations\nfrom functools import cache\n\n'
        "@cache\ndef f(n):\n    return n\n"
    )
    assert keep_definitions(text) == text


def test_finds_what_the_code_is_for() -> None:
    assert find_main_definition("def _help():\n    pass\ndef a():\n    pass\ndef b():\n    pass").name == "b"  # type: ignore[union-attr]
    assert isinstance(find_main_definition("class Box:\n    pass\ndef make():\n    return Box()"), ast.ClassDef)
    assert find_main_definition("x = 1") is None
    assert find_definition(CODE, "half") is None


def test_writes_signatures() -> None:
    function = find_definition("def f(a: int, *, b='x') -> list[int]:\n    pass", "f")
    assert function is not None
    assert format_signature(function) == "def f(a: int, *, b='x') -> list[int]"
    box = find_definition(
        "class Box:\n    def __init__(self, n): ...\n    def get(self): ...\n    def _x(self): ...", "Box"
    )
    assert box is not None
    assert format_signature(box) == "class Box: def __init__(self, n); def get(self)"
