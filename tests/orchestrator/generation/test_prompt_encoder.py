"""Threads for long requests: bounded, and not the event loop's own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from orchestrator.generation import prompt_encoder as encoding
from orchestrator.generation.prompt_encoder import PromptEncoding
from outrider.errors import CapacityExceeded
from outrider.runtime.protobuf import LONG_LIST, copied
from outrider.v1 import orchestrator_pb2


@pytest.mark.parametrize("size", [0, 1, LONG_LIST, LONG_LIST + 1, 3 * LONG_LIST + 7])
def test_list_copied_in_slices_is_unchanged(size: int) -> None:
    message = orchestrator_pb2.TokenIds(ids=range(size))
    assert copied(message.ids) == tuple(range(size))


async def test_validation_runs_in_one_thread_with_a_bounded_queue() -> None:
    threads, is_free = PromptEncoding(), threading.Event()
    seen: list[str] = []

    def work(name: str) -> Callable[[], str]:
        def run() -> str:
            assert is_free.wait(60)
            seen.append(threading.current_thread().name)
            return name

        return run

    try:
        most = encoding._MAX_CHECKS_WAITING + 1
        running = [asyncio.create_task(threads.check(work(str(i)))) for i in range(most)]
        await asyncio.sleep(0)
        with pytest.raises(
            CapacityExceeded, match=f"{most} requests with long token lists"
        ) as caught:
            await threads.check(work("late"))
        assert caught.value.retry_after_s > 0
        assert await threads.run(lambda: "short", 1) == "short", "prompts have threads of their own"
        is_free.set()
        assert await asyncio.gather(*running) == [str(i) for i in range(most)]
        assert len(set(seen)) == 1
        assert threading.current_thread().name not in seen
        assert await threads.check(work("again")) == "again"
    finally:
        is_free.set()
        threads.close()
