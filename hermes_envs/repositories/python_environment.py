"""A repository together with a Python environment that can run its tests, as a layer for slots."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import io
import json
import shlex
import tarfile
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from packaging.requirements import Requirement

from backends.base import Layer, Slot, ToolBackend
from hermes_envs.errors import EnvironmentBuildError
from hermes_envs.repositories.repository import RepositorySnapshot
from hermes_envs.workspace import Workspace, explain
from sandbox_image.protocol import WORKSPACE

REPOSITORY = f"{WORKSPACE}/repo"
VIRTUAL_ENVIRONMENT = f"{WORKSPACE}/.venv"
PYTHON = f"{VIRTUAL_ENVIRONMENT}/bin/python"
_SCRATCH = f"{WORKSPACE}/.setup"

_RECIPE_VERSION = "1"
"""Part of each layer's name: raised whenever the same inputs would give another layer."""


@dataclass(frozen=True)
class PythonEnvironment:
    """The repository at `/workspace/repo`, a virtual environment at `/workspace/.venv`.

    The environment has pytest as it is installed here (no index is needed for it), the repository's root and `src` on its
    path, and whatever `install_commands` add with the pip that is there while it is built. With `wheels` pip installs from
    those alone.
    """

    snapshot: RepositorySnapshot
    install_commands: tuple[str, ...]
    wheels: tuple[Path, ...]
    timeout_s: float

    @cached_property
    def name(self) -> str:
        """The layer's name: equal inputs, equal name."""
        wheels = [f"{wheel.name}:{wheel.stat().st_size}" for wheel in self.wheels]
        inputs = [_RECIPE_VERSION, self.snapshot.commit, self.install_commands, wheels, _test_tools_versions()]
        return f"python-{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:24]}"

    def layer(self, backend: ToolBackend) -> Layer:
        """The layer that has this environment; all environments have the one with the test tools below them."""

        async def build_test_tools(slot: Slot) -> None:
            await self._build_test_tools(Workspace(backend, slot))

        async def build(slot: Slot) -> None:
            await self._build(Workspace(backend, slot))

        tools = hashlib.sha256("\n".join([_RECIPE_VERSION, *_test_tools_versions()]).encode()).hexdigest()[:24]
        return Layer(self.name, build, base=Layer(f"python-tools-{tools}", build_test_tools))

    async def _build_test_tools(self, workspace: Workspace) -> None:
        archive = f"{_SCRATCH}/test_tools.tar.gz"
        await self._write(workspace, archive, await asyncio.to_thread(_pack_test_tools))
        await self._run(workspace, _MAKE_ENVIRONMENT.format(archive=archive))

    async def _build(self, workspace: Workspace) -> None:
        """Raises `EnvironmentBuildError` with the end of the failing command's output."""
        await checkout(workspace, self.snapshot)
        for wheel in self.wheels:
            await self._write(workspace, f"{_SCRATCH}/wheels/{wheel.name}", await asyncio.to_thread(wheel.read_bytes))
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": f"{_SCRATCH}/wheels"} if self.wheels else {}
        for command in self.install_commands:
            # The variables stay unexpanded here: only the slot knows its own PATH.
            activated = f'export PATH={VIRTUAL_ENVIRONMENT}/bin:"$PATH" VIRTUAL_ENV={VIRTUAL_ENVIRONMENT}\n{command}'
            await self._run(workspace, activated, cwd=REPOSITORY, env=offline)
        await self._run(workspace, _FINISH_ENVIRONMENT)

    async def _write(self, workspace: Workspace, path: str, content: bytes) -> None:
        written = await workspace.write(path, content)
        if not written.success:
            raise EnvironmentBuildError(f"cannot write {path}: {explain(written)}")

    async def _run(
        self, workspace: Workspace, command: str, *, cwd: str = WORKSPACE, env: dict[str, str] | None = None
    ) -> None:
        result = await workspace.run(command, cwd=cwd, env=env, timeout_s=self.timeout_s)
        if not result.success:
            raise EnvironmentBuildError(f"{command.splitlines()[-1]!r} failed: {explain(result)}")


