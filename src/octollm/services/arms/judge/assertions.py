"""Assertions of tests, in their many spellings: operator, operands, and what of it is constant."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from octollm.services.arms.judge.static_analysis import NotConstantError, evaluate_constant, find_library_names

PLAIN_TYPES: dict[str, type] = {
    kind.__name__: kind for kind in (int, float, str, bytes, bool, complex, list, tuple, dict, set, frozenset)
}
_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
    ast.Is: "is", ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in",
}  # fmt: skip
_SIMPLE_PATTERN = re.compile(r"(?:[^*+?{}|()\[\]\\]|\\[^A-Za-z0-9])*")
"""Patterns without repetition, which are searched in linear time: the tests are a stranger's text."""
_METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(("assertEqual", "assertEquals", "assertListEqual", "assertTupleEqual", "assertSetEqual",
                     "assertDictEqual", "assertMultiLineEqual", "assertSequenceEqual"), ("==", ("first", "second"))),
    "assertNotEqual": ("!=", ("first", "second")),
    "assertTrue": ("truth", ("expr",)),
    "assertFalse": ("not truth", ("expr",)),
    "assertIs": ("is", ("expr1", "expr2")),
    "assertIsNot": ("is not", ("expr1", "expr2")),
    "assertIsNone": ("is", ("obj",)),
    "assertIsNotNone": ("is not", ("obj",)),
    "assertIn": ("in", ("member", "container")),
    "assertNotIn": ("not in", ("member", "container")),
    "assertIsInstance": ("instance", ("obj", "cls")),
    "assertNotIsInstance": ("not instance", ("obj", "cls")),
    "assertGreater": (">", ("a", "b")),
    "assertGreaterEqual": (">=", ("a", "b")),
    "assertLess": ("<", ("a", "b")),
    "assertLessEqual": ("<=", ("a", "b")),
    "assertCountEqual": ("same items", ("first", "second")),
    "assertAlmostEqual": ("almost", ("first", "second")),
    "assertNotAlmostEqual": ("not almost", ("first", "second")),
}  # fmt: skip
_OPTIONS = {"almost": ("places", "msg", "delta")}
CATCHES_ASSERTIONS = frozenset({"AssertionError", "Exception", "BaseException"})


@dataclass(frozen=True, slots=True)
class Assertion:
    """An assertion of the tests: ``operands`` are constants by their position, of ``arity`` in all.

    ``op`` is that of :func:`octollm.services.arms.judge.testing_program.evaluate`, or ``raises`` with the names of
    the exceptions and the pattern of the message as operands. ``source`` is the statement, ``message`` its own text.
    """

    op: str
    arity: int
    operands: dict[int, object]
    source: str
    is_negated: bool = False
    message: str = ""
    is_direct: bool = True
    """Whether what is observed is a value of the code, and not the outcome of a comparison in the tests."""
    sealed: dict[int, frozenset[int]] = field(default_factory=dict[int, frozenset[int]])
    """The operands that stand for expected values, with the numbers of these."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One thing that an assertion says: operator and operands."""

    op: str
    operands: list[ast.expr]
    is_negated: bool = False
    is_direct: bool = True
    keeps_constants: bool = False
    """Whether constants enter the sandbox after all, because a container of the tests' own is asked about them."""


