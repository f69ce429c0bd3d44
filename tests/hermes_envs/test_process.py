from __future__ import annotations

import asyncio
from collections.abc import Callable
from io import StringIO

import pytest
from rich.console import Console

from hermes_envs.errors import EnvironmentDefectError, NothingCollectedError
from hermes_envs.policies.token_record import TokenRecord
from hermes_envs.rollouts.group import Blame, FailedRollout, Group
from hermes_envs.rollouts.trajectory import Score, Stopwatch, ToolCounts, Trajectory
from hermes_envs.runs.group_queue import GroupQueue, QueueOptions
from hermes_envs.runs.reporter import Reporter
from hermes_envs.runs.summary import Summary


def trajectory(score: float = 1.0) -> Trajectory:
    return Trajectory("t", [], TokenRecord("t"), "stop", 1, ToolCounts(attempted=2), Stopwatch(), Score(score, "because"))


def collected(name: str, *scores: float) -> Group:
    return Group(name, tuple(trajectory(score) for score in scores), ())


def lost(name: str, reason: str = "broken", blame: Blame = "infrastructure") -> Group:
    return Group(name, (), (FailedRollout(f"{name}-0", reason, 1, blame),))


class Run:
    """A queue over numbered items, with everything that came of it."""

    def __init__(self, items: int, collect: Callable[[int, int], Group], *, concurrency: int = 3, attempts: int = 2) -> None:
        self.output = StringIO()
        self.saved: list[int] = []
        self.calls: dict[int, int] = {}
        self.running = self.most_running = 0
        self.summary = Summary()
        numbers = iter(range(items))

        async def next_item() -> int | None:
            return next(numbers, None)

        async def collect_group(item: int, size: int) -> Group:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            try:
                await asyncio.sleep(0.001)
                self.calls[item] = self.calls.get(item, 0) + 1
                return collect(item, self.calls[item])
            finally:
                self.running -= 1

        async def save(item: int, group: Group) -> None:
            self.saved.append(item)

        reporter = Reporter("test", Console(file=self.output, width=200))
        options = QueueOptions(max_concurrent_groups=concurrency, group_attempts=attempts)
        self.queue = GroupQueue(next_item, collect_group, str, save, reporter, 1, options)

    async def run(self, groups: int = 1000) -> Summary:
        await self.queue.run(groups, self.summary)
        return self.summary


async def test_all_items_are_collected_several_at_once() -> None:
    run = Run(20, lambda item, attempt: collected(str(item), 1.0, 0.0))
    summary = await run.run()
    assert sorted(run.saved) == list(range(20))
    assert run.most_running == 3
    assert (summary.groups, summary.trajectories, summary.mean_score, summary.pass_at_1) == (20, 40, 0.5, 0.5)
    assert summary.tool_calls == 80


async def test_no_more_groups_than_asked_for() -> None:
    run = Run(20, lambda item, attempt: collected(str(item), 1.0))
    assert (await run.run(5)).groups == 5


async def test_a_failed_group_is_tried_again_a_finite_number_of_times() -> None:
    run = Run(
        10, lambda item, attempt: lost(str(item)) if item == 4 or (item == 5 and attempt == 1) else collected(str(item), 1.0)
    )
    summary = await run.run()
    assert (run.calls[4], run.calls[5]) == (2, 2)
    assert (summary.groups, summary.failed_groups, summary.infrastructure_errors) == (9, 1, 1)
    assert 4 not in run.saved


async def test_a_group_that_somebody_cancels_is_tried_again() -> None:
    def collect(item: int, attempt: int) -> Group:
        task = asyncio.current_task()
        if item == 3 and attempt == 1 and task is not None:
            task.cancel()
        return collected(str(item), 1.0)

    async def cancel_itself_first(item: int, size: int) -> Group:
        group = collect(item, run.calls.setdefault(item, 0) + 1)
        run.calls[item] += 1
        await asyncio.sleep(0)
        return group

    run = Run(6, collect)
    run.queue.roll_out = cancel_itself_first
    summary = await run.run()
    assert summary.groups == 6
    assert run.calls[3] == 2


async def test_a_group_cancelled_every_time_is_an_infrastructure_error() -> None:
    async def cancelled(item: int, size: int) -> Group:
        raise asyncio.CancelledError

    run = Run(1, lambda item, attempt: lost(str(item)))
    run.queue.roll_out = cancelled
    summary = await run.run()
    assert (summary.groups, summary.failed_groups, summary.infrastructure_errors) == (0, 1, 1)


