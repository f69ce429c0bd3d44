"""Bugs put into source text: each kind, the rest left to the letter, the choice among them."""

from __future__ import annotations

import ast
import difflib
import time
from collections import Counter
from pathlib import Path

import pytest

import hermes_envs
from hermes_envs.task_building.mutation import Mutation, MutationPlan, find_mutations, is_test_path
from hermes_envs.task_building.mutation_kinds import KINDS
from hermes_envs.task_building.package_builder import is_usable

MODULE = '''"""A module — with “wide” characters in front of code."""


class Basket:
    """Fruit."""

    def weigh(self, fruit, scale=None, *, é=1):
        """Weigh.

        Carefully.
        """
        total = 0  # grams
        self.log(fruit, scale)
        for number in range(len(fruit)):
            if (fruit[number]) is not None and fruit[number] <= 3:
                total += fruit[number] * (é + 1)
            elif not scale:
                self.empty = True
            else:
                # nothing to do
                self.skipped[fruit] = "é — %s" % number
        if total > 10:
            return f"{total + 1}"
        label = "big" if total else "small"
        return label, total[1:]


def tiny(a, b):
    return a + b


def outer(items):
    def inner(item):
        count = len(item)
        if not (item or count):
            return item in items
        return inner(item[0])

    result = [inner(item) for item in items]
    result.sort()
    return result == sorted(items)
'''


def mutations(text: str = MODULE, path: str = "basket.py") -> list[Mutation]:
    return list(find_mutations(path, text))


def changed_lines(text: str, other: str) -> tuple[list[str], list[str]]:
    lines = list(difflib.ndiff(text.splitlines(), other.splitlines()))
    return [line[2:].strip() for line in lines if line[0] == "-"], [line[2:].strip() for line in lines if line[0] == "+"]


def outcomes(kind: str) -> list[tuple[list[str], list[str]]]:
    return [changed_lines(MODULE, mutation.applied_to(MODULE)) for mutation in mutations() if mutation.kind == kind]


@pytest.mark.parametrize(
    ("kind", "removed", "added"),
    [
        ("arithmetic_operator", ["total += fruit[number] * (é + 1)"], ["total += fruit[number] + (é + 1)"]),
        ("arithmetic_operator", ["total += fruit[number] * (é + 1)"], ["total -= fruit[number] * (é + 1)"]),
        ("comparison", ["if total > 10:"], ["if total >= 10:"]),
        ("comparison", ["return item in items"], ["return item not in items"]),
        (
            "comparison",
            ["if (fruit[number]) is not None and fruit[number] <= 3:"],
            ["if (fruit[number]) is None and fruit[number] <= 3:"],
        ),
        ("boolean_operator", ["if not (item or count):"], ["if not (item and count):"]),
        ("negated_condition", ["elif not scale:"], ["elif scale:"]),
        ("negated_condition", ["if not (item or count):"], ["if (item or count):"]),
        ("negated_condition", ["if total > 10:"], ["if not (total > 10):"]),
        ("negated_condition", ['label = "big" if total else "small"'], ['label = "big" if not total else "small"']),
        ("off_by_one", ["for number in range(len(fruit)):"], ["for number in range(len(fruit) - 1):"]),
        ("off_by_one", ["return label, total[1:]"], ["return label, total[2:]"]),
        ("off_by_one", ["return inner(item[0])"], ["return inner(item[1])"]),
        ("changed_constant", ["total = 0  # grams"], ["total = 1  # grams"]),
        ("changed_constant", ["self.empty = True"], ["self.empty = False"]),
        ("dropped_statement", ["self.log(fruit, scale)"], []),
        ("dropped_statement", ["self.empty = True"], ["pass"]),
        ("dropped_statement", ["result.sort()"], []),
        ("dropped_branch", ["if total > 10:", 'return f"{total + 1}"'], []),
        ("dropped_branch", ["elif not scale:", "self.empty = True"], []),
        ("dropped_branch", ["else:", "# nothing to do", 'self.skipped[fruit] = "é — %s" % number'], []),
        ("swapped_arguments", ["self.log(fruit, scale)"], ["self.log(scale, fruit)"]),
        ("swapped_branches", ['label = "big" if total else "small"'], ['label = "small" if total else "big"']),
        ("changed_return", ["return label, total[1:]"], ["return total[1:], label"]),
        ("changed_return", ["return result == sorted(items)"], ["return not (result == sorted(items))"]),
        ("changed_return", ["return inner(item[0])"], ["return None"]),
    ],
)
def test_kind(kind: str, removed: list[str], added: list[str]) -> None:
    assert (removed, added) in outcomes(kind)


