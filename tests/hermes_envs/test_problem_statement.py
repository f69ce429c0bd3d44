"""What a report says about a bug: what a user would have seen, and not how it is tested."""

from __future__ import annotations

from hermes_envs.task_building.mutation import FunctionInfo
from hermes_envs.task_building.problem_statement import write_problem_statement
from hermes_envs.task_building.suite_runner import Failure

PAYING = '''    @mark
    def test_pay(self, amount):
        """Pays."""
        purse = Purse()
        with raises(X):
            purse.pay(amount)
'''


def test_problem_statement() -> None:
    function = FunctionInfo("src/purse/change.py", "Purse.pay", 3, "pay(self, amount)", "Take coins out.")
    failures = {
        "tests/test_purse.py::TestPurse::test_pay[a b]": Failure(
            code=PAYING,
            parameters={"amount": "-1", "unused": "0"},
            message="Failed: DID NOT RAISE X in TestPurse\n at /workspace/repo/tests/x",
        ),
        "tests/test_purse.py::TestPurse::test_other": Failure(code="", parameters={}, message="ValueError: no"),
    }
    assert write_problem_statement([function], failures) == (
        "# Wrong results in connection with `Purse.pay`\n\n"
        "`purse.change.Purse.pay` (`pay(self, amount)`) does not do what its documentation says:\n\n"
        "> Take coins out.\n\n"
        "```\nValueError: no\n```\n\n"
        "```python\namount = -1\npurse = Purse()\nwith raises(X):\n    purse.pay(amount)\n```\n\n"
        "This ends with:\n\n"
        "```\nFailed: DID NOT RAISE X in example\n at tests/x\n```\n"
    )
