"""Slots for synchronous code with many threads."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import threading
from collections.abc import Coroutine, Mapping
from typing import Any, ClassVar, TypeVar

from backends import BackendOptions, create_tool_backend, options_with
from backends.base import ToolBackend
from backends.errors import SandboxUnavailableError
from hermes_envs.services.trajectory_slots import TrajectorySlots
from sandbox_image.protocol import ExecutionResult

Result = TypeVar("Result")


class TerminalPool:
    """A backend that any thread can use: a background thread with an event loop owns it.

    A task has one slot, from its first command on until everybody who opened the task has closed it.
    """

    _shared: ClassVar[dict[str, TerminalPool]] = {}
    _shared_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, options: BackendOptions) -> None:
        """Start the backend and wait until it is there.

        Raises:
            SandboxError: as `create_tool_backend` and `ToolBackend.start`.
        """
        self._options = options
        self._owner = os.getpid()
        # Reentrant: the finalizer of a terminal calls `leave` in any thread, which may hold the lock already.
        self._lock = threading.RLock()
        self._users: dict[str, int] = {}
        self._closed = False
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="hermes-envs slots", daemon=True)
        self._thread.start()
        self._started.result()

    @classmethod
    def shared(cls, options: BackendOptions) -> TerminalPool:
        """The process' pool with these options of a backend, started by whoever asks first and closed when the process exits.

        Raises:
            SandboxError: as for a pool of one's own.
        """
        # Threads do not survive a fork: a child process needs a pool of its own.
        of_backend = set(options_with(BackendOptions, options.tool_pool_mode).model_fields)
        key = f"{os.getpid()} {options.model_dump_json(include=of_backend)}"
        with cls._shared_lock:
            pool = cls._shared.get(key)
            if pool is None or pool._closed:
                pool = cls._shared[key] = cls(options)
                atexit.register(pool.close)
            return pool

    def open(self, task_id: str) -> None:
        """Count one more user of a task's slot."""
        with self._lock:
            self._users[task_id] = self._users.get(task_id, 0) + 1

    def leave(self, task_id: str) -> None:
        """Count one user less; when none is left the slot is given back, in the background."""
        if self._owner != os.getpid():
            return
        with self._lock:
            self._users[task_id] -= 1
            if self._users[task_id] == 0:
                del self._users[task_id]
                if not self._closed:
                    asyncio.run_coroutine_threadsafe(self._slots.release(task_id), self._loop)

    def execute(
        self, task_id: str, command: str, *, cwd: str, variables: Mapping[str, str], timeout_s: float
    ) -> ExecutionResult:
        """Run a command in the task's slot; it gets one if it has none.

        Raises:
            SandboxError: the slot failed, or there is none to be had.
        """
        return self._wait_for(self._execute(task_id, command, cwd, variables, timeout_s))

    def close(self) -> None:
        """Give everything back and stop the backend; may be called twice."""
        if self._owner != os.getpid():
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join()

    async def _run(self) -> None:
        try:
            async with create_tool_backend(self._options) as self._backend:
                await self._serve(self._backend)
        except BaseException as reason:
            if self._started.done():
                raise
            # The thread that waits for the start raises it.
            self._started.set_exception(reason)

    async def _serve(self, backend: ToolBackend) -> None:
        self._slots = TrajectorySlots(backend)
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        self._started.set_result(None)
        await self._ending.wait()
        await self._slots.close()

    async def _execute(
        self, task_id: str, command: str, cwd: str, variables: Mapping[str, str], timeout_s: float
    ) -> ExecutionResult:
        arguments = {"command": command, "cwd": cwd, "env": dict(variables)}
        async with self._slots.use(task_id) as slot:
            return await self._backend.execute(slot, "bash", arguments, timeout_s=timeout_s)

    def _wait_for(self, work: Coroutine[Any, Any, Result]) -> Result:
        # Under the lock no call is submitted after the end was announced, so that each submitted one is answered.
        with self._lock:
            if self._closed or self._owner != os.getpid():
                work.close()
                raise SandboxUnavailableError("the terminals were closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError as reason:
            raise SandboxUnavailableError("the terminals were closed") from reason
        finally:
            # The wait may have been interrupted, as by Ctrl-C.
            future.cancel()
