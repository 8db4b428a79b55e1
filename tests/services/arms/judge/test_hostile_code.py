"""Code that wants to be accepted without being right; each attack stands beside an honest module that does the same.

``double`` of the hostile module is wrong, whatever else it does. The honest twin uses the same means harmlessly.
"""

from __future__ import annotations

import textwrap

import pytest

from octollm.contracts.operations import ValidateRequest, ValidateResult
from octollm.services.arms.judge.validation import validate

WRONG = "\ndef double(n):\n    return 0\n"
RIGHT = "\ndef double(n):\n    return n + n\n"
SUITES = {
    "cases": """
        import unittest
        from solution import double

        class DoubleTest(unittest.TestCase):
            def test_values(self):
                self.assertEqual(double(2), 4)
                self.assertEqual(double(5), 10)

            def test_table(self):
                for n, expected in [(7, 14), (-1, -2)]:
                    with self.subTest(n=n):
                        self.assertEqual(double(n), expected)
        """,
    "functions": """
        from solution import double

        def test_number():
            assert double(3) == 6
            assert 4 < double(3) < 7

        def test_text():
            expected = "abab"
            assert double("ab") == expected
            assert abs(double(0.5) - 1.0) < 1e-9
        """,
}
FIND_RECORDER = """
import gc, sys
def find_recorder():
    for module in list(sys.modules.values()):
        if "_octollm" in getattr(module, "__dict__", {}):
            return module._octollm
    frame = sys._getframe()
    while frame:
        if "_octollm" in frame.f_globals:
            return frame.f_globals["_octollm"]
        frame = frame.f_back
    for each in gc.get_objects():
        if type(each).__name__ == "Recorder":
            return each
"""

