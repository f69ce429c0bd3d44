"""Grade-school maths: the bundled problems through real slots, models that answer well and badly, and answers that cheat."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from atroposlib.envs.base import APIServerConfig

from backends.errors import SandboxError
from hermes_envs.errors import ConfigError, DatasetError
from hermes_envs.gsm8k_agent import Gsm8kAgentConfig, Gsm8kAgentEnv
from hermes_envs.maths.answer_checker import NO_BOX, TOO_HARD, AnswerChecker
from hermes_envs.maths.boxed_answer import last_boxed
from hermes_envs.maths.problem import BUNDLED, Problem, split_problems
from hermes_envs.tools.tool import Tool
from hermes_envs.tools.toolsets import Toolsets
from tests.engine.chat import ChatServer, completion


def environment(chat: ChatServer | None = None, kind: type[Gsm8kAgentEnv] = Gsm8kAgentEnv, **options: Any) -> Gsm8kAgentEnv:
    defaults = {"policy": "messages" if chat else "oracle", "use_wandb": False, "local_slots": 2, "shuffle": False}
    config = Gsm8kAgentConfig.model_validate({**defaults, **options})
    return kind(config, [APIServerConfig(base_url=chat.base_url if chat else "", model_name="tiny", health_check=False)])


def write_problems(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- the bundled problems ----------------------------------------------------------------------------------------------


async def test_every_bundled_problem_is_solved_by_its_solution_in_a_slot_and_not_by_nothing() -> None:
    env = environment(eval_split_ratio=0, local_slots=8)
    env.process_mode = True
    problems = []
    async with env.running():
        while (item := await env.get_next_item()) is not None:
            problems.append(item)
        solved = await asyncio.gather(*map(env.run_agent, problems))
    assert len(problems) == len({problem.question for problem in problems}) == 64
    for problem, trajectory in zip(problems, solved, strict=True):
        assert trajectory.score is not None
        assert trajectory.score.value == 1.0, problem
        [printed] = [message["content"] for message in trajectory.messages if message["role"] == "tool"]
        # The tool worked it out; the final response has the answer whatever it says.
        assert Fraction(printed) == Fraction(problem.answer), problem
    idle = environment(policy="nop")
    async with idle.running():
        scores = [(await idle.run_agent(problem)).score for problem in problems[:5]]
    assert [score and (score.value, score.reason) for score in scores] == [(0.0, NO_BOX)] * 5


def test_no_question_contains_its_answer() -> None:
    rows = [json.loads(line) for line in BUNDLED.read_text().splitlines()]
    words = [row["question"].replace(".", " ").replace("?", " ").split() for row in rows]
    assert [row["question"] for row, spoken in zip(rows, words, strict=True) if row["answer"] in spoken] == []


# --- with a model ------------------------------------------------------------------------------------------------------


def runs(code: str, say: str = "") -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "python", "arguments": json.dumps({"code": code})}}
    return completion("tool_calls", content=say, tool_calls=[call])


def result(request: dict[str, Any]) -> str:
    return str(next(message["content"] for message in reversed(request["messages"]) if message["role"] == "tool"))


def boxes_the_result(request: dict[str, Any]) -> dict[str, Any]:
    return completion(content=f"So it is \\boxed{{{result(request)}}}.")


def problem_file(folder: Path) -> str:
    question = "A box holds 1,000 pens in 8 rows of 125. How many pens are in 7 boxes, if 3 pens are missing?"
    return write_problems(folder / "one.jsonl", {"question": question, "answer": "7 * 1000 = 7000, less 3. #### 6,997"})


LOOK_AROUND = "import os\nfor place in os.walk('.'): print(place)\nprint(os.environ)\nprint('it\\'s', \"all\")"


async def test_a_model_works_out_the_answer_with_the_tool_and_finds_it_nowhere_else(tmp_path: Path) -> None:
    async with ChatServer(runs(LOOK_AROUND), runs("pens = 7 * 1000 - 3\nprint(pens)"), boxes_the_result) as chat:
        env = environment(chat, dataset_name=problem_file(tmp_path), eval_split_ratio=0)
        async with env.running():
            trajectory = await env.run_agent(await env.get_next_item())
    assert trajectory.score is not None
    assert (trajectory.score.value, trajectory.score.reason) == (1.0, "the answer is right")
    assert trajectory.tool_counts.executed_ok == 2
    first, second, last = chat.requests
    assert [tool["function"]["name"] for tool in first["tools"]] == ["python"]
    assert "PATH" in result(second)
    assert result(second).endswith("it's all")
    assert "6997" not in json.dumps(second)
    assert "6,997" not in json.dumps(last)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([completion(content="It is 6997.")], NO_BOX),
        ([completion(content="\\boxed{6998}")], "the answer is another number"),
        ([completion(content="\\boxed{6997} or rather \\boxed{6998}")], "the answer is another number"),
        ([completion(content="\\boxed{6997, 6998}")], "the answer is not one number"),
        # Neither what came before the final response nor what a tool printed is an answer.
        ([runs("print(r'\\boxed{6997}')", say="\\boxed{6997}"), completion(content="Done.")], NO_BOX),
        ([runs("print(1)", say="\\boxed{6997}")], "there is no final response"),
    ],
)
async def test_what_is_no_answer_scores_nothing(tmp_path: Path, answers: list[Any], reason: str) -> None:
    async with ChatServer(*answers) as chat:
        env = environment(chat, dataset_name=problem_file(tmp_path), eval_split_ratio=0, agent_max_steps=2)
        async with env.running():
            trajectory = await env.run_agent(await env.get_next_item())
    assert trajectory.score is not None
    assert (trajectory.score.value, trajectory.score.reason) == (0.0, reason)


async def test_a_script_that_fails_is_shown_to_the_model(tmp_path: Path) -> None:
    answers = [runs("print(1 / 0)"), runs("while True: pass"), runs("#" * 200_000), completion(content="\\boxed{6997}")]
    async with ChatServer(*answers) as chat:
        env = environment(chat, dataset_name=problem_file(tmp_path), eval_split_ratio=0, tool_timeout_s=2)
        async with env.running():
            trajectory = await env.run_agent(await env.get_next_item())
    failed, endless, long = [message["content"] for message in trajectory.messages if message["role"] == "tool"]
    assert "ZeroDivisionError" in failed
    assert "timed out" in endless or "timeout" in endless.lower()
    assert long
    assert trajectory.tool_counts.exec_error >= 2
    assert trajectory.score is not None
    assert trajectory.score.value == 1.0


async def test_a_sandbox_without_python_is_refused() -> None:
    broken = Tool("python", "", {"type": "object"}, lambda workspace, arguments: ("bash", {"command": "python9 -c 1"}))

    class WithoutPython(Gsm8kAgentEnv):
        toolsets = Toolsets(tools={"python": broken}, members={"python": ("python",)})

    with pytest.raises(ConfigError, match=r"enabled_toolsets: the tool python does not work in the sandbox: .*not found"):
        async with environment(kind=WithoutPython).running():
            pass


# --- answers -----------------------------------------------------------------------------------------------------------

RIGHT = (
    "72", "72.0", "72.", "+72", " 72 ", "\\$72", "$72$", "72\\%", "72\\text{ apples}", "\\text{72}", "\\frac{144}{2}",
    "12 \\times 6", "12*6", "\\sqrt{5184}", "x = 72", "\\left(72\\right)", "\\boxed{72}", "72\\,\\text{km}", "0072",
)  # fmt: skip
OTHER_RIGHT = (("1,234", "1234"), ("-26", "-26"), ("\\frac{7}{8}", "0.875"), ("19.25", "19.25"), ("50\\%", "50"))
WRONG = (
    "", "73", "-72", "71.9999999", "72.0001", "7.2e1", "seventy-two", "x", "72x", "72 dollars or 73", "\\infty",
    "\\text{right}", "__import__('os')",
    # More than one candidate.
    ",".join(map(str, range(60, 85))), "71, 72", "71 or 72", "72 or 73", "71 \\text{ and } 72", "71;72", "\\{71, 72\\}",
    "(71, 72)", "\\pm 72", "72 \\pm 1", "[0, 100]", "(0, 100)", "\\mathbb{R}", "x > 0", "71 < 72", "71 = 72", "70 = 71 = 72",
    "71$ $72", "71 \\\\ 72", "\\begin{pmatrix}71 & 72\\end{pmatrix}", "x \\in \\{72\\}", "72 \\cup 73", "\\max(72, 73)",
)  # fmt: skip


async def test_equal_numbers_are_right_and_lists_of_guesses_are_wrong() -> None:
    async with AnswerChecker() as answers:
        faults = {answer: await answers.find_fault(f"So \\boxed{{{answer}}}.", "72") for answer in (*RIGHT, *WRONG)}
        others = [await answers.find_fault(f"\\boxed{{{answer}}}", gold) for answer, gold in OTHER_RIGHT]
    assert {answer: fault for answer, fault in faults.items() if (fault is None) != (answer in RIGHT)} == {}
    assert others == [None] * len(OTHER_RIGHT)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}} {", "\\frac{1}{2}"),
        ("\\boxed{1 \\} 2}", "1 \\} 2"),
        ("\\boxed{1} then \\boxed{2", None),
        ("\\boxed{" + "1" * 101 + "}", None),
        ("boxed{1} \\fbox{2} \\boxed 3", None),
        ("", None),
    ],
)
def test_the_last_box_counts(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


HOSTILE = ("9^{9^{9}}", "99999999999999!", "\\prod_{i=1}^{99999999} i", "(" * 48 + "72" + ")" * 48)


async def test_no_answer_stops_the_event_loop_or_the_answers_after_it() -> None:
    longest_gap, checked = 0.0, False

    async def watch() -> None:
        nonlocal longest_gap
        before = time.monotonic()
        while not checked:
            await asyncio.sleep(0.01)
            longest_gap, before = max(longest_gap, time.monotonic() - before), time.monotonic()

    watching = asyncio.create_task(watch())
    async with AnswerChecker() as answers:
        faults = [await answers.find_fault(f"\\boxed{{{answer}}}", "73") for answer in HOSTILE]
        assert await answers.find_fault("\\boxed{73}", "73") is None
    checked = True
    await watching
    assert faults.count(TOO_HARD) >= 2
    assert None not in faults
    # A comparison takes two seconds of CPU before it is given up.
    assert longest_gap < 2.0


async def test_a_comparison_that_is_cancelled_answers_no_later_question() -> None:
    async with AnswerChecker() as answers:
        assert await answers.find_fault("\\boxed{1}", "1") is None
        asking = asyncio.create_task(answers.find_fault("\\boxed{9^{9^{9}}}", "1"))
        await asyncio.sleep(0.2)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert await answers.find_fault("\\boxed{2}", "2") is None
        assert await answers.find_fault("\\boxed{3}", "2") == "the answer is another number"


async def test_a_comparing_process_that_dies_is_infrastructure_and_is_started_again() -> None:
    async with AnswerChecker() as answers:
        assert await answers.find_fault("\\boxed{1}", "1") is None
        process = answers._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(SandboxError, match="the process that compares answers ended with status -9"):
            await answers.find_fault("\\boxed{1}", "1")
        assert await answers.find_fault("\\boxed{1}", "1") is None
        process = answers._process
    assert process is not None
    assert process.returncode is not None


# --- problems ----------------------------------------------------------------------------------------------------------


def problems(number: int) -> list[Problem]:
    return [Problem(f"p-{index}", f"What is {index} + 1?", str(index + 1)) for index in range(number)]


def test_the_split_is_disjoint_and_the_same_whatever_the_order_of_rows() -> None:
    rows = problems(50)
    training, held_out = split_problems(rows, 0.2, seed=1)
    assert len(held_out) == 10
    assert {*training, *held_out} == set(rows)
    assert not {*training} & {*held_out}
    _, reordered = split_problems(rows[::-1], 0.2, seed=1)
    assert set(reordered) == set(held_out)
    _, other = split_problems(rows, 0.2, seed=2)
    assert set(other) != set(held_out)


def test_a_question_that_occurs_twice_is_on_one_side() -> None:
    rows = problems(20)
    training, held_out = split_problems(
        [*rows, *(Problem(f"again-{row.name}", row.question, row.answer) for row in rows)], 0.5, 0
    )
    assert len(training) == len(held_out) == 10
    assert not {row.question for row in training} & {row.question for row in held_out}


async def test_training_and_evaluation_never_meet_and_a_run_can_go_on() -> None:
    env = environment(shuffle=True, max_items=10)
    async with env.running():
        assert env.number_of_items() == 10
        first = [await env.get_next_item() for _ in range(10)]
        position = env.data_position()
        second = [await env.get_next_item() for _ in range(10)]
        env.restore_data_position(json.loads(json.dumps(position)))
        again = [await env.get_next_item() for _ in range(10)]
        held_out = env._held_out
    assert len(held_out) == 13
    assert not {*first} & {*held_out}
    assert set(first) == set(second)
    assert first != second == again


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "?"}, "column answer is missing"),
        ({"question": "?", "answer": "many"}, "its answer is not a number: 'many'"),
        ({"question": "?", "answer": "5 #### "}, "its answer is not a number: ''"),
    ],
)
async def test_rows_that_cannot_be_used(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    only = write_problems(tmp_path / "only.jsonl", row)
    with pytest.raises(DatasetError, match="has no usable row: only.jsonl-1: " + reason):
        async with environment(dataset_name=only).running():
            pass
    env = environment(dataset_name=write_problems(tmp_path / "some.jsonl", row, {"question": "1 + 1?", "answer": 2}))
    async with env.running():
        assert env.summary.skipped_rows == [f"some.jsonl-1: {reason}"]


async def test_a_data_set_that_cannot_be_reached_is_said() -> None:
    with pytest.raises(DatasetError, match="dataset_name: cannot load 'openai/gsm8k', split 'train': "):
        async with environment(dataset_name="openai/gsm8k").running():
            pass
