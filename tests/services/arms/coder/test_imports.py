from __future__ import annotations

from octollm.services.arms.coder.python_source import add_imports


def test_adds_what_the_library_is_known_for() -> None:
    code = add_imports("def f(s: str) -> List[str]:\n    return re.split(',', s) + list(chain(s))\n")
    assert code.startswith("from itertools import chain\nfrom typing import List\nimport re\n\ndef f")


def test_goes_after_docstring_and_future() -> None:
    code = add_imports('"""Doc."""\nfrom __future__ import annotations\nimport json\n\ndef f():\n    return math.pi\n')
    assert code.startswith('"""Doc."""\nfrom __future__ import annotations\nimport math\nimport json\n')


def test_leaves_alone_what_is_defined_or_unknown() -> None:
    for code in (
        "def f(re):\n    return re.x\n",
        "import re\ndef f():\n    return re.x\n",
        "def f():\n    return nothing_known\n",
        "def f(:\n",
        "def f(n):\n    match n:\n        case [date, *time]:\n            return date, time\n",
    ):
        assert add_imports(code) == code
