"""Python source written by a model: extract it from an answer, reduce it to definitions, add missing imports."""

from __future__ import annotations

import ast
import builtins
import re
import sys
import warnings

_FENCE = re.compile(
    r"^[ \t]*(?:```|~~~)[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*(?:```|~~~)[ \t]*$|\Z)", re.DOTALL | re.MULTILINE
)
_PYTHON = frozenset({"", "python", "python3", "py"})
_MAX_LINES = 400


def extract_code(answer: str) -> str:
    """Return the code of a model's answer: its Python blocks, or the lines that are code; empty when there is none.

    A fence may be unclosed, a block may end within a statement, and prose may surround code without a fence.
    """
    blocks = [body for language, body in _FENCE.findall(answer.replace("\r\n", "\n")) if language.lower() in _PYTHON]
    blocks = [block for block in (_longest_valid_prefix(block) for block in blocks) if block]
    if not blocks:
        return _extract_unfenced(answer)
    joined = "\n\n".join(block.strip("\n") for block in blocks)
    return joined if try_parse(joined) is not None and not _has_redefinition(blocks) else max(blocks, key=len)


def try_parse(code: str) -> ast.Module | None:
    """Return the tree of ``code``, or ``None`` when it is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def keep_definitions(code: str) -> str:
    """Return ``code`` without the statements that a module does not need: calls, prints, asserts and tests.

    Imports, definitions, and assignments that a definition reads are kept verbatim, with their comments.
    """
    tree = try_parse(code)
    if tree is None:
        return code
    read_names = {
        node.id
        for part in tree.body
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and _is_kept(part, set())
        for node in ast.walk(part)
        if isinstance(node, ast.Name)
    }
    lines = code.split("\n")
    kept_lines: list[str] = []
    at = 0
    for part in tree.body:
        start, end = _first_line(part) - 1, part.end_lineno or part.lineno
        if _is_kept(part, read_names):
            kept_lines.extend(lines[at:end])
        else:
            kept_lines.extend(_without_comments(lines[at:start]))
        at = end
    return "\n".join(kept_lines).strip("\n") + "\n"


def find_main_definition(code: str) -> ast.FunctionDef | ast.ClassDef | None:
    """Return the main definition of ``code``: its first public class, else its last public function.

    Helper functions usually come before the function that uses them.
    """
    tree = try_parse(code)
    if tree is None:
        return None
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    classes = [node for node in public if isinstance(node, ast.ClassDef)]
    return (classes[0] if classes else public[-1]) if public else None


def find_definition(code: str, name: str) -> ast.FunctionDef | ast.ClassDef | None:
    """Return the module-level definition of ``name``, or ``None``."""
    tree = try_parse(code)
    definitions = (
        n for n in (tree.body if tree else []) if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name
    )
    return next(definitions, None)


def format_signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    """Return the signature of a function as one line; of a class, with those of its public methods."""
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"def {node.name}({ast.unparse(node.args)}){returns}"
    methods = [
        format_signature(part)
        for part in node.body
        if isinstance(part, ast.FunctionDef) and (part.name == "__init__" or not part.name.startswith("_"))
    ]
    return f"class {node.name}: " + "; ".join(methods)


def _longest_valid_prefix(block: str) -> str:
    """Return the longest prefix of whole lines that parses: an answer that hit its token limit ends anywhere."""
    lines = block.rstrip().split("\n")[:_MAX_LINES]
    while lines:
        text = "\n".join(lines)
        if try_parse(text) is not None:
            return text if text.strip() else ""
        lines.pop()
    return ""


def _extract_unfenced(answer: str) -> str:
    """Return the longest run of lines that is code and defines something."""
    lines = re.sub(r"^[ \t]*(?:```|~~~).*$", "", answer, flags=re.MULTILINE).split("\n")[:_MAX_LINES]
    starts = [i for i, line in enumerate(lines) if re.match(r"(def|class|async def|import|from|@)\b|@", line)]
    for start in starts:
        text = _longest_valid_prefix("\n".join(lines[start:]))
        tree = try_parse(text)
        if tree and any(isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) for n in tree.body):
            return text
    return ""


def _has_redefinition(blocks: list[str]) -> bool:
    previous: set[str] = set()
    for block in blocks:
        tree = try_parse(block)
        names = {n.name for n in (tree.body if tree else []) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        if names & previous:
            return True
        previous |= names
    return False


def _first_line(node: ast.stmt) -> int:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.decorator_list:
        return min(decorator.lineno for decorator in node.decorator_list)
    return node.lineno


def _is_kept(node: ast.stmt, read_names: set[str]) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = {alias.asname or alias.name.split(".")[0] for alias in node.names}
        module = node.module if isinstance(node, ast.ImportFrom) else ""
        return module == "__future__" or "*" in names or bool(names & read_names)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return not node.name.startswith("test_")
    if isinstance(node, ast.ClassDef):
        return not any("TestCase" in ast.unparse(base) for base in node.bases)
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        target_names = {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        return bool(target_names & read_names)
    return isinstance(node, ast.Try) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _without_comments(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.strip().startswith("#")]


_MODULE_OF_NAME: dict[str, str] = {
    name: module
    for module, names in {
        "typing": "Any Callable Dict Generic Iterable Iterator List Optional Sequence Set Tuple TypeVar Union",
        "collections": "Counter OrderedDict defaultdict deque namedtuple",
        "itertools": "accumulate chain combinations groupby islice permutations product zip_longest",
        "functools": "cache lru_cache partial reduce wraps",
        "dataclasses": "dataclass field",
        "datetime": "date timedelta timezone",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "enum": "Enum",
        "abc": "ABC abstractmethod",
        "pathlib": "Path",
    }.items()
    for name in names.split()
}


def add_imports(code: str) -> str:
    """Return ``code`` with an import for each undefined name that the standard library is known for."""
    tree = try_parse(code)
    if tree is None:
        return code
    missing = _read_names(tree) - _bound_names(tree) - set(dir(builtins))
    dotted = {n.value.id for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}
    added: list[str] = []
    for name in missing:
        if name in _MODULE_OF_NAME:
            added.append(f"from {_MODULE_OF_NAME[name]} import {name}")
        elif name in sys.stdlib_module_names and name in dotted:
            added.append(f"import {name}")
    if not added:
        return code
    lines = code.split("\n")
    at = _header_end(tree)
    return "\n".join([*lines[:at], *sorted(added), *([] if _has_import_after(tree, at) else [""]), *lines[at:]])


def _read_names(tree: ast.Module) -> set[str]:
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def _bound_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            names.add(node.name)
    return names


def _header_end(tree: ast.Module) -> int:
    """Return the number of lines of the docstring and ``__future__`` imports."""
    at = 0
    for node in tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node is tree.body[0]
        future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if not docstring and not future:
            break
        at = node.end_lineno or node.lineno
    return at


def _has_import_after(tree: ast.Module, line: int) -> bool:
    after = [node for node in tree.body if node.lineno > line]
    return bool(after) and isinstance(after[0], ast.Import | ast.ImportFrom)
