"""Device thread: one thread, in order; no call is cancelled midway, no exception lost."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator

import pytest

from outrider.engine import DeviceThread
from outrider.errors import InternalError


@pytest.fixture
def device() -> Iterator[DeviceThread]:
    device = DeviceThread("test-device")
    yield device
    device.close()


async def test_runs_in_order_on_one_other_thread(device: DeviceThread) -> None:
    seen: list[tuple[int, str]] = []

    def note(i: int) -> int:
        seen.append((i, threading.current_thread().name))
        return i * i

    assert await asyncio.gather(*(device.run(note, i) for i in range(20))) == [
        i * i for i in range(20)
    ]
    assert [i for i, _ in seen] == list(range(20))
    (name,) = {name for _, name in seen}
    assert name.startswith("test-device")


async def test_exceptions_reach_the_caller(device: DeviceThread) -> None:
    with pytest.raises(ZeroDivisionError):
        await device.run(lambda: 1 // 0)
    assert await device.run(lambda: "still alive") == "still alive"


@pytest.mark.parametrize("started", [True, False])
async def test_cancelled_caller_does_not_cancel_work(device: DeviceThread, started: bool) -> None:
    """Both for a running call and for a queued one."""
    gate, began, finished = threading.Event(), threading.Event(), threading.Event()
    blocker = asyncio.ensure_future(device.run(gate.wait, 60)) if not started else None

    def work() -> None:
        began.set()
        gate.wait(60)
        finished.set()

    task = asyncio.ensure_future(device.run(work))
    await asyncio.sleep(0)
    if started:
        await asyncio.to_thread(began.wait, 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not finished.is_set()
    gate.set()
    await device.run(lambda: None)
    assert finished.is_set()
    if blocker is not None:
        await blocker


async def test_abandoned_exception_is_logged(
    device: DeviceThread, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()

    def fail() -> None:
        gate.wait(60)
        raise ValueError("lost?")

    with caplog.at_level(logging.ERROR):
        task = asyncio.ensure_future(device.run(fail))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()
        await device.run(lambda: None)
    assert "after its caller was cancelled" in caplog.text
    assert "lost?" in caplog.text


async def test_close_finishes_queued_calls() -> None:
    device = DeviceThread()
    gate, done = threading.Event(), threading.Event()

    def work() -> None:
        gate.wait(60)
        done.set()

    task = asyncio.ensure_future(device.run(work))
    await asyncio.sleep(0)
    gate.set()
    await asyncio.to_thread(device.close)
    assert done.is_set()
    await task
    device.close()
    with pytest.raises(InternalError, match="closed"):
        await device.run(lambda: None)


def test_a_call_may_outlive_its_event_loop() -> None:
    device = DeviceThread()
    gate = threading.Event()

    async def abandon() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(device.run(gate.wait, 60), 0.01)

    asyncio.run(abandon())
    gate.set()
    device.close()