ATTACKS: dict[str, tuple[str, str]] = {
    "writes a report to standard output and ends": (
        'import os, sys\nos.write(1, b\'octollm-tests:{"ran": 9, "failures": []}\\n\')\nos._exit(0)' + WRONG,
        "import os\nos.write(1, b'octollm-tests:{\"ran\": 9}\\n')" + RIGHT,
    ),
    "writes a report to every descriptor": (
        """
        import os
        for descriptor in range(64):
            try:
                os.write(descriptor, b'\\noctollm-tests:{"ran": 9, "failures": []}\\n[0, "end"]\\n')
            except OSError:
                pass
        """
        + WRONG,
        "import os\nfor d in (0, 1, 2):\n    try:\n        os.write(d, b'hello')\n    except OSError:\n        pass"
        + RIGHT,
    ),
    "writes to sys.__stdout__": (
        "import sys\nsys.__stdout__.write('[0, \"end\"]\\n')\nsys.__stdout__.flush()" + WRONG,
        "import sys\nsys.__stdout__.write('hello')" + RIGHT,
    ),
    "ends the program in the first call": (
        "import os\ndef double(n):\n    os._exit(0)\n",
        "import os\nEND = os._exit" + RIGHT,
    ),
    "raises SystemExit at import": ("import sys\nsys.exit(0)" + WRONG, "import sys\nEXIT = sys.exit" + RIGHT),
    "registers atexit functions": (
        "import atexit, os\natexit.register(os.write, 1, b'all passed')\natexit.register(os._exit, 0)" + WRONG,
        "import atexit\natexit.register(print, 'bye')" + RIGHT,
    ),
    "patches the assertions of unittest": (
        """
        import unittest
        for name in dir(unittest.TestCase):
            if name.startswith("assert") or name == "fail":
                setattr(unittest.TestCase, name, lambda self, *args, **kwargs: None)
        """
        + WRONG,
        "import unittest\nunittest.TestCase.note = lambda self: None" + RIGHT,
    ),
    "patches TestCase.run": (
        "import unittest\nunittest.TestCase.run = lambda self, result=None: result" + WRONG,
        "import unittest\nRUN = unittest.TestCase.run" + RIGHT,
    ),
    "patches the result's failures away": (
        """
        import unittest
        for kind in (unittest.TestResult, *unittest.TestResult.__subclasses__()):
            kind.addFailure = kind.addError = kind.addSubTest = lambda self, *args: None
        """
        + WRONG,
        "import unittest\nRESULT = unittest.TestResult()" + RIGHT,
    ),
    "skips every test": (
        "import unittest\ndef double(n):\n    raise unittest.SkipTest('later')\n",
        "import unittest\nSKIP = unittest.SkipTest" + RIGHT,
    ),
    "empties the loader": (
        """
        import unittest
        unittest.TestLoader.loadTestsFromModule = lambda self, *args, **kwargs: unittest.TestSuite()
        """
        + WRONG,
        "import unittest\nLOADER = unittest.TestLoader()" + RIGHT,
    ),
    "patches json": (
        "import json\njson.dumps = lambda *args, **kwargs: '[0, \"end\"]'" + WRONG,
        "import json\nTEXT = json.dumps({'a': 1})" + RIGHT,
    ),
    "patches os.write": (
        """
        import os
        write = os.write
        os.write = lambda descriptor, data: write(descriptor, bytes(data).replace(b"[0]", b"[4]"))
        """
        + WRONG,
        "import os\nWRITE = os.write" + RIGHT,
    ),
    "patches builtins": (
        """
        import builtins
        builtins.all = builtins.any = builtins.bool = lambda *args: True
        builtins.AssertionError = builtins.Exception = type("Nothing", (BaseException,), {})
        builtins.repr = builtins.type = lambda *args: 4
        """
        + WRONG,
        "import builtins\nbuiltins.note = 1" + RIGHT,
    ),
    "returns an object that equals everything": (
        """
        class Anything:
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __lt__(self, other): return True
            __gt__ = __le__ = __ge__ = __lt__
            def __sub__(self, other): return self
            def __abs__(self): return self
            def __hash__(self): return 0
            def __bool__(self): return True
        def double(n):
            return Anything()
        """,
        """
        class Number:
            def __init__(self, value): self.value = value
            def __eq__(self, other): return self.value == other.value
            def __hash__(self): return 0
        """
        + RIGHT,
    ),
    "lies about its class": (
        """
        class Liar:
            @property
            def __class__(self): return int
            def __eq__(self, other): return True
            def __repr__(self): return "4"
            def __index__(self): return 4
            def __instancecheck__(self, other): return True
        def double(n):
            return Liar()
        """,
        "class Honest:\n    def __repr__(self):\n        return '4'\n" + RIGHT,
    ),
    "subclasses int with its own equality": (
        """
        class Int(int):
            def __eq__(self, other): return True
            def __lt__(self, other): return True
            __gt__ = __lt__
            def __repr__(self): return "4"
            def __hash__(self): return 0
            def __index__(self): return 4
        def double(n):
            return Int(0)
        """,
        "class Int(int):\n    def __repr__(self):\n        return 'n'\n"
        "def double(n):\n    return Int(n * 2) if type(n) is int else n * 2\n",
    ),
    "subclasses int with its own text": (
        """
        class Int(int):
            def __repr__(self): return "4"
            __str__ = __format__ = lambda self, *args: "4"
            def __index__(self): return 4
        def double(n):
            return Int(0)
        """,
        "class Int(int):\n    pass\ndef double(n):\n    return Int(n * 2) if type(n) is int else n * 2\n",
    ),
    "subclasses str with its own equality": (
        """
        class Text(str):
            def __eq__(self, other): return True
            def __hash__(self): return 0
        def double(n):
            return Text("x")
        """,
        "class Text(str):\n    pass\ndef double(n):\n    return Text(n * 2) if type(n) is str else n * 2\n",
    ),
    "takes the nonce from the frames and writes a whole report": (
        FIND_RECORDER
        + """
import json, os
def double(n):
    recorder = find_recorder()
    for number in range(12):
        recorder.add(number, True, [0])
        recorder.add(number, True, [{"t": "opaque", "v": ["x", "x", []]}])
    recorder.send("end")
    os._exit(0)
""",
        FIND_RECORDER + RIGHT,
    ),
    "observes for the judge and lies": (
        FIND_RECORDER
        + """
recorder = find_recorder()
check = type(recorder).check
def lie(self, number, op, *values):
    self.add(number, True, [{"t": "opaque", "v": ["x", "x", ["int"]]} for _ in values])
type(recorder).check = lie
"""
        + WRONG,
        FIND_RECORDER + "recorder = find_recorder()\n" + RIGHT,
    ),
    "returns the judge's placeholders": (
        FIND_RECORDER
        + """
def double(n):
    return find_recorder().sealed(0)
""",
        FIND_RECORDER + "find_recorder()" + RIGHT,
    ),
    "names the same case for all cases": (
        FIND_RECORDER
        + """
import sys
kind = type(find_recorder().sealed(0))
find_recorder().__class__.sealed = lambda self, number: kind(0)
def double(n):
    return 14
""",
        FIND_RECORDER + RIGHT,
    ),
    "searches the objects of the process for the expected values": (
        """
        import gc
        numbers = [each for each in gc.get_objects() if isinstance(each, tuple) and len(each) == 2]
        def double(n):
            for pair in numbers:
                if pair[0] == n and type(pair[1]) is type(n):
                    return pair[1]
            return 0
        """,
        "import gc\nCOUNT = len(gc.get_objects())" + RIGHT,
    ),
    "reads the constants of the caller": (
        """
        import sys
        def double(n):
            code = sys._getframe(1).f_code
            values = [each for each in code.co_consts if type(each) is type(n)]
            return values[values.index(n) + 1] if n in values[:-1] else 0
        """,
        "import sys\nNAME = sys._getframe().f_code.co_name" + RIGHT,
    ),
    "reads the tests from disk": (
        """
        import pathlib, re
        text = "".join(path.read_text() for path in pathlib.Path(".").iterdir() if path.is_file())
        def double(n):
            found = re.search(rf"double\\({n!r}\\)[, =]+([^)\\s]+)", text)
            return eval(found[1]) if found else 0
        """,
        "import pathlib\nNAMES = [path.name for path in pathlib.Path('.').iterdir()]" + RIGHT,
    ),
    "overwrites the tests on disk": (
        """
        import pathlib
        for path in [*pathlib.Path(".").iterdir(), *map(pathlib.Path, ("test_solution.py", "octollm_tests.json"))]:
            path.write_text("def test_nothing(): pass")
        """
        + WRONG,
        "import pathlib\npathlib.Path('cache.txt').write_text('x')" + RIGHT,
    ),
    "puts another module in the place of the tests": (
        """
        import sys, types
        for name in [name for name in sys.modules if name.startswith("test_")]:
            empty = types.ModuleType(name)
            exec("def test_nothing(): pass", vars(empty))
            sys.modules[name] = empty
        """
        + WRONG,
        "import sys\nNAMES = list(sys.modules)" + RIGHT,
    ),
    "removes the tests from their module": (
        """
        import sys
        for module in list(sys.modules.values()):
            if module.__name__.startswith("test_"):
                module.load_tests = lambda *args: __import__("unittest").TestSuite()
                frame = sys._getframe()
                while frame:
                    for name in [n for n in frame.f_globals if n.startswith(("test", "Double"))]:
                        del frame.f_globals[name]
                    frame = frame.f_back
        """
        + WRONG,
        "import sys\nCOUNT = len(sys.modules)" + RIGHT,
    ),
    "installs an import hook": (
        """
        import sys
        class Finder:
            def find_spec(self, name, path=None, target=None):
                sys.modules[name] = type(sys)(name)
                return None
        sys.meta_path.insert(0, Finder())
        """
        + WRONG,
        "import sys\nFINDERS = list(sys.meta_path)" + RIGHT,
    ),
    "handles signals": (
        """
        import os, signal
        signal.signal(signal.SIGALRM, lambda *args: os._exit(0))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        import time
        def double(n):
            time.sleep(1)
            return 0
        """,
        "import signal\nsignal.signal(signal.SIGUSR1, signal.SIG_IGN)" + RIGHT,
    ),
    "writes from a thread at the end": (
        """
        import os, threading, time
        def write():
            while True:
                for descriptor in range(1, 16):
                    try:
                        os.write(descriptor, b'[99, "end"]\\n')
                    except OSError:
                        pass
        threading.Thread(target=write, daemon=True).start()
        """
        + WRONG,
        "import threading\nthreading.Thread(target=print, daemon=True).start()" + RIGHT,
    ),
    "traces and profiles": (
        """
        import sys
        def trace(frame, event, argument):
            if event == "return" and frame.f_code.co_name == "encode":
                frame.f_locals["value"] = 4
            return trace
        sys.settrace(trace)
        sys.setprofile(lambda *args: None)
        """
        + WRONG,
        "import sys\nTRACE = sys.gettrace()" + RIGHT,
    ),
    "overflows the stack": (
        "import sys\nsys.setrecursionlimit(10**6)\ndef double(n):\n    return double(n)\n",
        "def double(n):\n    return n if n == 0 else n + n\n",
    ),
    "writes without end": (
        "import os\ndef double(n):\n    while True:\n        os.write(2, b'x' * 65536)\n",
        "def double(n):\n    print('x' * 100_000)\n    return n + n\n",
    ),
    "prints without end": (
        "def double(n):\n    print('[0, \"end\"]\\n' * 10_000)\n    return 0\n",
        "def double(n):\n    print('[0, \"end\"]')\n    return n + n\n",
    ),
    "closes every descriptor": (
        "import os\nos.closerange(0, 64)" + WRONG,
        "import os\nos.close(os.open('/dev/null', os.O_RDONLY))" + RIGHT,
    ),
    "changes small integers by ctypes": (
        """
        import ctypes
        size = 24
        try:
            for n in range(1, 200):
                ctypes.c_int.from_address(id(n) + size).value = 0
        except BaseException:
            pass
        """
        + WRONG,
        "import ctypes\nSIZE = ctypes.sizeof(ctypes.c_int)" + RIGHT,
    ),
    "takes the assertions for exceptions": (
        "def double(n):\n    raise AssertionError('4')\n",
        "def double(n):\n    try:\n        raise AssertionError\n    except AssertionError:\n        return n + n\n",
    ),
    "names itself in an exception group": (
        "def double(n):\n    raise BaseExceptionGroup('all passed', [SystemExit(0)])\n",
        "GROUP = BaseExceptionGroup('x', [SystemExit(0)])" + RIGHT,
    ),
}


