"""The whole system as child processes on this machine: which programs, flags and start order.

`supervisor` runs the processes, `view` shows their progress.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import TYPE_CHECKING

from outrider.cli.failures import ProgramFailed, require_engine
from outrider.cli.stack_options import DEFAULT_HTTP_PORT, NO_DRAFT, NO_HTTP, StackOptions
from outrider.cli.supervisor import Death, Event, Report, State, Supervisor
from outrider.errors import ConfigError
from outrider.settings.addresses import require_host
from outrider.settings.loader import load
from outrider.settings.redis_address import has_password
from outrider.settings.services import OrchestratorConfig
from outrider.settings.simulation import Simulation

if TYPE_CHECKING:
    from outrider.cli.relay import Relay

# Name of the quickstart target in HTTP.
QUICKSTART_NAME = "quickstart"
# Addresses that mean all interfaces.
_ANY_HOST = ("0.0.0.0", "::", "")


def target_arguments(options: StackOptions) -> list[str]:
    """Arguments of `python -m` for the target."""
    if options.simulate_target is not None:
        return simulated_arguments(options, "target_service", options.simulate_target)
    num_cores = len(options.cpus("target")) or _num_cores() - 1
    num_threads = options.target_threads or max(1, num_cores)
    return [
        "target_service",
        *_model_flags(options, options.target_model, options.device, num_threads),
        *_flag("inflate-parameters", options.inflate_parameters or None),
    ]


def simulated_arguments(options: StackOptions, service: str, simulation: str) -> list[str]:
    """Arguments of `python -m` for a simulated target or draft."""
    return [
        service,
        *_flag("simulate", simulation),
        *_flag("port", 0),
        *_flag("kv-cache-tokens", options.kv_cache_tokens),
        *_flag("max-gamma", options.max_gamma or None),
    ]


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def draft_arguments(options: StackOptions, model: str) -> list[str]:
    """Arguments of `python -m` for the draft."""
    device = options.draft_device or options.device
    return [
        "draft_service",
        *_model_flags(options, model, device, options.draft_threads or 1),
        *_flag("target-tokenizer", options.target_tokenizer),
    ]


def _model_flags(options: StackOptions, model: str, device: str, num_threads: int) -> list[str]:
    return [
        *_flag("model", model),
        *_flag("port", 0),
        # "auto" is not passed on: the program may have an environment variable.
        *_flag("dtype", None if options.dtype == "auto" else options.dtype),
        *_flag("device", None if device == "auto" else device),
        *_flag("num-threads", num_threads),
        *_flag("kv-cache-tokens", options.kv_cache_tokens),
        *_flag(
            "max-gamma", options.max_gamma or None
        ),  # 0 (no drafts) is not allowed for a model service
    ]


def orchestrator_arguments(
    options: StackOptions,
    target: str,
    draft: str | None,
    redis_url: str,
    http_port: int | None = None,
) -> list[str]:
    """Arguments of `python -m` for the orchestrator; `target`, `draft`: host:port."""
    is_quickstart = options.target is None and options.simulate_target is None
    return [
        "orchestrator",
        *_flag("target-endpoint", target),
        *_flag("draft-endpoint", draft or ""),
        *_flag("tokenizer", options.target_model if options.has_tokenizer else None),
        *_flag("chat-template", options.chat_template),
        *(["--assume-same-vocabulary"] if options.has_same_vocabulary else []),
        # A password is not passed as a flag: the program inherits our environment.
        *_flag("redis-url", None if has_password(redis_url) else redis_url),
        *_flag("host", options.host),
        *_flag("port", options.port),
        *_flag("http-port", http_port),
        *_flag(
            "served-model-name",
            QUICKSTART_NAME if is_quickstart and http_port is not None else None,
        ),
        *_flag("gamma", options.gamma),
        *_flag("max-gamma", options.max_gamma),
        *_flag("lookahead", options.lookahead),
        *_flag("fan-out", options.fan_out),
        *_flag("draft-wait-ms", options.draft_wait_ms),
        *_switch("prompt-lookup", options.prompt_lookup),
        *_flag("max-generations", options.max_generations),
        *_flag("max-waiting", options.max_waiting),
        *_flag("audit-share", options.audit_share),
        *_flag("audit-planted-bias", options.audit_planted_bias),
    ]


def _check_orchestrator(options: StackOptions, http_port: int | None) -> None:
    """Checks the orchestrator's settings before the models are loaded, which may take minutes."""
    anywhere = "127.0.0.1:1"
    redis_url = options.redis_url or "redis://x"
    flags = orchestrator_arguments(options, anywhere, anywhere, redis_url, http_port)
    config = load(OrchestratorConfig, "orchestrator", flags[1:])
    if options.redis_url is not None and config.redis_url != options.redis_url:
        raise ConfigError("--redis-url: no password on a command line; give it as REDIS_URL")


def _check_simulation(options: StackOptions) -> None:
    """Allows two simulated tiers or a target alone; a real draft could only guess at random."""
    target, draft = options.simulate_target, options.simulate_draft
    if target is None:
        if draft is not None:
            raise ConfigError("--simulate-draft: needs --simulate-target")
        return
    if options.target is not None:
        raise ConfigError("--simulate-target: cannot be combined with --target")
    if options.draft not in (None, NO_DRAFT) or (options.draft and draft is not None):
        raise ConfigError("--simulate-target: cannot be combined with --draft")
    target_simulation = Simulation.parse(target, is_draft=False)
    if draft is not None:
        draft_simulation = Simulation.parse(draft)
        for name in ("vocab_size", "seed", "texts"):
            if getattr(target_simulation, name) != getattr(draft_simulation, name):
                raise ConfigError(f"--simulate-draft: its {name} must be the target's")