async def test_a_run_in_which_nothing_works_ends_early_with_the_reason() -> None:
    run = Run(1000, lambda item, attempt: lost(str(item), "connection refused"), concurrency=2, attempts=1)
    with pytest.raises(NothingCollectedError, match=r"first 3 groups failed.*connection refused"):
        await run.run()
    assert len(run.calls) < 10


@pytest.mark.parametrize("scores", [(), (1.0,)], ids=["no trajectory", "one trajectory"])
async def test_a_run_in_which_every_group_has_a_defect_ends_early_with_it(scores: tuple[float, ...]) -> None:
    def collect(item: int, attempt: int) -> Group:
        broken = lost(str(item), "KeyError in Words: 'text'", "defect")
        return Group(broken.name, collected(broken.name, *scores).trajectories, broken.failures)

    run = Run(1000, collect, concurrency=2)
    with pytest.raises(EnvironmentDefectError, match=r"first 3 groups .*KeyError in Words"):
        await run.run()
    assert set(run.calls.values()) == {1}, "a defect is not worth another try"
    assert len(run.calls) < 10
    assert run.summary.infrastructure_errors == 0
    assert len(run.summary.failures["defect"]) in (3, 4), "one more may have ended with the last"
    assert len(run.saved) == len(run.summary.failures["defect"]) * len(scores), "what was collected is kept"


async def test_a_defect_of_some_groups_does_not_end_the_run() -> None:
    run = Run(12, lambda item, attempt: lost(str(item), "KeyError", "defect") if item % 2 else collected(str(item), 1.0))
    summary = await run.run()
    assert (summary.groups, summary.failed_groups, len(summary.failures["defect"])) == (6, 6, 6)
    run.queue.reporter.conclude(summary)
    assert "│ defects of the environment" in run.output.getvalue()
    assert "infrastructure error:" not in run.output.getvalue()


@pytest.mark.parametrize("blames", [("unscored",), ("unscored", "defect", "unscored"), ("infrastructure",)])
async def test_a_run_without_any_trajectory_ends_early_whatever_is_to_blame(blames: tuple[Blame, ...]) -> None:
    run = Run(100, lambda item, attempt: lost(str(item), f"reason {item}", blames[item % len(blames)]), attempts=1)
    with pytest.raises(NothingCollectedError, match=r"first 3 groups failed; the last because of reason"):
        await run.run()
    assert len(run.calls) < 10


async def test_what_ends_with_the_group_that_ends_the_run_is_kept() -> None:
    together = asyncio.Event()

    async def at_once(item: int, size: int) -> Group:
        if item == 2:
            together.set()
        await together.wait()
        if item == 0:
            raise ZeroDivisionError
        return collected(str(item), 1.0)

    run = Run(3, lambda item, attempt: collected(str(item), 1.0))
    run.queue.roll_out = at_once
    with pytest.raises(ZeroDivisionError):
        await run.run()
    assert sorted(run.saved) == [1, 2]
    assert run.summary.groups == 2


@pytest.mark.parametrize("blame", ["task", "unscored", "defect"])
async def test_what_would_only_fail_again_is_not_tried_again(blame: Blame) -> None:
    run = Run(4, lambda item, attempt: lost(str(item), "for good", blame) if item == 2 else collected(str(item), 1.0))
    summary = await run.run()
    assert run.calls == dict.fromkeys(range(4), 1)
    assert summary.failed_groups == 1
    assert summary.failures["task"] == ({"2": "for good"} if blame == "task" else {})
    assert len(summary.failures["unscored"]) == (blame == "unscored")


async def test_cancelling_the_run_cancels_every_group() -> None:
    run = Run(100, lambda item, attempt: collected(str(item), 1.0))
    task = asyncio.create_task(run.run())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert run.running == 0


async def test_a_defect_ends_the_run_and_cancels_the_others() -> None:
    def collect(item: int, attempt: int) -> Group:
        raise ZeroDivisionError

    run = Run(10, collect)
    with pytest.raises(ZeroDivisionError):
        await run.run()
    assert run.running == 0


async def test_plain_lines_and_the_account() -> None:
    run = Run(2, lambda item, attempt: collected(f"task-{item}", 1.0))
    summary = await run.run()
    summary.failures["task"]["task-9"] = "no such commit"
    run.queue.reporter.conclude(summary)
    text = run.output.getvalue()
    assert ": task-0: 1 (0.0 s)" in text
    for part in (
        "groups",
        "mean score",
        "pass@1",
        "infrastructure errors",
        "tool calls",
        "seconds in grading",
        "set aside: task-9: no such commit",
    ):
        assert part in text
