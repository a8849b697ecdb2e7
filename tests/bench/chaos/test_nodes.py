"""Programs that are killed, frozen and stopped restart, and no process is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from outrider.cli.relay import Relay
from outrider_bench.chaos.nodes import Node
from tests.cli.processes import ROOT, descendants, is_alive, wait_until_dead


class Counter:
    """Reads the count of the test program."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> int:
        text = self._path.read_text("utf-8") if self._path.exists() else ""
        return int(text or 0)

    async def advances(self, timeout_s: float = 60.0) -> bool:
        return await self._reaches(self.read() + 3, timeout_s)

    async def _reaches(self, count: int, timeout_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.read() < count:  # noqa: ASYNC110 (another process counts)
                    await asyncio.sleep(0.01)
                return True
        return False


@contextlib.asynccontextmanager
async def started(
    directory: Path, on_death: Callable[[str], None], links: list[Relay]
) -> AsyncIterator[tuple[Node, Counter]]:
    path = directory / "count"
    arguments = ["tests.bench.chaos.program", str(path)]
    node = Node("program", arguments, directory, links, on_death)
    await node.start()
    try:
        yield node, Counter(path)
    finally:
        await node.close()


def _children() -> dict[int, str]:
    return {p: c for p, c in descendants(os.getpid()).items() if "tests.bench.chaos.program" in c}


async def test_killed_node_restarts(tmp_path: Path) -> None:
    """Its links lead to it, wanted exits are not reported, no process is left at the end."""
    deaths: list[str] = []
    link = Relay("127.0.0.1", 0, "127.0.0.1", 1, 0.0)
    async with started(tmp_path, deaths.append, [link]) as (node, counter):
        assert node.address == "127.0.0.1:7"
        (pid,) = _children()
        await node.kill()
        assert not is_alive(pid)
        await node.start()
        assert await counter.advances()
        assert await node.stop() == 0
        await node.start()
        children = _children()
        assert len(children) == 1
    wait_until_dead(children)
    assert deaths == []


async def test_frozen_node_stalls_and_resumes(tmp_path: Path) -> None:
    deaths: list[str] = []
    async with started(tmp_path, deaths.append, []) as (node, counter):
        async with node.frozen():
            count = counter.read()
            assert not await counter.advances(timeout_s=0.3)
            assert counter.read() <= count + 1, "a write may have been in progress"
        assert await counter.advances()
    assert deaths == []


async def test_frozen_node_can_be_closed(tmp_path: Path) -> None:
    """As after Ctrl-C during the fault."""
    async with started(tmp_path, lambda _: None, []) as (node, _):
        children = _children()
        async with node.frozen():
            await node.close()
    wait_until_dead(children)


async def test_unexpected_exit_is_reported(tmp_path: Path) -> None:
    deaths: list[str] = []
    async with started(tmp_path, deaths.append, []):
        (pid,) = _children()
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while not deaths:  # noqa: ASYNC110 (set by a plain call)
                await asyncio.sleep(0.01)
    assert "program died (killed by SIGKILL)" in deaths[0]


_FREEZES = """
import asyncio, sys
from pathlib import Path
from outrider_bench.chaos.nodes import Node

async def main():
    directory = Path(sys.argv[1])
    path = str(directory / "count")
    node = Node("program", ["tests.bench.chaos.program", path], directory, [], print)
    await node.start()
    async with node.frozen():
        print("frozen", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def test_frozen_process_resumes_when_its_owner_is_killed(tmp_path: Path) -> None:
    """It then exits with its parent."""
    with subprocess.Popen(
        [sys.executable, "-c", _FREEZES, str(tmp_path)],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    ) as owner:  # fmt: skip
        assert owner.stdout is not None
        assert owner.stdout.readline().strip() == "frozen"
        children = descendants(owner.pid)
        assert len(children) >= 2, "the program and its freezer"
        owner.kill()
    wait_until_dead(children)
