"""The event loop of a service program."""

from __future__ import annotations

import asyncio

from grpc._cython.cygrpc import ExecuteBatchError
from structlog.testing import capture_logs

from outrider.runtime.main import log_unhandled


async def test_errors_that_no_task_handles_are_logged() -> None:
    """One of gRPC is no error of ours: a client closed its call while an answer was being sent."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(log_unhandled)
    with capture_logs() as logs:
        for error in (ExecuteBatchError("Failed grpc_call_start_batch"), ValueError("a defect")):
            loop.call_exception_handler({"message": "Task exception", "exception": error})
    assert [(line["log_level"], line["event"]) for line in logs] == [
        ("debug", "call_closed_while_sending"),
        ("error", "unhandled_error"),
    ]
    assert isinstance(logs[1]["exc_info"], ValueError)
