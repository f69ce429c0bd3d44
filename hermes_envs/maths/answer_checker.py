"""Compares answers without a chance that one of them stops or kills the event loop."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from pathlib import Path

from backends.errors import SandboxError
from backends.teardown import finish
from hermes_envs.maths.boxed_answer import last_boxed

NO_BOX = "the response has no \\boxed{} answer"
TOO_HARD = "the answer takes too long to be compared"


class AnswerChecker:
    """Asks a process that it starts when needed, one answer at a time. Owned by `async with`."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> AnswerChecker:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await finish(self._stop())

    async def find_fault(self, response: str, gold: str) -> str | None:
        r"""Why a response does not answer with the number `gold` in its last `\boxed{}`; None if it does.

        Raises:
            SandboxError: answers cannot be compared on this machine now; the answer has no part in it.
        """
        answer = last_boxed(response)
        if answer is None:
            return NO_BOX
        async with self._lock:
            try:
                return await self._ask(gold, answer)
            except BaseException:
                # Its next line may be the answer to this question.
                await finish(self._stop())
                raise

    async def _ask(self, gold: str, answer: str) -> str | None:
        process = self._process = self._process or await self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
        line = await process.stdout.readline()
        if line:
            fault: str | None = json.loads(line)
            return fault
        status = await process.wait()
        self._process = None
        if status == -signal.SIGPROF:
            return TOO_HARD
        raise SandboxError(f"the process that compares answers ended with status {status}")

    async def _start(self) -> Process:
        # As a file, and nothing of the working directory on the path: it needs nothing of this package.
        command = (sys.executable, "-P", str(Path(__file__).with_name("comparison.py")))
        try:
            # A session of its own: Ctrl-C is for whoever waits for the comparison.
            return await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, start_new_session=True
            )
        except OSError as reason:
            raise SandboxError(f"the process that compares answers cannot be started: {reason}") from reason

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()
