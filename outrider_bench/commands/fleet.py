"""Fleet: simulated replicas of both tiers, and orchestrators that use some of them.

Owns the processes, and a channel to each replica to read its counters.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.cli.failures import ProgramFailed, require_engine
from outrider.cli.stack_options import StackOptions
from outrider.errors import ConfigError

if TYPE_CHECKING:
    import grpc

    from outrider.cli.supervisor import Event, Supervisor

# Time-out of reading the counters of a replica.
_TIMEOUT_S = 5.0

# Returns the response of the replica's GetModelInfo.
ReadInfo = Callable[[], Awaitable[Any]]


@dataclass
class Fleet:
    """Fleet made by `running_fleet`. `targets`, `drafts`: functions that read a replica's info."""

    options: StackOptions
    supervisor: Supervisor
    redis_url: str
    addresses: dict[str, list[str]] = field(default_factory=dict)
    targets: list[ReadInfo] = field(default_factory=list)
    drafts: list[ReadInfo] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def orchestrator(
        self, num_targets: int, num_drafts: int
    ) -> AsyncIterator[grpc.aio.Channel]:
        """Starts a new orchestrator on the first replicas of each tier; yields a channel to it.

        A new process has no acceptance or cost statistics yet. It keeps running, idle, after the
        block. Raises ProgramFailed.
        """
        from outrider.cli.stack import orchestrator_arguments
        from outrider.client.channel import open_channel

        arguments = orchestrator_arguments(
            self.options,
            ",".join(self.addresses["target"][:num_targets]),
            ",".join(self.addresses["draft"][:num_drafts]),
            self.redis_url,
        )
        name = f"orchestrator-{num_targets}x{num_drafts}"
        async with open_channel(await self.supervisor.start(name, arguments)) as channel:
            yield channel


@contextlib.asynccontextmanager
async def running_fleet(
    options: StackOptions, log_dir: Path, num_replicas: int, *, target: str, draft: str
) -> AsyncIterator[Fleet]:
    """Starts Redis and `num_replicas` of each tier; stops all processes at the end.

    `target` and `draft` are simulations, in the format of `--simulate`. Raises ConfigError or
    ProgramFailed.
    """
    from outrider.cli.supervisor import Supervisor

    def report(event: Event) -> None:
        """Ignores start-up events: the command shows its own progress."""

    require_engine()
    supervisor = Supervisor(log_dir, report)
    options = replace(options, simulate_target=target, simulate_draft=draft)
    try:
        fleet = Fleet(options, supervisor, supervisor.start_redis())
        for tier, simulation in (("target", target), ("draft", draft)):
            fleet.addresses[tier] = await _started(fleet, tier, simulation, num_replicas)
        async with contextlib.AsyncExitStack() as channels:
            await _connect(fleet, channels)
            yield fleet
    finally:
        await supervisor.stop()


async def _started(fleet: Fleet, tier: str, simulation: str, num: int) -> list[str]:
    from outrider.cli.stack import simulated_arguments

    arguments = simulated_arguments(fleet.options, f"{tier}_service", simulation)
    try:
        async with asyncio.TaskGroup() as tasks:
            started = [
                tasks.create_task(fleet.supervisor.start(f"{tier}-{number}", arguments))
                for number in range(1, num + 1)
            ]
    except* (ProgramFailed, ConfigError) as group:
        raise group.exceptions[0] from None
    return [task.result() for task in started]


async def _connect(fleet: Fleet, channels: contextlib.AsyncExitStack) -> None:
    from outrider.client.channel import open_channel
    from outrider.v1 import draft_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc

    for address in fleet.addresses["target"]:
        channel = await channels.enter_async_context(open_channel(address))
        target = target_pb2_grpc.TargetServiceStub(channel)
        fleet.targets.append(
            _read_info(target.GetModelInfo, target_pb2.TargetServiceGetModelInfoRequest())
        )
    for address in fleet.addresses["draft"]:
        channel = await channels.enter_async_context(open_channel(address))
        draft = draft_pb2_grpc.DraftServiceStub(channel)
        fleet.drafts.append(
            _read_info(draft.GetModelInfo, draft_pb2.DraftServiceGetModelInfoRequest())
        )


def _read_info(method: Any, request: Any) -> ReadInfo:
    async def read() -> Any:
        return await method(request, timeout=_TIMEOUT_S)

    return read
