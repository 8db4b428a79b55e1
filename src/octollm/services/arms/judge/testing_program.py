"""The program that runs tests inside the sandbox. It is sent as text and uses the standard library only.

Usage: ``python <this file> MODULE``. It prints one line: the marker, then JSON with ``ran`` and ``failures``.
"""

import importlib
import io
import json
import linecache
import os
import sys
import traceback
import types
import unittest

MARKER = "octollm-tests:"
MAX_FAILURES = 8
MAX_TEXT = 300


def main(name: str) -> None:
    """Run the tests of module ``name``: unittest cases, and functions whose name begins with ``test``."""
    real_stdout, sys.stdout = sys.stdout, io.StringIO()
    failures: list[dict[str, str]] = []
    ran = 0
    try:
        module = importlib.import_module(name)
        suite = collect(module)
        result = unittest.TestResult()
        suite.run(result)
        ran = result.testsRun - len(result.skipped)
        failed = [*result.failures, *result.errors]
        for test, text in failed[:MAX_FAILURES]:
            failures.append({"test": str(test).split(" ")[0], **explain(text, name)})
        if result.unexpectedSuccesses:
            failures.append({"test": name, "error": "a test passed that was expected to fail", "source": ""})
    except BaseException:
        failures.append({"test": "import", **explain(traceback.format_exc(), name)})
    real_stdout.write("\n" + MARKER + json.dumps({"ran": ran, "failures": failures}) + "\n")
    real_stdout.flush()
    # Not sys.exit: an atexit handler or thread of the code under test could print a forged result line.
    os._exit(0)


def collect(module: types.ModuleType) -> unittest.TestSuite:
    """Return the test cases of a module, including its plain test functions without parameters."""
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    for name, value in vars(module).items():
        if name.startswith("test") and isinstance(value, types.FunctionType) and not value.__code__.co_argcount:
            suite.addTest(unittest.FunctionTestCase(value, description=name))
    return suite


def explain(text: str, name: str) -> dict[str, str]:
    """Return the failed statement of the tests and the error, parsed from the text of a traceback."""
    lines = text.rstrip().split("\n")
    source = ""
    for line in lines:
        if line.startswith("  File ") and name + ".py" in line:
            number = line.split(", line ")[1].split(",")[0]
            source = linecache.getline(name + ".py", int(number)).strip()
    at = len(lines) - 1
    while at > 0 and not is_error(lines[at]):
        at -= 1
    return {"error": lines[at][:MAX_TEXT], "source": source[:MAX_TEXT]}


def is_error(line: str) -> bool:
    """Return whether a line of a traceback names the error: ``AssertionError: …``, ``package.Error``."""
    first = line.split(" ", maxsplit=1)[0].rstrip(":")
    return bool(first) and first.replace(".", "_").isidentifier() and (":" in line or first == line)


if __name__ == "__main__":
    main(sys.argv[1])