async def checkout(workspace: Workspace, snapshot: RepositorySnapshot) -> None:
    """Put the repository at `/workspace/repo`, with the snapshot's commit as its only one.

    Raises:
        EnvironmentBuildError: git is missing in the sandbox, or there is no room.
    """
    bundle = f"{WORKSPACE}/.snapshot.bundle"
    written = await workspace.write(bundle, snapshot.bundle)
    if not written.success:
        raise EnvironmentBuildError(f"cannot write the repository: {explain(written)}")
    result = await workspace.run(f"{clone_command(bundle, REPOSITORY)} && rm {bundle}")
    if not result.success:
        raise EnvironmentBuildError(f"cannot check the repository out: {explain(result)}")


async def installed_modules(workspace: Workspace) -> list[str]:
    """The names of the modules and packages in the environment of a clean slot."""
    result = await workspace.run(f"ls -1 {_SITE_PACKAGES}")
    return [entry.split(".", 1)[0] for entry in result.output.splitlines()]


def clone_command(bundle: str, directory: str, *options: str) -> str:
    """A shell command that clones a bundle and forgets where it came from."""
    clone = shlex.join(["git", "clone", "--quiet", *options, bundle, directory])
    return f"{clone} && git -C {shlex.quote(directory)} remote remove origin"


_MAKE_ENVIRONMENT = f"""
set -e
python3 -m venv --without-pip {VIRTUAL_ENVIRONMENT}
site_packages=$({PYTHON} -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
tar -xzf {{archive}} -C "$site_packages"
printf '%s\\n' {REPOSITORY}/src {REPOSITORY} > "$site_packages/task_repository.pth"
for tool in pip pytest; do
    printf '#!/bin/sh\\nexec {PYTHON} -m %s "$@"\\n' $tool > {VIRTUAL_ENVIRONMENT}/bin/$tool
    chmod +x {VIRTUAL_ENVIRONMENT}/bin/$tool
done
# Leaves compiled modules behind, so that no later run has to compile them.
{PYTHON} -I -m pytest --version
rm -rf {_SCRATCH}
"""

# pip is of no use without a network, and half of the environment where layers have to be copied.
_SITE_PACKAGES = f"{VIRTUAL_ENVIRONMENT}/lib/python3.*/site-packages"
_FINISH_ENVIRONMENT = f"""
set -e
rm -rf {_SCRATCH} {VIRTUAL_ENVIRONMENT}/bin/pip {_SITE_PACKAGES}/pip {_SITE_PACKAGES}/pip-*.dist-info
{PYTHON} -I -m pytest --version
"""


@cache
def _test_tools_distributions() -> tuple[importlib.metadata.Distribution, ...]:
    """pip and pytest as installed here, and what pytest needs: pure Python, so that any slot's interpreter can use them."""
    found: dict[str, importlib.metadata.Distribution] = {}
    pending = ["pip", "pytest"]
    while pending:
        distribution = importlib.metadata.distribution(pending.pop())
        name = distribution.metadata["Name"]
        if name in found:
            continue
        found[name] = distribution
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending.append(requirement.name)
    return tuple(found[name] for name in sorted(found))


def _test_tools_versions() -> list[str]:
    return [f"{distribution.metadata['Name']}=={distribution.version}" for distribution in _test_tools_distributions()]


@cache
def _pack_test_tools() -> bytes:
    """A compressed tar archive to unpack into a site-packages folder."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz", compresslevel=6) as tar:
        for distribution in _test_tools_distributions():
            for file in distribution.files or ():
                if ".." not in file.parts and "__pycache__" not in file.parts:
                    tar.add(str(file.locate()), arcname=str(file), recursive=False)
    return archive.getvalue()
