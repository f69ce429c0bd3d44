"""Full-screen programs in the terminal of a box, and that the recording shows what tmux shows at each step."""

from __future__ import annotations

import asyncio
import re
import shutil
import time

import pytest

from hermes_envs.screen.decoder import AsciinemaStreamDecoder
from sandbox_image.protocol import RECORDING_PATH
from tests.sandbox_image.running import Api
from tests.support.waiting import PATIENCE_S

if shutil.which("tmux") is None:
    pytest.skip("tmux is not installed", allow_module_level=True)


pytestmark = pytest.mark.any_user


class Terminal:
    """A terminal, and a decoder of its recording, which must always show the same."""

    def __init__(self, api: Api) -> None:
        self._api = api

    @classmethod
    async def start(cls, api: Api, *, width: int = 80, height: int = 24) -> Terminal:
        """Start it."""
        await api.tmux("start", pane_width=width, pane_height=height)
        return cls(api)

    async def type(self, *keys: str, until: str | None = None) -> str:
        """Type, wait for a pattern (or the prompt), and return what is shown then."""
        sent = await self._api.tmux("send_keys", keys=list(keys), block=until is None)
        assert not sent["metadata"]["timeout"], sent
        deadline = time.monotonic() + PATIENCE_S
        while until is not None:
            shown = (await self._api.tmux("capture"))["output"]
            if re.search(until, shown, re.MULTILINE):
                break
            assert time.monotonic() < deadline, f"no {until!r} in\n{shown}"
            await asyncio.sleep(0.01)
        return await self.compare()

    async def resize(self, width: int, height: int) -> str:
        """Change its size, and give the program the time to notice: tmux tells it at most four times a second."""
        await self._api.tmux("resize", pane_width=width, pane_height=height)
        await asyncio.sleep(0.3)
        return await self.compare()

    async def compare(self) -> str:
        """What both show, which must be the same once the program has stopped printing."""
        for _ in range(20):
            screen = await self._api.tmux("capture")
            _, content = await self._api.post("/artifacts/read", {"slot_id": self._api.slot, "path": RECORDING_PATH})
            decoder = AsciinemaStreamDecoder.of(content["content"])
            metadata = screen["metadata"]
            column, line = metadata["cursor"]
            size = metadata["pane_width"], metadata["pane_height"]
            shown = (screen["output"].rstrip("\n"), size, metadata["alternate_screen"], (min(column, size[0] - 1), line))
            decoded = (decoder.text(), decoder.size, decoder.alternate, tuple(decoder.cursor))
            if shown == decoded:
                break
            await asyncio.sleep(0.05)
        assert shown == decoded
        return str(screen["output"])

    async def sees_size(self, text: str) -> None:
        """Wait until the shell tells this size."""
        async with asyncio.timeout(PATIENCE_S):
            while f"\n{text}\n" not in await self.type("clear; echo; stty size", "Enter"):
                continue


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


@needs("vim")
async def test_vim_edits_a_file(api: Api) -> None:
    await api.tool("write_file", {"path": "poem.txt", "content": "".join(f"line {n} 漢字 🎉\n" for n in range(1, 61))})
    terminal = await Terminal.start(api)
    await terminal.type("vim -u NONE -N poem.txt", "Enter", until=r"\"poem.txt\" 60L")
    await terminal.type(":set number incsearch", "Enter", "/line 33", "Enter", until=r"33 line 33")
    await terminal.type("cc", "wörter → 木 e\u0301 done", "Escape", "yyp5>>", until=r"wörter")
    await terminal.type(":vsplit", "Enter", "C-w", "l", "gg", "dd", "i", "top; ", "Escape", until=r"top; ")
    await terminal.resize(100, 30)
    await terminal.type("C-f", "C-f", "zz", ":%s/line \\([0-9]*\\)/row \\1/", "Enter", until=r"row 5")
    await terminal.resize(60, 15)
    shown = await terminal.type(":only", "Enter", ":wq", "Enter")
    assert shown.endswith("/workspace$")
    content = (await api.output("cat poem.txt")).splitlines()
    assert content[0] == "top; row 2 漢字 🎉"
    assert [line.strip() for line in content if "wörter" in line] == ["wörter → 木 e\u0301 done"] * 2
    assert content[-1] == "row 60 漢字 🎉"