def test_swapped_blocks_keep_their_comments() -> None:
    one, three = "        x = 1\n        y = 2  # two\n", "        # three\n        x = 3\n"
    frame = "def f(a):\n    if a:\n{}    else:  # not a\n{}    return x\n"
    text = frame.format(one, three)
    swapped = [mutation.applied_to(text) for mutation in mutations(text) if mutation.kind == "swapped_branches"]
    assert swapped == [frame.format(three, one)]


def test_every_kind_is_found_and_makes_other_python() -> None:
    found = mutations()
    assert {mutation.kind for mutation in found} == set(KINDS)
    assert all(mutation.makes_other_python(MODULE) for mutation in found)


def test_short_functions_documentation_and_formats_are_left_alone() -> None:
    for mutation in mutations():
        removed, _ = changed_lines(MODULE, mutation.applied_to(MODULE))
        assert "return a + b" not in removed
        assert "Weigh." not in removed
        if mutation.kind != "dropped_branch":
            assert 'return f"{total + 1}"' not in removed
        assert mutation.function.qualified_name in ("Basket.weigh", "outer", "outer.inner")


def test_what_is_known_of_the_function() -> None:
    function = next(mutation.function for mutation in mutations(path="src/shop/basket.py"))
    assert function.dotted_name == "shop.basket.Basket.weigh"
    assert function.signature == "weigh(self, fruit, scale=None, *, é=1)"
    assert function.documentation == "Weigh."


@pytest.mark.parametrize("text", ["def f(:\n", "x = 1\n", "", "\0"])
def test_nothing_to_change(text: str) -> None:
    assert mutations(text) == []


def test_real_modules_are_changed_in_few_places() -> None:
    """Every bug of some modules of this package parses, and all other lines are as they were."""
    folder = Path(hermes_envs.__file__).parent / "task_building"
    for name in ("problem_statement.py", "source_text.py"):
        text = (folder / name).read_text(encoding="utf-8")
        found = mutations(text, name)
        assert len(found) > 20
        for mutation in found:
            assert mutation.makes_other_python(text), mutation
            touched = sum(text.count("\n", edit.start, edit.end) + 1 for edit in mutation.edits)
            removed, added = changed_lines(text, mutation.applied_to(text))
            assert max(len(removed), len(added)) <= touched


def test_plan_is_the_same_for_the_same_seed() -> None:
    texts = {"a.py": MODULE, "b.py": MODULE}
    assert list(MutationPlan(texts, "1")) == list(MutationPlan(dict(reversed(texts.items())), "1"))
    assert list(MutationPlan(texts, "1")) != list(MutationPlan(texts, "2"))


def test_plan_spreads_over_functions_files_and_kinds() -> None:
    texts = {"a.py": MODULE, "b.py": MODULE}
    first = list(MutationPlan(texts, "0"))[:6]
    assert len({mutation.function for mutation in first}) == 6
    assert Counter(mutation.path for mutation in first) == {"a.py": 3, "b.py": 3}
    assert len({mutation.kind for mutation in first}) == 6


def test_plan_keeps_to_functions_that_were_called() -> None:
    line = next(node.lineno for node in ast.parse(MODULE).body if isinstance(node, ast.FunctionDef) and node.name == "outer")
    plan = MutationPlan({"a.py": MODULE, "b.py": MODULE}, "0", {("b.py", line)})
    assert {(mutation.path, mutation.function.qualified_name) for mutation in plan} == {("b.py", "outer")}


def test_planning_takes_time_in_proportion_to_the_files() -> None:
    """Four times as many take about four times as long; it would be sixteen times if each file looked at all calls."""
    function = "def f(a):\n    b = a + 1\n    b += 2\n    b *= 3\n    return b\n"

    def seconds(files: int) -> float:
        texts = {f"module{number}.py": function for number in range(files)}
        called = {(path, line) for path in texts for line in range(1, 51)}
        start = time.process_time()
        assert len(MutationPlan(texts, "0", called)) > files
        return time.process_time() - start

    assert min(seconds(800) for _ in range(3)) < 8 * min(seconds(200) for _ in range(3))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("tests/helper.py", True),
        ("pkg/tests/test_a.py", True),
        ("pkg/test_a.py", True),
        ("conftest.py", True),
        ("pkg/testing_tools.py", False),
        ("pkg/latest.py", False),
    ],
)
def test_files_of_tests(path: str, expected: bool) -> None:
    assert is_test_path(path) is expected


@pytest.mark.parametrize(
    ("node_id", "expected"),
    [
        ("tests/a.py::test[a b]", True),
        ("tests/a.py::test[é]", True),
        ("tests/a.py::test[a\nb]", False),
        ("tests/a.py::test[/workspace/repo/x]", False),
        ("tests/a.py::test[<object object at 0x7f0]", False),
        ("README.md::README.md", False),
        ("coins/change.py::coins.change.make_change", False),
    ],
)
def test_usable_names(node_id: str, expected: bool) -> None:
    assert is_usable(node_id) is expected