def _switch(name: str, is_on: bool | None) -> list[str]:
    return [] if is_on is None else [f"--{name}" if is_on else f"--no-{name}"]


def _flag(name: str, value: object | None) -> list[str]:
    return [] if value is None else [f"--{name}={value}"]


class Stack:
    """A running system. `stop` must be called, even if `start` has failed."""

    def __init__(self, options: StackOptions, report: Report, target: str | None = None) -> None:
        """`target`: host:port of a running target to use instead of starting one."""
        self._options = options
        self._report = report
        self._target = target
        self._supervisor = Supervisor(options.log_dir, report)
        self._resources = contextlib.AsyncExitStack()
        self.endpoint = ""
        # host:port of each model service, by name.
        self.addresses: dict[str, str] = {}
        # Delays the draft's link, with --draft-delay-ms.
        self.relay: Relay | None = None

    async def start(self) -> None:
        """Starts all programs; returns when they serve. Raises ConfigError or ProgramFailed."""
        options = self._options
        require_engine()
        _check_port(options)
        http_port = _http_port(options)
        _check_simulation(options)
        _check_orchestrator(options, http_port)
        for name in ("target", "draft", "orchestrator"):
            options.cpus(name)
        models = {} if self._target else {"target": target_arguments(options)}
        if options.simulate_draft is not None:
            models["draft"] = simulated_arguments(options, "draft_service", options.simulate_draft)
        elif options.draft_model is not None:
            models["draft"] = draft_arguments(options, options.draft_model)
        redis_url = options.redis_url or self._supervisor.start_redis()
        for name in (*models, "orchestrator"):
            self._report(Event(name, State.WAITING))
        self.addresses = await self._start_all(models)
        if self._target:
            self.addresses["target"] = self._target
        draft = await self._delayed(self.addresses.get("draft"))
        arguments = orchestrator_arguments(
            options, self.addresses["target"], draft, redis_url, http_port
        )
        address = await self._start_program("orchestrator", arguments)
        self.endpoint = _reachable(address)

    async def _delayed(self, draft: str | None) -> str | None:
        """The draft's address, or that of a relay which delays its link."""
        delay_ms = self._options.draft_delay_ms
        if draft is None or delay_ms is None:
            return draft
        from outrider.cli.relay import Relay

        host, _, port = draft.rpartition(":")
        relay = Relay("127.0.0.1", 0, host, int(port), delay_ms / 1000)
        self.relay = await self._resources.enter_async_context(relay)
        return f"127.0.0.1:{self.relay.port}"

    async def _start_program(self, name: str, arguments: list[str]) -> str:
        if self._options.metrics:
            arguments = [*arguments, *_flag("metrics-port", 0)]
        return await self._supervisor.start(name, arguments, self._options.cpus(name))

    @property
    def metrics(self) -> dict[str, str]:
        """host:port of each program's /metrics endpoint, by name; empty without --metrics."""
        addresses = self._supervisor.metrics()
        return {name: _reachable(address) for name, address in addresses.items()}

    @property
    def http(self) -> str | None:
        """host:port of OpenAI-compatible HTTP; None if there is none."""
        address = self._supervisor.http()
        return None if address is None else _reachable(address)

    def pid(self, name: str) -> int:
        """Process id of a running program."""
        return self._supervisor.pid(name)

    async def _start_all(self, models: dict[str, list[str]]) -> dict[str, str]:
        try:
            async with asyncio.TaskGroup() as tasks:
                started = {
                    name: tasks.create_task(self._start_program(name, arguments))
                    for name, arguments in models.items()
                }
        except* (ProgramFailed, ConfigError) as group:
            raise group.exceptions[0] from None
        return {name: task.result() for name, task in started.items()}

    async def next_death(self) -> tuple[Death, bool]:
        """Waits for a program to end by itself; also returns whether the system still serves."""
        death = await self._supervisor.next_death()
        return death, death.name == "draft"

    async def stop(self) -> None:
        """Stops all programs. Leaves no process."""
        try:
            await self._supervisor.stop()
        finally:
            await self._resources.aclose()


def _reachable(address: str) -> str:
    """The address at which clients on this machine reach a server listening on `address`."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host.strip("[]") in _ANY_HOST else address


def _reason(error: OSError) -> str:
    """The system's own message for a failed call."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)


def _check_port(options: StackOptions) -> None:
    """Checks host and port before the models are loaded; the orchestrator checks them again."""
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"port: {options.port} is not in [0, 65535]")
    if options.host:
        require_host(options.host, "host")
    try:
        _bind(options.host, options.port)
    except OSError as error:
        where = f"{options.host}:{options.port}"
        raise ConfigError(
            f"port: cannot listen on {where}: {_reason(error)}; choose another with --port"
        ) from error


def _http_port(options: StackOptions) -> int | None:
    """The port of HTTP, which may be 0; None: no HTTP. Raises ConfigError."""
    given = options.http_port
    if given == NO_HTTP:
        return None
    if given is not None and not (given.isdecimal() and int(given) <= 65535):
        raise ConfigError(f"http_port: {given!r} is neither {NO_HTTP} nor in [0, 65535]")
    port = DEFAULT_HTTP_PORT if given is None else int(given)
    try:
        _bind(options.host, port)
    except OSError as error:
        if given is None:
            return 0
        where = f"{options.host}:{port}"
        raise ConfigError(
            f"http_port: cannot listen on {where}: {_reason(error)}; choose another, 0 or {NO_HTTP}"
        ) from error
    return port


def _bind(host: str, port: int) -> None:
    """Binds the port once. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    socket.create_server((host.strip("[]"), port), family=family).close()
