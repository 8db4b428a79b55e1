"""Turns tests into a program of observations: the expected values stay with the judge.

``assert f(2) == 4`` becomes ``_octollm.check(7, None, f(2))``. Neither the 4 nor the ``==`` enters the sandbox, so code
that forges its report would have to compute the right answers for that. Expected values that are no constants are
computed in the sandbox; such an assertion is weaker evidence.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from octollm.services.arms.judge.assertions import (
    CATCHES_ASSERTIONS,
    Assertion,
    AssertionReader,
    Condition,
    catches_assertions,
    is_builtin_exception,
    raises_arguments,
    raises_parameters,
)
from octollm.services.arms.judge.static_analysis import (
    NameUses,
    NotConstantError,
    drop_docstrings,
    find_table,
    find_test_bodies,
    is_skip,
    name_uses,
    own_statements,
    table_length,
)
from octollm.services.arms.judge.testing_program import RECORDER

S = TypeVar("S", bound=ast.stmt)
_NOT_EXCEPTIONS = frozenset({"BaseException", "SystemExit", "KeyboardInterrupt", "GeneratorExit"})


@dataclass(slots=True)
class InstrumentedTests:
    """The program of observations, and what the judge keeps.

    ``required`` is how often each assertion must be observed when the tests run to their end, ``required_sealed`` which
    expected values must have been asked for; ``statements`` are the statements of the tests by the program's lines.
    """

    program: str = ""
    assertions: dict[int, Assertion] = field(default_factory=dict[int, Assertion])
    sealed: dict[int, object] = field(default_factory=dict[int, object])
    required: dict[int, int] = field(default_factory=dict[int, int])
    required_sealed: set[int] = field(default_factory=set[int])
    statements: dict[int, str] = field(default_factory=dict[int, str])


def instrument(tests: str, control: Sequence[str] = ()) -> InstrumentedTests:
    """Return ``tests`` (valid Python) as a program of observations.

    ``control`` are the name and the error of a test that must fail. Its assertion has the highest number.
    """
    tree = ast.parse(tests)
    made = InstrumentedTests()
    _Instrumenter(tree, tests, made).run()
    if control:
        name, error = control
        number = len(made.assertions)
        check = f"{RECORDER}.check({number}, '==', object(), object())"
        tree.body.append(ast.parse(f"def {name}():\n    {check}\n    raise AssertionError({error!r})").body[0])
        made.assertions[number] = Assertion("==", 2, {}, name)
    ast.fix_missing_locations(tree)
    made.program = ast.unparse(tree)
    originals, lines = _statements(tree), tests.split("\n")
    for node, copy in zip(originals, _statements(ast.parse(made.program)), strict=False):
        source = getattr(node, "octollm_source", "") or _first_line(lines, node)
        for line in range(copy.lineno, (copy.end_lineno or copy.lineno) + 1):
            made.statements[line] = source
    return made


def _statements(tree: ast.Module) -> list[ast.stmt]:
    # Compound statements come before their parts, so that the innermost statement of a line counts.
    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]


def _first_line(lines: Sequence[str], node: ast.stmt) -> str:
    return lines[node.lineno - 1].strip() if 0 < node.lineno <= len(lines) else ""


class _Instrumenter:
    """Rewrites one module of tests in place."""

    def __init__(self, tree: ast.Module, text: str, made: InstrumentedTests) -> None:
        self._tree = tree
        self._lines = text.split("\n")
        self._made = made
        self._reader = AssertionReader(tree)
        self._lengths: dict[int, int] = {}
        """How often a loop over a constant table runs, by the identity of its node."""
        self._module_uses: NameUses = ({}, {})
        self._sealed_uses: dict[int, frozenset[int]] = {}
        """The expected values that a name may stand for, by the identity of its node."""

    def run(self) -> None:
        drop_docstrings(self._tree)
        self._expand_pytest()
        self._module_uses = name_uses(self._tree)
        self._seal(self._tree, [node for node in self._tree.body if not isinstance(node, ast.FunctionDef)])
        for node in ast.walk(self._tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self._seal(node, node.body)
        self._tree.body = self._rewrite_body(self._tree.body, is_plain=False)
        for body, times in find_test_bodies(self._tree):
            self._count(body, times)

    # Expected values in variables and tables

    def _seal(self, scope: ast.AST, body: list[ast.stmt]) -> None:
        """Replace constants that are used as expected values alone by placeholders, wherever they are stored."""
        stored, loaded = name_uses(scope)
        expected = {id(node) for node in self._expected_names(scope)}
        nested_in_module = isinstance(scope, ast.Module)
        for node in own_statements(body):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                uses = loaded.get(name, [])
                if stored.get(name) == 1 and uses and all(id(use) in expected for use in uses):
                    before = len(self._made.sealed)
                    node.value = self._seal_value(node.value)
                    self._bind_sealed(before, uses)
            elif isinstance(node, ast.For) and not nested_in_module:
                self._seal_table(node, scope, stored, loaded, expected)

    def _seal_table(
        self,
        node: ast.For,
        scope: ast.AST,
        stored: dict[str, int],
        loaded: dict[str, list[ast.Name]],
        expected: set[int],
    ) -> None:
        table, target = find_table(node, scope, (stored, loaded), self._tree, self._module_uses)
        if table is None:
            return
        self._lengths[id(node)] = table_length(table)
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        for column, each in enumerate(names):
            if not isinstance(each, ast.Name) or stored.get(each.id) != 1:
                continue
            uses = loaded.get(each.id, [])
            if uses and all(id(use) in expected for use in uses):
                self._seal_column(table, column if isinstance(target, ast.Tuple) else None, uses)

    def _seal_column(self, table: ast.expr, column: int | None, uses: Sequence[ast.Name]) -> None:
        """Seal a column of a table, or each of its rows; ``uses`` are the names that its values are bound to."""
        before = len(self._made.sealed)
        if isinstance(table, ast.Dict):
            if column == 1:
                table.values = [self._seal_value(value) for value in table.values]
        elif isinstance(table, ast.List | ast.Tuple) and column is None:
            table.elts = [self._seal_value(value) for value in table.elts]
        elif isinstance(table, ast.List | ast.Tuple):
            for row in table.elts:
                if isinstance(row, ast.Tuple | ast.List) and column is not None and column < len(row.elts):
                    row.elts[column] = self._seal_value(row.elts[column])
        self._bind_sealed(before, uses)

    def _bind_sealed(self, before: int, uses: Sequence[ast.Name]) -> None:
        """Remember that ``uses`` stand for the values that were sealed since there were ``before``."""
        for use in uses:
            self._sealed_uses[id(use)] = frozenset(range(before, len(self._made.sealed)))

    def _seal_value(self, node: ast.expr) -> ast.expr:
        try:
            value = self._reader.evaluate(node)
        except NotConstantError:
            return node
        number = len(self._made.sealed)
        self._made.sealed[number] = value
        return ast.copy_location(_call("sealed", ast.Constant(number)), node)

    def _expected_names(self, scope: ast.AST) -> Iterator[ast.Name]:
        """Yield the names that stand where an expected value stands, and those in messages and titles of subtests."""
        for node in ast.walk(scope):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "subTest":
                yield from _names_in([*node.args, *(keyword.value for keyword in node.keywords)])
            if not isinstance(node, ast.stmt):
                continue
            understood = self._reader.understand(node)
            if understood is None:
                continue
            conditions, message = understood
            for condition in conditions:
                if not condition.keeps_constants:
                    yield from (each for each in condition.operands if isinstance(each, ast.Name))
            yield from _names_in([message] if message else [])

    # Rewriting

    def _rewrite_body(self, body: list[ast.stmt], *, is_plain: bool) -> list[ast.stmt]:
        return [part for node in body for part in self._rewrite(node, is_plain=is_plain)]

    def _rewrite(self, node: ast.stmt, *, is_plain: bool) -> list[ast.stmt]:
        """Return the statements that take the place of ``node``. ``is_plain`` leaves assertions as they are."""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            is_plain = is_plain or any("expectedFailure" in ast.unparse(each) for each in node.decorator_list)
        understood = None if is_plain else self._reader.understand(node)
        if understood is not None:
            conditions, message = understood
            return [self._observe(node, condition, message) for condition in conditions]
        raising = None if is_plain else self._call_of_raises(node)
        if raising is not None:
            node = raising
        if isinstance(node, ast.With) and not is_plain:
            is_plain = self._rewrite_items(node) or "suppress" in ast.unparse(node.items[0].context_expr)
        for name in ("body", "orelse", "finalbody"):
            part: list[ast.stmt] | None = getattr(node, name, None)
            if isinstance(part, list):
                caught = name == "body" and isinstance(node, ast.Try) and catches_assertions(node.handlers)
                setattr(node, name, self._rewrite_body(part, is_plain=is_plain or caught))
        for handler in getattr(node, "handlers", ()):
            handler.body = self._rewrite_body(handler.body, is_plain=is_plain)
        for case in getattr(node, "cases", ()):
            case.body = self._rewrite_body(case.body, is_plain=is_plain)
        return [node]

    def _observe(self, node: ast.stmt, condition: Condition, message: ast.expr | None) -> ast.stmt:
        constants: dict[int, object] = {}
        observed: list[ast.expr] = []
        sealed = {
            at: self._sealed_uses[id(each)]
            for at, each in enumerate(condition.operands)
            if self._sealed_uses.get(id(each))
        }
        for at, operand in enumerate(condition.operands):
            try:
                if condition.keeps_constants:
                    raise NotConstantError
                constants[at] = self._reader.evaluate_operand(condition.op, at, operand)
            except NotConstantError:
                observed.append(operand)
        source = self._source(node)
        text = message.value if isinstance(message, ast.Constant) and isinstance(message.value, str) else ""
        number = len(self._made.assertions)
        self._made.assertions[number] = Assertion(
            condition.op,
            len(condition.operands),
            constants,
            source,
            is_negated=condition.is_negated,
            message=text,
            is_direct=condition.is_direct,
            sealed=sealed,
        )
        op = None if constants else condition.op
        check = _call("check", ast.Constant(number), ast.Constant(op), *observed)
        return _located(ast.Expr(check), node, source)

    def _source(self, node: ast.stmt) -> str:
        """Return a statement as it was written, in one line."""
        first, last = node.lineno - 1, node.end_lineno or node.lineno
        lines = [line.encode() for line in self._lines[first:last]] or [b""]
        lines[-1] = lines[-1][: node.end_col_offset]
        lines[0] = lines[0][node.col_offset :]
        return " ".join(b" ".join(lines).decode("utf-8", "replace").split())

    # Exceptions

    def _call_of_raises(self, node: ast.stmt) -> ast.With | None:
        """Return ``assertRaises(E, f, x)`` in the form of a ``with`` statement."""
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
            return None
        call = node.value
        known = raises_parameters(call)
        if known is None or len(call.args) <= known or isinstance(call.args[known], ast.Starred):
            return None
        context = ast.Call(call.func, call.args[:known], [])
        body = ast.Expr(ast.Call(call.args[known], call.args[known + 1 :], call.keywords))
        made = ast.With([ast.withitem(ast.copy_location(context, call))], [ast.copy_location(body, node)])
        return _located(made, node, self._source(node))

    def _rewrite_items(self, node: ast.With) -> bool:
        """Rewrite the contexts that expect an exception; return whether one of them catches failed assertions."""
        catches = False
        for item in node.items:
            call = item.context_expr
            if not isinstance(call, ast.Call) or raises_parameters(call) is None:
                continue
            kind, pattern = raises_arguments(call)
            if kind is None:
                continue
            parts = kind.elts if isinstance(kind, ast.Tuple) else [kind]
            names = [part.id for part in parts if isinstance(part, ast.Name) and is_builtin_exception(part.id)]
            is_known = len(names) == len(parts)
            catches = catches or bool({ast.unparse(part) for part in parts} & CATCHES_ASSERTIONS)
            constants: dict[int, object] = {0: tuple(names)} if is_known else {}
            arguments = [ast.Constant(None) if is_known else kind, ast.Constant(bool(set(names) & _NOT_EXCEPTIONS))]
            if pattern is not None:
                text = self._reader.evaluate_pattern(pattern)
                if text is None:
                    arguments.append(pattern)
                else:
                    constants[1] = text
            number = len(self._made.assertions)
            source = getattr(node, "octollm_source", "") or _first_line(self._lines, node)
            self._made.assertions[number] = Assertion("raises", 2, constants, source.removesuffix(":"))
            item.context_expr = ast.copy_location(_call("raises", ast.Constant(number), *arguments), call)
        return catches

    def _expand_pytest(self) -> None:
        """Replace what is understood of pytest, which is not there in the sandbox."""
        for node in ast.walk(self._tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for at, each in enumerate(node.decorator_list):
                if isinstance(each, ast.Call) and ast.unparse(each.func) == "pytest.mark.parametrize":
                    node.decorator_list[at] = ast.copy_location(_call("cases", *each.args[:2]), each)
                    if len(each.args) > 1:
                        self._seal_cases(node, each.args[0], each.args[1])
        needed = any(
            isinstance(node, ast.Name) and node.id == "pytest"
            for statement in self._tree.body
            for node in _unknown_uses(statement)
        )
        if not needed:
            self._tree.body = [
                node
                for node in self._tree.body
                if not (isinstance(node, ast.Import) and [alias.name for alias in node.names] == ["pytest"])
            ]

    def _seal_cases(self, function: ast.FunctionDef | ast.AsyncFunctionDef, names: ast.expr, table: ast.expr) -> None:
        if not isinstance(names, ast.Constant) or not isinstance(names.value, str):
            return
        _, loaded = name_uses(function)
        expected = {id(node) for node in self._expected_names(function)}
        columns = [name.strip() for name in names.value.split(",")]
        for column, name in enumerate(columns):
            uses = loaded.get(name, [])
            if uses and all(id(use) in expected for use in uses):
                self._seal_column(table, column if len(columns) > 1 else None, uses)

    # What must be observed

    def _count(self, body: Sequence[ast.stmt], times: int) -> None:
        """Count the observations that ``body`` makes when it runs ``times`` times to its end."""
        for node in body:
            if any(isinstance(each, ast.Return | ast.Raise) or is_skip(each) for each in ast.walk(node)):
                return
            if isinstance(node, ast.Expr) and (number := _number_of(node.value, "check")) is not None:
                self._require(number, times)
            elif isinstance(node, ast.With):
                numbers = [_number_of(item.context_expr, "raises") for item in node.items]
                for number in numbers:
                    if number is not None:
                        self._require(number, times)
                if numbers == [None] * len(numbers):
                    self._count(node.body, times)
            elif isinstance(node, ast.For) and not any(
                isinstance(each, ast.Break | ast.Continue) for each in ast.walk(node)
            ):
                self._count(node.body, times * self._lengths.get(id(node), 0))

    def _require(self, number: int, times: int) -> None:
        self._made.required[number] = self._made.required.get(number, 0) + times
        if times > 0:
            self._made.required_sealed.update(*self._made.assertions[number].sealed.values())


def _names_in(nodes: Iterable[ast.expr]) -> Iterator[ast.Name]:
    for node in nodes:
        yield from (each for each in ast.walk(node) if isinstance(each, ast.Name))


def _call(method: str, *arguments: ast.expr) -> ast.Call:
    """Return the call of a method of the recorder."""
    function = ast.Attribute(ast.Name(RECORDER, ast.Load()), method, ast.Load())
    return ast.Call(function, list(arguments), [])


def _located(made: S, node: ast.stmt, source: str) -> S:
    """Give a statement the place of the one that it stands for."""
    made = ast.copy_location(made, node)
    made.octollm_source = source  # pyright: ignore[reportAttributeAccessIssue]
    return made


def _number_of(node: ast.expr, method: str) -> int | None:
    """Return the assertion that a call of the recorder observes."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == f"{RECORDER}.{method}":
        number = node.args[0]
        return number.value if isinstance(number, ast.Constant) and isinstance(number.value, int) else None
    return None


def _unknown_uses(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a statement, but for those that are rewritten when they name pytest."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("pytest.raises", "pytest.approx"):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _unknown_uses(child)
