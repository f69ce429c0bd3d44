"""The compiled init: that it is used where it can be made."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sandbox_image import compile_init
from tests.sandbox_image.running import Api, command_line, running


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
async def test_boxes_run_the_compiled_init() -> None:
    assert compile_init.compile_init() is None
    assert compile_init.works(compile_init.LIBRARY)
    with running(slots=1) as server:
        api = Api.over(server)
        async with api.session:
            _, health = await api.get("/health")
            assert health["limits"]["compiled_init"] is True
            assert [command_line(pid).split()[0] for pid in server.inits()] == ["/bin/sh"]
            assert await api.output("echo $PPID; cat /proc/1/comm") == "1\nsh\n"


async def test_boxes_run_the_python_init_where_there_is_no_other() -> None:
    with running(slots=1, other_user=True) as server:
        api = Api.over(server)
        async with api.session:
            _, health = await api.get("/health")
            assert health["limits"]["compiled_init"] is False
            assert await api.output("echo $PPID") == "1\n"


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compile_init.compile_init() == "there is no C compiler"
