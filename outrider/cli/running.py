"""Runs the coroutine of a command in an event loop; a signal cancels the coroutine."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any, TypeVar

from outrider.cli.failures import Signalled

Result = TypeVar("Result")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Signals received by the command in this event loop.
_RECEIVED: ContextVar[list[signal.Signals]] = ContextVar("received")


def survive_signal() -> Signalled:
    """For use in `except CancelledError`: lets the command report its results so far.

    Returns the exception that the command must raise afterwards, for its exit status. Raises
    CancelledError again if the signal is not the only cancellation of this task: a second signal,
    or a failure elsewhere.
    """
    task, received = asyncio.current_task(), _RECEIVED.get([])
    if task is None or not received or not task.cancelling() or task.uncancel():
        raise asyncio.CancelledError
    return Signalled(received[0])


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Runs the coroutine to its end, and returns its result.

    A signal cancels it, and Signalled is raised; a second signal also cancels its cleanup.
    """
    received: list[signal.Signals] = []

    async def body() -> Result:
        task = asyncio.current_task()
        assert task is not None
        _RECEIVED.set(received)

        def stop(number: signal.Signals) -> None:
            received.append(number)
            task.cancel()

        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, stop, number)
        return await main

    try:
        return asyncio.run(body())
    except asyncio.CancelledError:
        if not received:
            raise
        raise Signalled(received[0]) from None