class AssertionReader:
    """Reads the assertions of one module of tests."""

    def __init__(self, tree: ast.Module) -> None:
        self._library = find_library_names(tree)
        self._own_methods = {
            node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        self._instances = {
            ast.unparse(target)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and _is_construction(node.value)
            for target in node.targets
        }

    def understand(self, node: ast.stmt) -> tuple[list[Condition], ast.expr | None] | None:
        """Return what a statement asserts, and its message; ``None`` for any other statement."""
        if isinstance(node, ast.Assert):
            return self._conditions(node.test, is_negated=False), node.msg
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
            return None
        call = node.value
        if not isinstance(call.func, ast.Attribute) or not isinstance(call.func.value, ast.Name):
            return None
        if call.func.attr not in _METHODS or call.func.attr in self._own_methods:
            return None
        op, names = _METHODS[call.func.attr]
        op, is_negated = (op.removeprefix("not "), True) if op.startswith("not ") and op != "not in" else (op, False)
        arguments = _bind(call, (*names, *_OPTIONS.get(op, ("msg",))))
        if arguments is None or not all(name in arguments for name in names):
            return None
        operands = [arguments[name] for name in names]
        message = arguments.get("msg")
        if call.func.attr in ("assertIsNone", "assertIsNotNone"):
            operands.append(ast.Constant(None))
        if op == "truth":
            return self._conditions(operands[0], is_negated=is_negated), message
        if op == "almost":
            options = [arguments.get(name, ast.Constant(None)) for name in ("places", "delta")]
            if not all(self._is_constant(option) for option in options):
                return None
            operands += options
        return [self._condition(op, operands, is_negated)], message

    def _conditions(self, test: ast.expr, *, is_negated: bool) -> list[Condition]:
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return self._conditions(test.operand, is_negated=not is_negated)
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or if is_negated else ast.And):
            return [each for part in test.values for each in self._conditions(part, is_negated=is_negated)]
        if isinstance(test, ast.Compare):
            return [self._comparison(test, is_negated)]
        if isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and not test.keywords:
            if test.func.id == "isinstance" and len(test.args) == 2:
                return [self._condition("instance", list(test.args), is_negated)]
            if test.func.id in ("all", "any", "isinstance", "issubclass", "bool", "callable", "hasattr"):
                return [Condition("truth", [test], is_negated, is_direct=False)]
        is_direct = isinstance(test, ast.Call | ast.Name | ast.Attribute | ast.Subscript | ast.Constant)
        return [Condition("truth", [test], is_negated, is_direct=is_direct)]

    def _comparison(self, test: ast.Compare, is_negated: bool) -> Condition:
        operands = [test.left, *test.comparators]
        ops = [_COMPARISONS[type(op)] for op in test.ops]
        if len(ops) == 1:
            left, right = operands
            if ops[0] in ("<", "<=") and _is_distance(left):
                assert isinstance(left, ast.Call)
                between = left.args[0]
                assert isinstance(between, ast.BinOp)
                op = "within" if ops[0] == "<" else "within or at"
                return Condition(op, [between.left, between.right, right], is_negated)
            if ops[0] in ("==", "!=") and _is_approx(right):
                assert isinstance(right, ast.Call)
                options = _bind(right, ("expected", "rel", "abs")) or {}
                approx = [options.get(name, ast.Constant(None)) for name in ("expected", "rel", "abs")]
                return Condition("approx", [left, *approx], is_negated != (ops[0] == "!="))
        return self._condition(",".join(ops), operands, is_negated)

    def _condition(self, op: str, operands: list[ast.expr], is_negated: bool) -> Condition:
        if op == "instance":
            # With a class of the code it is the sandbox that has to compare.
            keeps = self.plain_types(operands[1]) is None
        else:
            # `"key" in cache`: only the class can answer, and it has to be asked in the sandbox.
            keeps = op in ("in", "not in") and (
                ast.unparse(operands[1]) in self._instances or _is_construction(operands[1])
            )
        return Condition(op, operands, is_negated, keeps_constants=keeps)

    @staticmethod
    def plain_types(node: ast.expr) -> tuple[type, ...] | None:
        """Return the types that an expression names, if all of them are plain."""
        parts = node.elts if isinstance(node, ast.Tuple) else [node]
        kinds = tuple(PLAIN_TYPES[part.id] for part in parts if isinstance(part, ast.Name) and part.id in PLAIN_TYPES)
        return kinds if len(kinds) == len(parts) else None

    def _is_constant(self, node: ast.expr) -> bool:
        try:
            evaluate_constant(node, self._library)
        except NotConstantError:
            return False
        return True

    def evaluate_operand(self, op: str, at: int, operand: ast.expr) -> object:
        """Return the value of a constant operand; types are constants where they are plain. Raises the same."""
        if op == "instance" and at == 1:
            kinds = self.plain_types(operand)
            if kinds is None:
                raise NotConstantError
            return kinds
        return evaluate_constant(operand, self._library)

    def evaluate_pattern(self, node: ast.expr) -> str | None:
        """Return a constant pattern that is safe to search for here; ``None`` for any other."""
        try:
            pattern = self.evaluate(node)
        except NotConstantError:
            return None
        return pattern if isinstance(pattern, str) and _SIMPLE_PATTERN.fullmatch(pattern) else None

    def evaluate(self, node: ast.expr) -> object:
        """Return the value of a constant expression. Raises ``NotConstantError``."""
        return evaluate_constant(node, self._library)


def _bind(call: ast.Call, names: Sequence[str]) -> dict[str, ast.expr] | None:
    """Return the arguments of a call by the names of its parameters; ``None`` where they cannot be told."""
    if len(call.args) > len(names) or any(isinstance(each, ast.Starred) for each in call.args):
        return None
    bound = dict(zip(names, call.args, strict=False))
    for keyword in call.keywords:
        if keyword.arg not in (*names, "msg"):
            return None
        bound[keyword.arg] = keyword.value
    return bound


def _is_construction(node: ast.expr) -> bool:
    """Return whether an expression makes an object of a class, by the custom of names."""
    if not isinstance(node, ast.Call):
        return False
    return ast.unparse(node.func).split(".")[-1][:1].isupper()


def _is_distance(node: ast.expr) -> bool:
    """Return whether an expression is ``abs(a - b)``."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "abs"
        and len(node.args) == 1
        and isinstance(node.args[0], ast.BinOp)
        and isinstance(node.args[0].op, ast.Sub)
    )


def _is_approx(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("pytest.approx", "approx")


def catches_assertions(handlers: Iterable[ast.ExceptHandler]) -> bool:
    """Return whether one of the handlers catches a failed assertion."""
    for handler in handlers:
        if handler.type is None:
            return True
        parts = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        if {ast.unparse(part) for part in parts} & CATCHES_ASSERTIONS:
            return True
    return False


def is_builtin_exception(name: str) -> bool:
    """Return whether ``name`` is an exception of the language."""
    kind = getattr(builtins, name, None)
    return isinstance(kind, type) and issubclass(kind, BaseException)


def raises_parameters(call: ast.Call) -> int | None:
    """Return how many parameters a call has that expects an exception; ``None`` for any other call."""
    name = ast.unparse(call.func)
    if name == "pytest.raises" or name.endswith(".assertRaises"):
        return 1
    return 2 if name.endswith(".assertRaisesRegex") else None


def raises_arguments(call: ast.Call) -> tuple[ast.expr | None, ast.expr | None]:
    """Return the class of the expected exception, and the pattern of its message."""
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    kind = call.args[0] if call.args else named.get("expected_exception")
    pattern = named.get("match", named.get("expected_regex"))
    return kind, call.args[1] if len(call.args) > 1 else pattern
