"""Finds where bugs can be put into a project, and chooses among the places."""

from __future__ import annotations

import ast
import hashlib
import random
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from hermes_envs.task_building.mutation_kinds import KINDS
from hermes_envs.task_building.source_text import Edit, SourceText, apply_edits

_MIN_FUNCTION_LINES = 4
_TEST_FOLDERS = frozenset({"test", "tests", "testing"})
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class FunctionInfo:
    """A function that gets a bug: its path in the module, header and the documentation's first paragraph."""

    path: str
    qualified_name: str
    first_line: int
    signature: str
    documentation: str

    @property
    def dotted_name(self) -> str:
        """The name under which Python knows it, as far as the path tells."""
        parts = list(PurePosixPath(self.path).with_suffix("").parts)
        if parts[0] == "src":
            parts = parts[1:]
        if parts[-1] == "__init__":
            parts = parts[:-1]
        return ".".join([*parts, self.qualified_name])


@dataclass(frozen=True)
class Mutation:
    """One bug in one function of one file."""

    kind: str
    function: FunctionInfo
    edits: tuple[Edit, ...]

    @property
    def path(self) -> str:
        return self.function.path

    @property
    def digest(self) -> str:
        """Eight characters that tell it from any other mutation of the project."""
        return hashlib.sha256(repr((self.kind, self.path, self.edits)).encode()).hexdigest()[:8]

    def applied_to(self, text: str) -> str:
        """The file with the bug, from the file without it."""
        return apply_edits(text, self.edits)

    def makes_other_python(self, text: str) -> bool:
        """Whether the file with the bug parses, to something else than the file without it."""
        try:
            return ast.dump(ast.parse(self.applied_to(text))) != ast.dump(ast.parse(text))
        except (SyntaxError, ValueError):
            return False


def is_test_path(path: str) -> bool:
    """Whether a file belongs to the tests or to what runs them."""
    parts = PurePosixPath(path).parts
    name = parts[-1]
    in_folder = any(part.lower() in _TEST_FOLDERS for part in parts[:-1])
    return in_folder or name.startswith("test_") or name.endswith("_test.py") or name in ("conftest.py", "tests.py", "setup.py")


def find_mutations(path: str, text: str, called_lines: Collection[int] | None = None) -> Iterator[Mutation]:
    """The bugs that may be put into a module's functions; with `called_lines` only into functions that start on such a line.

    None changes a character that it need not. A few may not parse, see `Mutation.makes_other_python`: to try each would take
    minutes for a large module. Files that Python cannot read have none.
    """
    try:
        source = SourceText(text)
    except (SyntaxError, ValueError):
        return
    for function, qualified_name in _functions(source.tree, ""):
        info = _describe(source, path, function, qualified_name)
        if called_lines is not None and info.first_line not in called_lines and function.lineno not in called_lines:
            continue
        for node in _own_nodes(function):
            for kind, make in KINDS.items():
                for edits in make(source, node):
                    yield Mutation(kind, info, edits)


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[_Function, str]]:
    """Functions that are worth a bug, those inside of others included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = _body(child)
            if body and (body[-1].end_lineno or 0) - body[0].lineno + 1 >= _MIN_FUNCTION_LINES:
                yield child, f"{prefix}{child.name}"
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from _functions(child, prefix)


def _body(function: _Function) -> list[ast.stmt]:
    """The statements below the documentation."""
    return function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body


def _own_nodes(function: _Function) -> Iterator[ast.AST]:
    """The function itself and the nodes of its body, without nested functions, f-strings, annotations and what is raised."""
    yield ast.copy_location(ast.Module(_body(function), []), function)
    pending: deque[ast.AST] = deque(_body(function))
    while pending:
        node = pending.popleft()
        # Positions inside of f-strings are wrong before Python 3.12.
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.JoinedStr, ast.Raise, ast.Assert)):
            continue
        yield node
        for name, value in ast.iter_fields(node):
            if name != "annotation":
                pending.extend(child for child in (value if isinstance(value, list) else [value]) if isinstance(child, ast.AST))


def _describe(source: SourceText, path: str, function: _Function, qualified_name: str) -> FunctionInfo:
    documentation = ast.get_docstring(function) or ""
    first_line = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    return FunctionInfo(
        path=path,
        qualified_name=qualified_name,
        first_line=first_line,
        signature=f"{function.name}({ast.unparse(function.args)})",
        documentation=documentation.split("\n\n", 1)[0].strip(),
    )


class MutationPlan:
    """An order in which to try bugs: spread over functions, kinds and files, the same for the same seed."""

    def __init__(self, texts: Mapping[str, str], seed: str, called: Collection[tuple[str, int]] | None = None) -> None:
        """`texts` are the modules by path; `called` holds path and first line of the functions that tests reach."""
        called_lines: defaultdict[str, set[int]] = defaultdict(set)
        for path, line in called or ():
            called_lines[path].add(line)
        self._texts = texts
        self._pending: list[Mutation] = []
        for path in sorted(texts):
            self._pending += find_mutations(path, texts[path], None if called is None else called_lines[path])
        random.Random(seed).shuffle(self._pending)

    def __len__(self) -> int:
        return len(self._pending)

    def __iter__(self) -> Iterator[Mutation]:
        functions: Counter[FunctionInfo] = Counter()
        kinds: Counter[str] = Counter()
        files: Counter[str] = Counter()

        def novelty(mutation: Mutation) -> tuple[int, int, int]:
            return functions[mutation.function], kinds[mutation.kind], files[mutation.path]

        pending = list(self._pending)
        while pending:
            chosen = min(pending, key=novelty)
            pending.remove(chosen)
            if chosen.makes_other_python(self._texts[chosen.path]):
                functions[chosen.function] += 1
                kinds[chosen.kind] += 1
                files[chosen.path] += 1
                yield chosen