@needs("less")
async def test_less(api: Api) -> None:
    await api.tool("write_file", {"path": "long.txt", "content": "".join(f"{n} {'漢 text ' * 15}\n" for n in range(1, 201))})
    terminal = await Terminal.start(api, width=50, height=12)
    await terminal.type("less long.txt", "Enter", until=r"^long.txt")
    await terminal.type("Space", "Space", "j", "j", "k", until=r"^:$")
    await terminal.type("/199 ", "Enter", until=r"^199 ")
    await terminal.type("g", "-S", "Enter", until=r"^1 ")
    assert (await terminal.type("G", until=r"^200 .*\n.*END")).startswith("19")
    assert (await terminal.type("q")).endswith("/workspace$")


@needs("top")
async def test_top(api: Api) -> None:
    terminal = await Terminal.start(api, width=90, height=20)
    shown = await terminal.type("top -d 30", "Enter", until=r"PID USER .*\n.* user ")
    assert "Tasks:" in shown
    await terminal.type("t", "m", until="PID USER")
    await terminal.resize(70, 14)
    assert (await terminal.type("q")).rstrip().endswith("/workspace$")


async def test_a_python_prompt(api: Api) -> None:
    terminal = await Terminal.start(api, width=60, height=15)
    await terminal.type("python3 -q", "Enter", until=r"^>>>")
    await terminal.type("def double(x):", "Enter", "    return 2 * x", "Enter", "Enter", until=r">>>\s*$")
    shown = await terminal.type("double('漢ü')", "Enter", until=r"^'漢ü漢ü'")
    assert "..." in shown
    await terminal.type("while True: pass", "Enter", "Enter", until=r"\.\.\.\s*$")
    await terminal.type("C-c", until="KeyboardInterrupt")
    assert (await terminal.type("C-d")).endswith("/workspace$")


@needs("vim")
async def test_git_rebase_interactively(api: Api) -> None:
    await api.output(
        "git init -q . && git config user.email a@b && git config user.name a && "
        "for n in one two three; do echo $n > $n && git add . && git commit -qm $n; done"
    )
    terminal = await Terminal.start(api)
    await terminal.type("export EDITOR='vim -u NONE -N'", "Enter")
    await terminal.type("git rebase -i --root", "Enter", until=r"^pick \w+ one\n(.*\n)*pick \w+ three")
    # Reword the last one, and put the second into the first.
    await terminal.type("j", "ciw", "fixup", "Escape", "j", "0", "ciw", "reword", "Escape", until=r"^reword \w+ three")
    await terminal.type(":wq", "Enter", until=r"COMMIT_EDITMSG")
    await terminal.type("cc", "drei 三", "Escape", until="^drei 三")
    assert "Successfully rebased" in await terminal.type(":wq", "Enter")
    assert await api.output("git log --format=%s; git show --format= --name-only HEAD~") == "drei 三\none\none\ntwo\n"


async def test_wide_and_joined_characters(api: Api) -> None:
    lines = [
        "漢字かな交じり文" * 6,
        "e\u0301a\u0308" * 20,
        "한국어 🎉🚀 →│─┼",
        "\U0001f44d\U0001f3fd",
        "tab\tstop\t漢",
        "\x1b[31;1mred\x1b[0m",
    ]
    await api.tool("write_file", {"path": "wide", "content": "\n".join(lines) + "\n"})
    terminal = await Terminal.start(api, width=41, height=20)
    shown = await terminal.type("cat wide", "Enter")
    assert "かな交じり文漢字" in shown
    await terminal.type("echo ", *(["漢"] * 30), "Left", "Left", "x", "Home", "#", until="^ *漢|#echo")
    await terminal.type("C-c", "C-l", until=r"^/workspace\$")


async def test_programs_see_the_size(api: Api) -> None:
    terminal = await Terminal.start(api, width=77, height=11)
    await terminal.sees_size("11 77")
    await terminal.resize(99, 17)
    await terminal.sees_size("17 99")
    await terminal.type("seq 1 100", "Enter")
    await terminal.resize(50, 6)
    await terminal.resize(50, 25)
    assert "6\n7" in await terminal.type("C-l", "seq 1 20", "Enter")
