"""The ways in which a bug is put into code, each a small change of the syntax tree.

The kinds follow the procedural modification of SWE-smith (https://arxiv.org/abs/2504.21798). Each function yields the edits
that it can make at one node; whether the outcome is Python and differs is checked by `mutation.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from itertools import pairwise

from hermes_envs.task_building.source_text import Edit, SourceText

Edits = tuple[Edit, ...]
Kind = Callable[[SourceText, ast.AST], Iterator[Edits]]

_ARITHMETIC = {"+": "-", "-": "+", "*": "+", "/": "*", "//": "/", "%": "//", "**": "*", "&": "|", "|": "&"}
_ARITHMETIC |= {"<<": ">>", ">>": "<<"}
_ASSIGNMENT = {f"{old}=": f"{new}=" for old, new in _ARITHMETIC.items()}
_COMPARISON = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "in": "not in", "not in": "in"}
_COMPARISON |= {"is": "is not", "is not": "is"}
_ATOMS = (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.Constant)


def arithmetic_operator(source: SourceText, node: ast.AST) -> Iterator[Edits]:
    """`a + b` -> `a - b`"""
    if isinstance(node, ast.BinOp):
        # A percent sign after a text formats it.
        if isinstance(node.left, (ast.Constant, ast.JoinedStr)) and not _is_number(node.left):
            return
        yield from _replaced_operator(source, node.left, node.right, _ARITHMETIC)
    elif isinstance(node, ast.AugAssign):
        yield from _replaced_operator(source, node.target, node.value, _ASSIGNMENT)


def comparison(source: SourceText, node: ast.AST) -> Iterator[Edits]:
    """`a < b` -> `a <= b`"""
    if isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        for left, right in pairwise(operands):
            yield from _replaced_operator(source, left, right, _COMPARISON)


def boolean_operator(source: SourceText, node: ast.AST) -> Iterator[Edits]:
    """`a and b` -> `a or b`"""
    # With more operands the new operators would group otherwise than the old.
    if isinstance(node, ast.BoolOp) and len(node.values) == 2:
        yield from _replaced_operator(source, node.values[0], node.values[1], {"and": "or", "or": "and"})


def negated_condition(source: SourceText, node: ast.AST) -> Iterator[Edits]:
    """`if a:` -> `if not a:`"""
    if isinstance(node, (ast.If, ast.IfExp)):
        yield (_negation(source, node.test),)


def off_by_one(source: SourceText, node: ast.AST) -> Iterator[Edits]:
    """`a[:n]` -> `a[:n - 1]`, `range(n)` -> `range(n - 1)`, `a[0]` -> `a[1]`"""
    if isinstance(node, ast.Slice):
        for bound in (node.lower, node.upper):
            if bound is not None:
                yield from _shifted(source, bound)
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and _is_whole(node.slice):
        yield from _shifted(source, node.slice)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range" and node.args:
        yield from _shifted(source, node.args[min(1, len(node.args) - 1)])


def changed_constant(source: SourceText, node: ast.AST) -> Iterator[Edits]:
    """`1` -> `2`, `True` -> `False`"""
    if isinstance(node, ast.Constant):
        start, end = source.start(node), source.end(node)
        if isinstance(node.value, bool):
            yield (Edit(start, end, str(not node.value)),)
        elif isinstance(node.value, int) and source.of(node).isdecimal():
            yield (Edit(start, end, str(node.value + 1)),)
            if node.value > 0:
                yield (Edit(start, end, str(node.value - 1)),)


def dropped_statement(source: SourceText, node: ast.AST) -> Iterator[Edits]:
    """`self.count = 1`, `items.sort()`, `total += n` and the like vanish."""
    for block in _blocks(node):
        for statement in block:
            if _has_lasting_effect(statement):
                yield from _without(source, block, statement)


def dropped_branch(source: SourceText, node: ast.AST) -> Iterator[Edits]:
    """An `if` without `else`, an `elif` or an `else` vanishes."""
    for block in _blocks(node):
        for statement in block:
            if isinstance(statement, ast.If) and not statement.orelse and not _is_elif(source, statement):
                yield from _without(source, block, statement)
    if not isinstance(node, ast.If) or not node.orelse:
        return
    first, last = node.orelse[0], node.orelse[-1]
    if _is_elif(source, first) and isinstance(first, ast.If):
        start, end = source.line_start(first.lineno), source.line_start((first.body[-1].end_lineno or 0) + 1)
        if source.owns_its_lines(first.body[0], first.body[-1]):
            yield (Edit(start, end, ""),)
    elif source.owns_its_lines(first, last):
        start = source.line_start(_else_line(source, node))
        yield (Edit(start, source.line_start((last.end_lineno or 0) + 1), ""),)


def swapped_arguments(source: SourceText, node: ast.AST) -> Iterator[Edits]:
    """`f(a, b)` -> `f(b, a)`"""
    if not isinstance(node, ast.Call) or any(isinstance(argument, ast.Starred) for argument in node.args):
        return
    # These fail on any exchanged arguments, however they are used.
    if isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass", "hasattr", "getattr", "setattr"):
        return
    for left, right in pairwise(node.args):
        yield from _swap(source, left, right)


def swapped_branches(source: SourceText, node: ast.AST) -> Iterator[Edits]:
    """The bodies of `if` and `else` change places, also in `a if c else b`."""
    if isinstance(node, ast.IfExp):
        if isinstance(node.body, _ATOMS) and isinstance(node.orelse, _ATOMS):
            yield from _swap(source, node.body, node.orelse)
    elif isinstance(node, ast.If) and node.orelse and not _is_elif(source, node.orelse[0]):
        bodies = [(node.body[0], node.body[-1]), (node.orelse[0], node.orelse[-1])]
        if all(source.owns_its_lines(first, last) for first, last in bodies):
            spans = [_span(source, first, last) for first, last in bodies]
            texts = [source.text[start:end] for start, end in spans]
            if all(text.endswith("\n") for text in texts):
                yield Edit(*spans[0], texts[1]), Edit(*spans[1], texts[0])


def changed_return(source: SourceText, node: ast.AST) -> Iterator[Edits]:
    """`return a, b` -> `return b, a`; `return a < b` -> `return not (a < b)`; `return f(a)` -> `return None`"""
    if not isinstance(node, ast.Return) or node.value is None:
        return
    value = node.value
    if isinstance(value, ast.Tuple) and len(value.elts) >= 2:
        yield from _swap(source, value.elts[0], value.elts[1])
    elif isinstance(value, (ast.Compare, ast.BoolOp)) or (isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.Not)):
        yield (_negation(source, value),)
    elif isinstance(value, (ast.Call, ast.List, ast.Dict, ast.ListComp, ast.DictComp)):
        yield (Edit(source.start(value), source.end(value), "None"),)


KINDS: dict[str, Kind] = {
    kind.__name__: kind
    for kind in (
        arithmetic_operator,
        comparison,
        boolean_operator,
        negated_condition,
        off_by_one,
        changed_constant,
        dropped_statement,
        dropped_branch,
        swapped_arguments,
        swapped_branches,
        changed_return,
    )
}


def _replaced_operator(source: SourceText, left: ast.AST, right: ast.AST, changes: dict[str, str]) -> Iterator[Edits]:
    """Replace what stands between two operands, which may have parentheses around them."""
    tokens = [token for token in source.tokens_between(source.end(left), source.start(right)) if token.text not in ("(", ")")]
    operator = " ".join(token.text for token in tokens)
    if operator in changes:
        yield (Edit(tokens[0].start, tokens[-1].end, changes[operator]),)


def _negation(source: SourceText, condition: ast.expr) -> Edit:
    start, end, text = source.start(condition), source.end(condition), source.of(condition)
    if isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not):
        return Edit(start, end - len(text.removeprefix("not").lstrip(" ")), "")
    return Edit(start, end, f"not {text}" if isinstance(condition, _ATOMS) else f"not ({text})")


def _shifted(source: SourceText, bound: ast.expr) -> Iterator[Edits]:
    start, end, text = source.start(bound), source.end(bound), source.of(bound)
    if isinstance(bound, ast.Constant):
        if _is_whole(bound):
            yield (Edit(start, end, str(int(text) + 1)),)
    elif isinstance(bound, (*_ATOMS, ast.BinOp)):
        yield (Edit(start, end, f"{text} - 1"),)
        yield (Edit(start, end, f"{text} + 1"),)


def _swap(source: SourceText, left: ast.AST, right: ast.AST) -> Iterator[Edits]:
    if source.of(left) != source.of(right):
        yield (
            Edit(source.start(left), source.end(left), source.of(right)),
            Edit(source.start(right), source.end(right), source.of(left)),
        )


def _without(source: SourceText, block: list[ast.stmt], statement: ast.stmt) -> Iterator[Edits]:
    if not source.owns_its_lines(statement, statement):
        return
    if len(block) == 1:
        yield (Edit(source.start(statement), source.end(statement), "pass"),)
    else:
        yield (Edit(source.line_start(statement.lineno), source.line_start((statement.end_lineno or 0) + 1), ""),)


def _span(source: SourceText, first: ast.stmt, last: ast.stmt) -> tuple[int, int]:
    """The lines from one statement to another, and those of comments above them."""
    line = first.lineno
    while source.line(line - 1).lstrip().startswith("#"):
        line -= 1
    return source.line_start(line), source.line_start((last.end_lineno or 0) + 1)


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        if isinstance(block, list):
            yield block


def _has_lasting_effect(statement: ast.stmt) -> bool:
    """Whether code goes on without the statement, but not in the same way; a lost local variable would only crash."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, (ast.Call, ast.Await))
    if isinstance(statement, ast.Assign):
        return all(isinstance(target, (ast.Attribute, ast.Subscript)) for target in statement.targets)
    return isinstance(statement, ast.AugAssign)


def _is_elif(source: SourceText, statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and source.text.startswith("elif", source.start(statement))


def _else_line(source: SourceText, node: ast.If) -> int:
    """The line of the `else` that belongs to an `if`: the last one before the statements below it."""
    line = node.orelse[0].lineno - 1
    while not source.line(line).lstrip().startswith("else"):
        line -= 1
    return line


def _is_whole(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int) and not isinstance(node.value, bool)


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float, complex))
