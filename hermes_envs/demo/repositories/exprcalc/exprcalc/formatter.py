"""From nodes back to text, with no more parentheses than needed."""

from exprcalc.nodes import PRECEDENCE, RIGHT_ASSOCIATIVE, Binary, Call, Name, Node, Number, Unary

_ATOM = 100


def strength(node: Node) -> int:
    """How tightly the outermost operator of ``node`` binds."""
    if isinstance(node, Binary):
        return PRECEDENCE[node.operator]
    if isinstance(node, Unary):
        return PRECEDENCE["not" if node.operator == "not" else "sign"]
    return _ATOM


def _wrapped(node: Node, minimum: int) -> str:
    text = to_text(node)
    return f"({text})" if strength(node) < minimum else text


def to_text(node: Node) -> str:
    """Text that `parse` turns into the same node again."""
    if isinstance(node, Number):
        return str(node.value)
    if isinstance(node, Name):
        return node.name
    if isinstance(node, Call):
        return f"{node.function}({', '.join(to_text(argument) for argument in node.arguments)})"
    own = strength(node)
    if isinstance(node, Unary):
        space = " " if node.operator == "not" else ""
        return f"{node.operator}{space}{_wrapped(node.operand, own)}"
    if node.operator in RIGHT_ASSOCIATIVE:
        left, right = _wrapped(node.left, own + 1), _wrapped(node.right, own)
    else:
        left, right = _wrapped(node.left, own), _wrapped(node.right, own + 1)
    return f"{left} {node.operator} {right}"