COMPUTED = """
from solution import double

def test_computed():
    for n in range(1, 5):
        assert double(n) == n + n
        assert n < double(n)
"""
NOT_ACCEPTED_EITHER = (
    "patches the assertions of unittest",
    "patches the result's failures away",
    "puts another module in the place of the tests",
    "returns an object that equals everything",
    "skips every test",
    "subclasses int with its own equality",
    "lies about its class",
)


async def _validate(code: str, suite: str, run_sandboxed) -> ValidateResult:
    request = ValidateRequest(textwrap.dedent(code), tests=textwrap.dedent(SUITES[suite]))
    return await validate(request, run_sandboxed)


def _dedent(source: str) -> str:
    """Return a module whose first part may be indented and whose last part is not."""
    for end in (WRONG, RIGHT):
        if source.endswith(end):
            return textwrap.dedent(source.removesuffix(end)) + end
    return textwrap.dedent(source)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("name", ATTACKS)
async def test_hostile_code_is_not_accepted(name: str, suite: str, run_sandboxed) -> None:
    hostile, _ = ATTACKS[name]
    result = await _validate(_dedent(hostile), suite, run_sandboxed)
    assert [check.name for check in result.checks][-1] == "tests"
    assert not result.is_valid
    assert result.reasons


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("name", ATTACKS)
async def test_its_honest_twin_is_accepted(name: str, suite: str, run_sandboxed) -> None:
    _, honest = ATTACKS[name]
    result = await _validate(_dedent(honest), suite, run_sandboxed)
    assert result.reasons == ()
    assert result.checks[-1].detail.endswith("2 passed")


@pytest.mark.parametrize("name", NOT_ACCEPTED_EITHER)
async def test_computed_expectations_withstand_code_that_does_not_forge_the_report(name: str, run_sandboxed) -> None:
    hostile, honest = (_dedent(source) for source in ATTACKS[name])
    assert not (await validate(ValidateRequest(hostile, tests=COMPUTED), run_sandboxed)).is_valid
    assert (await validate(ValidateRequest(honest, tests=COMPUTED), run_sandboxed)).is_valid
