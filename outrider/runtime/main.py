"""Main function of each service program: settings, logs, event loop, exit status."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar

import structlog
import uvloop

from outrider.errors import ConfigError
from outrider.runtime.grpc_server import Server, stop_signal
from outrider.settings.loader import load
from outrider.telemetry.logs import configure_logs

log = structlog.get_logger()

LISTENING_PREFIX = "listening on "
METRICS_PREFIX = "metrics on "
HTTP_PREFIX = "http on "


class ServiceConfig(Protocol):
    """Settings that every program has."""

    @property
    def host(self) -> str: ...
    @property
    def log_level(self) -> str: ...
    @property
    def log_json(self) -> bool: ...


# Messages and tasks are freed by reference counting; reference cycles are few.
_GC_THRESHOLD = 20_000

Config = TypeVar("Config", bound=ServiceConfig)


def run_until_signalled(
    name: str, kind: type[Config], serving: Callable[[Config], AbstractAsyncContextManager[Server]]
) -> int:
    """Serves with the settings of flags and environment until SIGTERM or SIGINT.

    Prints its address on standard output once it serves. Returns the exit status: 2 if a setting is
    invalid, with a message on standard error; 143 after SIGTERM before it serves.
    """
    # As a container's first process it would otherwise ignore SIGTERM.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
    # Set early: loading torch would otherwise run several full collections, 0.6 s in all.
    gc.set_threshold(_GC_THRESHOLD, 20, 20)

    async def body(config: Config) -> None:
        asyncio.get_running_loop().set_exception_handler(log_unhandled)
        async with serving(config) as server:
            stopped = stop_signal()  # first: a reader of the lines below may send SIGTERM at once
            _freeze_loaded_objects()
            if server.metrics_port is not None:
                print(f"{METRICS_PREFIX}{config.host}:{server.metrics_port}", flush=True)
            if server.http_port is not None:
                print(f"{HTTP_PREFIX}{config.host}:{server.http_port}", flush=True)
            print(f"{LISTENING_PREFIX}{config.host}:{server.port}", flush=True)
            await stopped.wait()

    renamed: list[tuple[str, str]] = []
    try:
        config = load(
            kind, name, sys.argv[1:], on_renamed=lambda old, new: renamed.append((old, new))
        )
        configure_logs(name, level=config.log_level, json=config.log_json)
        for old, new in renamed:
            log.warning("renamed_setting", old=old, new=new)
        uvloop.run(body(config))
    except ConfigError as error:
        return _print_errors(name, error)
    except BaseExceptionGroup as group:  # raised by a TaskGroup
        wrong, rest = group.split(ConfigError)
        if wrong is None or rest is not None:
            raise
        return _print_errors(name, *_leaves(wrong))
    return 0


def log_unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Exception handler of the event loop: logs an error that no task handled.

    grpc.aio raises ExecuteBatchError where a client closes its call while an answer is being sent.
    Only that call ends, and its client does not listen: at debug level.
    """
    error = context.get("exception")
    if type(error).__name__ == "ExecuteBatchError":
        log.debug("call_closed_while_sending", error=repr(error))
        return
    log.error("unhandled_error", message=context.get("message"), exc_info=error)


def _freeze_loaded_objects() -> None:
    """Excludes everything loaded so far from garbage collection, which would delay rounds."""
    gc.collect()
    gc.freeze()


def _leaves(group: BaseExceptionGroup[ConfigError]) -> list[BaseException]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


def _print_errors(name: str, *errors: BaseException) -> int:
    for error in errors:
        print(f"{name}: {error}", file=sys.stderr)
    return 2
