"""Fault injection into a running system: at most one fault at a time in each part of it.

Repairs what it breaks; if cancelled during a fault, programs may stay stopped. The caller finds the
streams that a fault affects.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from outrider.cli.relay import End, Relay
from outrider.errors import OutriderError
from outrider_bench.chaos.faults import Fault, FaultKind, Tier
from outrider_bench.chaos.nodes import frozen
from outrider_bench.chaos.system import LinkPlace, Place, Size, System

StreamT = TypeVar("StreamT")

_SLOW_S = 0.1
# Pending writes to Redis go out with a later round; clients reconnect when they must.
_RECOVERY_S = 1.5
# Limit of faults that wait until their part of the system is free.
_MAX_WAITING = 8
# Part that has the state of sessions: the orchestrators and Redis.
_STATE = "state"
# Parts of the system; at most one fault at a time in each. An orchestrator and Redis share one: an
# orchestrator's death while Redis is unreachable loses tokens, as documented.
_PARTS = {
    Tier.DRAFT: "drafts",
    Tier.TARGET: "targets",
    Tier.ORCHESTRATOR: _STATE,
    Tier.REDIS: _STATE,
}


@dataclass
class Occurrence(Generic[StreamT]):
    """A fault that occurred. Times are of time.monotonic(); `ended_at`: repaired and reachable.

    `streams`: those running on its place when it began. `fault` None: a shell command.
    """

    name: str
    began_at: float
    fault: Fault | None = None
    ended_at: float | None = None
    streams: Sequence[StreamT] = field(default_factory=list)


class FaultInjector(Generic[StreamT]):
    """Injects scheduled faults into `system`.

    `find_streams` returns the streams that run on a fault's place. `on_problem` receives messages
    about what should not happen.
    """

    def __init__(
        self,
        system: System,
        find_streams: Callable[[Fault], Awaitable[Sequence[StreamT]]],
        on_problem: Callable[[str], None],
    ) -> None:
        self.occurrences: list[Occurrence[StreamT]] = []
        self._system = system
        self._find_streams = find_streams
        self._on_problem = on_problem
        self._parts = {part: asyncio.Lock() for part in _PARTS.values()}
        self._waiting = asyncio.Semaphore(_MAX_WAITING)
        self._is_stopping = asyncio.Event()

    async def run(self, faults: Iterator[Fault]) -> None:
        """Injects the faults in order, each when it is due and its part of the system is free.

        Returns when all are over, or soon after `stop`.
        """
        began_at = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for fault in faults:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(began_at + fault.at_s - time.monotonic()):
                        await self._is_stopping.wait()
                await self._waiting.acquire()
                if self._is_stopping.is_set():
                    return
                tasks.create_task(self._inject_when_free(fault), name=fault.name)

    def stop(self) -> None:
        """Starts no further faults. Those that have begun are repaired when their time is over."""
        self._is_stopping.set()

    def was_faulted(self, tier: Tier, replica: int, since: float) -> bool:
        """Whether a fault of that replica, or of a link to it, was active at or after `since`."""
        return any(
            o.fault is not None
            and (o.fault.tier, o.fault.replica) == (tier, replica)
            and (o.ended_at is None or o.ended_at >= since)
            for o in self.occurrences
        )

    async def _inject_when_free(self, fault: Fault) -> None:
        try:
            async with self._parts[_PARTS[fault.tier]]:
                if not self._is_stopping.is_set():
                    await self._inject(fault)
        finally:
            self._waiting.release()

    async def _inject(self, fault: Fault) -> None:
        fault, streams = await self._retargeted(fault)
        occurrence = Occurrence(fault.name, time.monotonic(), fault, streams=streams)
        self.occurrences.append(occurrence)
        try:
            async with self._active(fault):
                await asyncio.sleep(fault.duration_s)
            await self._await_recovery(fault)
        except OutriderError as error:
            self._on_problem(f"{fault.place}: does not recover: {error}")
        finally:
            occurrence.ended_at = time.monotonic()

    async def _retargeted(self, fault: Fault) -> tuple[Fault, Sequence[StreamT]]:
        """The fault and the streams on its place. Without streams it moves within its tier."""
        for other in (fault, *_all_places(fault, self._system.size)):
            if streams := await self._find_streams(other):
                return other, streams
        return fault, ()

    async def _await_recovery(self, fault: Fault) -> None:
        """Waits until the fault's part of the system has recovered."""
        if _PARTS[fault.tier] == _STATE:
            await asyncio.sleep(_RECOVERY_S)
        elif not await self._system.connected(Place(fault.tier, fault.replica)):
            self._on_problem(f"{fault.place}: unreachable after {fault.name}")

    @contextlib.asynccontextmanager
    async def _active(self, fault: Fault) -> AsyncIterator[None]:
        """Breaks the fault's place for the time of a block and repairs it afterwards."""
        if fault.kind is FaultKind.KILL:
            async with self._killed(fault):
                yield
        elif fault.kind is FaultKind.STOP:
            async with self._stopped(fault):
                yield
        elif fault.kind is FaultKind.FREEZE:
            async with self._frozen(fault):
                yield
        else:
            async with _link_fault(self._link(fault), fault):
                yield

    @contextlib.asynccontextmanager
    async def _killed(self, fault: Fault) -> AsyncIterator[None]:
        if fault.tier is Tier.REDIS:
            self._system.redis.kill()
            try:
                yield
            finally:
                self._system.redis.launch()
                # Blocks; the event loop runs the relays.
                await asyncio.to_thread(self._system.redis.wait_until_up)
            return
        node = self._system.nodes[Place(fault.tier, fault.replica)]
        await node.kill()
        yield
        await node.start()

    @contextlib.asynccontextmanager
    async def _stopped(self, fault: Fault) -> AsyncIterator[None]:
        node = self._system.nodes[Place(fault.tier, fault.replica)]
        status = await node.stop()
        if status != 0:
            self._on_problem(f"{fault.place}: exit status {status} at SIGTERM")
        yield
        await node.start()

    @contextlib.asynccontextmanager
    async def _frozen(self, fault: Fault) -> AsyncIterator[None]:
        if fault.tier is Tier.REDIS:
            pid = self._system.redis.pid
            assert pid is not None, "Redis runs"
            async with frozen(pid):
                yield
        else:
            async with self._system.nodes[Place(fault.tier, fault.replica)].frozen():
                yield

    def _link(self, fault: Fault) -> Relay:
        link = 0 if fault.tier is Tier.ORCHESTRATOR else fault.link
        return self._system.links[LinkPlace(fault.tier, fault.replica, link)]


def _all_places(fault: Fault, size: Size) -> list[Fault]:
    """The same fault on every replica of its tier and on every link of it."""
    sizes = {Tier.REDIS: 1, Tier.ORCHESTRATOR: size.num_orchestrators}
    replicas, links = range(sizes.get(fault.tier, size.num_replicas)), range(size.num_orchestrators)
    return [replace(fault, replica=replica, link=link) for replica in replicas for link in links]


@contextlib.asynccontextmanager
async def _link_fault(link: Relay, fault: Fault) -> AsyncIterator[None]:
    """Disturbs the link for the time of a block."""
    kind = fault.kind
    if kind is FaultKind.SLOW:
        link.delay_s = _SLOW_S
    elif kind in (FaultKind.HOLD, FaultKind.DROP):
        link.hold()
    elif kind is FaultKind.HALF_CLOSE:
        link.end(End.FAR if fault.link else End.NEAR)
    else:
        link.refuses = kind is FaultKind.CUT
        link.reset()
    try:
        yield
    finally:
        link.delay_s, link.refuses = 0.0, False
        if kind in (FaultKind.DROP, FaultKind.HALF_CLOSE):
            link.reset()
        link.release()
