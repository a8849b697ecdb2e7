"""The whole system as child processes on this machine: which programs, with which flags.

Owns the translation of the operator's choices to the programs' flags, and the order of starting.
Knows nothing of terminals.
"""

from __future__ import annotations

import asyncio
import os
import socket

from outrider.cli.failures import ProgramFailed
from outrider.cli.stack_options import StackOptions
from outrider.cli.supervisor import Death, Event, Report, State, Supervisor
from outrider.config import OrchestratorConfig, load
from outrider.errors import ConfigError

_ANY_HOST = ("0.0.0.0", "::", "")


def target_arguments(options: StackOptions) -> list[str]:
    """Of `python -m`."""
    num_threads = options.target_threads or max(1, _num_cores() - 1)
    return [
        "target_service",
        *_model_flags(options, options.target_model, options.device, num_threads),
        *_flag("inflate-parameters", options.inflate_parameters or None),
    ]


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def draft_arguments(options: StackOptions, model: str) -> list[str]:
    device = options.draft_device or options.device
    return ["draft_service", *_model_flags(options, model, device, options.draft_threads or 1)]


def _model_flags(options: StackOptions, model: str, device: str, num_threads: int) -> list[str]:
    return [
        *_flag("model", model),
        *_flag("port", 0),
        # What is left to the program may come from its own environment variables.
        *_flag("dtype", None if options.dtype == "auto" else options.dtype),
        *_flag("device", None if device == "auto" else device),
        *_flag("num-threads", num_threads),
        *_flag("kv-cache-tokens", options.kv_cache_tokens),
        *_flag("max-gamma", options.max_gamma or None),  # 0 means no drafts, not a tiny row
    ]


def orchestrator_arguments(
    options: StackOptions, target: str, draft: str | None, redis_url: str
) -> list[str]:
    return [
        "orchestrator",
        *_flag("target-endpoint", target),
        *_flag("draft-endpoint", draft or ""),
        *_flag("tokenizer", options.target_model if options.has_tokenizer else None),
        *_flag("redis-url", redis_url),
        *_flag("host", options.host),
        *_flag("port", options.port),
        *_flag("gamma", options.gamma),
        *_flag("max-gamma", options.max_gamma),
        *_flag("lookahead", options.lookahead),
        *_flag("draft-wait-ms", options.draft_wait_ms),
    ]


def _check_orchestrator(options: StackOptions) -> None:
    """Finds what is wrong with its settings before minutes are spent on loading models."""
    anywhere = "127.0.0.1:1"
    flags = orchestrator_arguments(options, anywhere, anywhere, options.redis_url or "redis://x")
    load(OrchestratorConfig, "orchestrator", flags[1:])


def _flag(name: str, value: object | None) -> list[str]:
    return [] if value is None else [f"--{name}={value}"]


class Stack:
    """A running system. `stop` must be called, whatever became of `start`."""

    def __init__(self, options: StackOptions, report: Report) -> None:
        self._options = options
        self._report = report
        self._supervisor = Supervisor(options.log_dir, report)
        self.endpoint = ""

    async def start(self) -> None:
        """Returns when it serves. Raises ConfigError or ProgramFailed."""
        options = self._options
        _check_port(options)
        _check_orchestrator(options)
        models = {"target": target_arguments(options)}
        if options.draft_model is not None:
            models["draft"] = draft_arguments(options, options.draft_model)
        redis_url = options.redis_url or self._supervisor.start_redis()
        for name in (*models, "orchestrator"):
            self._report(Event(name, State.WAITING))
        addresses = await self._start_all(models)
        arguments = orchestrator_arguments(
            options, addresses["target"], addresses.get("draft"), redis_url
        )
        address = await self._supervisor.start("orchestrator", arguments)
        self.endpoint = _reachable(address)

    async def _start_all(self, models: dict[str, list[str]]) -> dict[str, str]:
        try:
            async with asyncio.TaskGroup() as tasks:
                started = {
                    name: tasks.create_task(self._supervisor.start(name, arguments))
                    for name, arguments in models.items()
                }
        except* (ProgramFailed, ConfigError) as group:
            raise group.exceptions[0] from None
        return {name: task.result() for name, task in started.items()}

    async def next_death(self) -> tuple[Death, bool]:
        """The next program that ends by itself, and whether the system can go on without it."""
        death = await self._supervisor.next_death()
        return death, death.name == "draft"

    async def stop(self) -> None:
        await self._supervisor.stop()


def _reachable(address: str) -> str:
    """Where a client on this machine finds a server that listens on `address`."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host.strip("[]") in _ANY_HOST else address


def _check_port(options: StackOptions) -> None:
    """Says so before models are loaded for minutes; the orchestrator has the last word."""
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"port: {options.port} is not in [0, 65535]")
    host = options.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, options.port), family=family):
            pass
    except OSError as error:
        where = f"{options.host}:{options.port}"
        raise ConfigError(f"port: cannot listen on {where}: {error.strerror or error}") from error
