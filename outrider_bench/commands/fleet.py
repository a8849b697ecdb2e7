"""Replicas of both tiers in any number, simulated, and orchestrators on some of them.

Owns their processes and a channel to each, on which it is asked for its counts. Knows no load.
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

# Of the question for the counts.
_TIMEOUT_S = 5.0

# Its answer: what the replica's GetModelInfo says.
Ask = Callable[[], Awaitable[Any]]


@dataclass
class Fleet:
    """Made by `running_fleet`. `targets`, `drafts`: each asks one replica."""

    options: StackOptions
    supervisor: Supervisor
    redis_url: str
    addresses: dict[str, list[str]] = field(default_factory=dict)
    targets: list[Ask] = field(default_factory=list)
    drafts: list[Ask] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def orchestrator(
        self, num_targets: int, num_drafts: int
    ) -> AsyncIterator[grpc.aio.Channel]:
        """A new one on the first so many: it has learnt nothing yet. It stays, idle, behind this.

        Raises ProgramFailed.
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
    """So many replicas of each tier, simulated as told, and a Redis; leaves no process.

    Raises ConfigError or ProgramFailed.
    """
    from outrider.cli.supervisor import Supervisor

    def report(event: Event) -> None:
        """Nobody is to see it: the command's bar tells how far things are."""

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
            _ask(target.GetModelInfo, target_pb2.TargetServiceGetModelInfoRequest())
        )
    for address in fleet.addresses["draft"]:
        channel = await channels.enter_async_context(open_channel(address))
        draft = draft_pb2_grpc.DraftServiceStub(channel)
        fleet.drafts.append(_ask(draft.GetModelInfo, draft_pb2.DraftServiceGetModelInfoRequest()))


def _ask(method: Any, request: Any) -> Ask:
    async def ask() -> Any:
        return await method(request, timeout=_TIMEOUT_S)

    return ask
