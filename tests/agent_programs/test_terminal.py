from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import hermes_envs
from backends import BackendConfigError, BackendOptions, SandboxUnavailableError, SlotLostError
from hermes_envs.agent_programs.pool import TerminalPool
from hermes_envs.agent_programs.terminal import Terminal
from tests.support.processes import below, mentioning

CHECKOUT = Path(hermes_envs.__path__[0]).parent


def test_commands_give_their_output_and_status(pool: TerminalPool) -> None:
    terminal = Terminal(pool)
    assert terminal.execute("echo out; echo err >&2; exit 3") == {"output": "out\nerr\n", "returncode": 3}
    assert terminal.execute("kill -9 $$") == {"output": "", "returncode": 137}
    assert terminal.execute("no-such-program")["returncode"] == 127
    terminal.execute("mkdir -p a/b; echo kept > a/b/file")
    assert terminal.execute("cat file", "a/b") == {"output": "kept\n", "returncode": 0}
    assert terminal.execute("cat <<END\n$(pwd)\nEND", "/tmp") == {"output": "/tmp\n", "returncode": 0}
    assert terminal.execute("pwd", "/workspace/a/../a")["output"] == "/workspace/a\n"


def test_the_directory_and_the_variables_of_a_terminal(pool: TerminalPool) -> None:
    terminal = Terminal(pool, cwd="/usr/lib", variables={"COLOUR": "deep blue"})
    assert terminal.execute('pwd; echo "$COLOUR"')["output"] == "/usr/lib\ndeep blue\n"
    assert terminal.execute("pwd", "..")["output"] == "/\n"


def test_what_cannot_be_run_or_finished_says_why(pool: TerminalPool) -> None:
    terminal = Terminal(pool, timeout_s=1.5)
    assert terminal.execute("echo begun; sleep 60") == {"output": "begun\n[timed out after 1.5 s]\n", "returncode": 124}
    assert terminal.execute("sleep 2; echo done", timeout=30) == {"output": "done\n", "returncode": 0}
    assert terminal.execute("echo \0") == {"output": "[command: contains a NUL character]\n", "returncode": 126}
    assert terminal.execute("pwd", "missing")["returncode"] == 126
    missing = terminal.execute("echo not reached", "/missing; touch /tmp/x")
    assert missing["returncode"] != 0
    assert "not reached" not in str(missing["output"])
    assert terminal.execute("ls /tmp")["output"] == ""


def test_a_task_has_one_slot_until_its_last_terminal_leaves(pool: TerminalPool) -> None:
    first, second, other = Terminal(pool, task_id="task"), Terminal(pool, task_id="task"), Terminal(pool)
    first.execute("echo kept > file")
    assert second.execute("cat file")["output"] == "kept\n"
    assert other.execute("ls")["output"] == ""
    first.cleanup()
    first.stop()
    with pytest.raises(SlotLostError, match="cleaned up"):
        first.execute("true")
    assert second.execute("cat file")["output"] == "kept\n"
    second.stop()
    assert Terminal(pool, task_id="task").execute("ls")["output"] == ""


def test_many_threads_use_few_slots(pool: TerminalPool) -> None:
    def work(number: int) -> list[object]:
        terminal = Terminal(pool)
        try:
            answers = [terminal.execute(f"echo {number} >> file; cat file")["output"] for _ in range(3)]
        finally:
            terminal.cleanup()
        return answers

    with ThreadPoolExecutor(16) as threads:
        outcomes = list(threads.map(work, range(40)))
    assert outcomes == [[f"{number}\n" * count for count in (1, 2, 3)] for number in range(40)]


def test_a_slow_command_of_one_thread_holds_up_no_other(pool: TerminalPool) -> None:
    slow, quick = Terminal(pool), Terminal(pool)

    def interrupted() -> None:
        with pytest.raises(SlotLostError):
            slow.execute("sleep 100", timeout=200)

    thread = threading.Thread(target=interrupted)
    thread.start()
    for _ in range(20):
        quick.execute("true")
    assert thread.is_alive()
    slow.cleanup()
    thread.join()


def test_a_forgotten_terminal_gives_its_slot_back(tmp_path: Path) -> None:
    pool = TerminalPool(BackendOptions(local_slots=1, local_data_dir=str(tmp_path), acquire_timeout_s=10))
    forgotten = Terminal(pool)
    forgotten.execute("touch file")
    del forgotten
    gc.collect()
    assert Terminal(pool).execute("ls")["output"] == ""
    pool.close()


def test_after_the_end_of_the_pool_there_are_no_commands(tmp_path: Path) -> None:
    pool = TerminalPool(BackendOptions(local_slots=1, local_data_dir=str(tmp_path)))
    terminal = Terminal(pool)
    outcomes: list[BaseException] = []

    def interrupted() -> None:
        try:
            terminal.execute("sleep 100", timeout=200)
        except (SlotLostError, SandboxUnavailableError) as reason:
            outcomes.append(reason)

    thread = threading.Thread(target=interrupted)
    thread.start()
    time.sleep(0.5)
    pool.close()
    thread.join(20)
    assert len(outcomes) == 1
    with pytest.raises(SandboxUnavailableError, match="were closed"):
        terminal.execute("true")
    terminal.cleanup()
    pool.close()
    assert not [process for process in below(os.getpid()) if str(tmp_path) in process.command]


def test_a_backend_that_does_not_start_says_why() -> None:
    with pytest.raises(BackendConfigError, match="require_sandbox"):
        TerminalPool(BackendOptions(local_isolation="none"))


def test_a_program_that_just_ends_leaves_nothing_and_says_nothing(tmp_path: Path) -> None:
    program = """
        import sys
        from hermes_envs.agent_programs.variables import terminal_from_variables

        terminal = terminal_from_variables(variables={"TERMINAL_LOCAL_DATA_DIR": sys.argv[1], "TERMINAL_LOCAL_SLOTS": "1"})
        print(terminal.execute("echo from inside")["output"], end="")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "from inside\n", "")
    assert not mentioning(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
