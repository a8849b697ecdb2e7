"""Faults carried out on a system of our own, one at a time in each part of it, and noted.

What is broken is mended again; cancelled in the midst, programs may stay dead. Knows no load: who
was hit is asked of whoever keeps the streams.
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
from outrider_bench.chaos.faults import Fault, Kind, Tier
from outrider_bench.chaos.nodes import frozen
from outrider_bench.chaos.system import LinkPlace, Place, Size, System

Stream = TypeVar("Stream")

_SLOW_S = 0.1
# What is owed to Redis is written with a next round; callers connect when they have to.
_SETTLE_S = 1.5
# Faults that wait for the part of the system that another one still has.
_MAX_WAITING = 8
# Both lose what is only in memory: an orchestrator's death while Redis is away would lose tokens,
# as it is documented.
_PARTS = {
    Tier.DRAFT: "drafts",
    Tier.TARGET: "targets",
    Tier.ORCHESTRATOR: "record",
    Tier.REDIS: "record",
}


@dataclass
class Occurrence(Generic[Stream]):
    """A fault that happened; times of time.monotonic(). `ended_at`: mended, and found again.

    `streams`: those that were running on it. `fault` None: of a sort that is not ours.
    """

    name: str
    began_at: float
    fault: Fault | None = None
    ended_at: float | None = None
    streams: Sequence[Stream] = field(default_factory=list)


class Injector(Generic[Stream]):
    """`find_streams` tells, before a fault, which streams run on its place.

    `on_problem` is told what should not have happened.
    """

    def __init__(
        self,
        system: System,
        find_streams: Callable[[Fault], Awaitable[Sequence[Stream]]],
        on_problem: Callable[[str], None],
    ) -> None:
        self.occurrences: list[Occurrence[Stream]] = []
        self._system = system
        self._find_streams = find_streams
        self._on_problem = on_problem
        self._parts = {part: asyncio.Lock() for part in _PARTS.values()}
        self._waiting = asyncio.Semaphore(_MAX_WAITING)
        self._is_ending = asyncio.Event()

    async def run(self, faults: Iterator[Fault]) -> None:
        """In their order, each when it is due and its part of the system is whole again.

        Returns when all are over, or soon after `end`.
        """
        began_at = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for fault in faults:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(began_at + fault.at_s - time.monotonic()):
                        await self._is_ending.wait()
                await self._waiting.acquire()
                if self._is_ending.is_set():
                    return
                tasks.create_task(self._happen(fault), name=fault.name)

    def end(self) -> None:
        """No fault begins any more; those that have begun are mended when their time is over."""
        self._is_ending.set()

    def happened(self, tier: Tier, replica: int, since: float) -> bool:
        """Whether a fault befell that replica, or a link to it, that was not over at `since`."""
        return any(
            o.fault is not None
            and (o.fault.tier, o.fault.replica) == (tier, replica)
            and (o.ended_at is None or o.ended_at >= since)
            for o in self.occurrences
        )

    async def _happen(self, fault: Fault) -> None:
        try:
            async with self._parts[_PARTS[fault.tier]]:
                if not self._is_ending.is_set():
                    await self._befall(fault)
        finally:
            self._waiting.release()

    async def _befall(self, fault: Fault) -> None:
        fault, streams = await self._aimed(fault)
        occurrence = Occurrence(fault.name, time.monotonic(), fault, streams=streams)
        self.occurrences.append(occurrence)
        try:
            async with self._broken(fault):
                await asyncio.sleep(fault.duration_s)
            await self._settle(fault)
        except OutriderError as error:
            self._on_problem(f"{fault.place}: does not come back: {error}")
        finally:
            occurrence.ended_at = time.monotonic()

    async def _aimed(self, fault: Fault) -> tuple[Fault, Sequence[Stream]]:
        """Where nobody is, it would prove little: then it goes to another place of its tier."""
        for other in (fault, *_elsewhere(fault, self._system.size)):
            if streams := await self._find_streams(other):
                return other, streams
        return fault, ()

    async def _settle(self, fault: Fault) -> None:
        """Until its part of the system is as before. Only then may the next fault come."""
        if _PARTS[fault.tier] == "record":
            await asyncio.sleep(_SETTLE_S)
        elif not await self._system.connected(Place(fault.tier, fault.replica)):
            self._on_problem(f"{fault.place}: not found again after {fault.name}")

    @contextlib.asynccontextmanager
    async def _broken(self, fault: Fault) -> AsyncIterator[None]:
        """For the time of a block; whole after it."""
        if fault.kind is Kind.KILL:
            async with self._dead(fault):
                yield
        elif fault.kind is Kind.STOP:
            async with self._stopped(fault):
                yield
        elif fault.kind is Kind.FREEZE:
            async with self._frozen(fault):
                yield
        else:
            async with _disturbed(self._link(fault), fault):
                yield

    @contextlib.asynccontextmanager
    async def _dead(self, fault: Fault) -> AsyncIterator[None]:
        if fault.tier is Tier.REDIS:
            self._system.redis.kill()
            try:
                yield
            finally:
                self._system.redis.launch()
                # Off the event loop, which carries the relays' pings.
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
            assert pid is not None, "it runs"
            async with frozen(pid):
                yield
        else:
            async with self._system.nodes[Place(fault.tier, fault.replica)].frozen():
                yield

    def _link(self, fault: Fault) -> Relay:
        link = 0 if fault.tier is Tier.ORCHESTRATOR else fault.link
        return self._system.links[LinkPlace(fault.tier, fault.replica, link)]


def _elsewhere(fault: Fault, size: Size) -> list[Fault]:
    """The same, on every replica of its tier and every link of it."""
    sizes = {Tier.REDIS: 1, Tier.ORCHESTRATOR: size.num_orchestrators}
    replicas, links = range(sizes.get(fault.tier, size.num_replicas)), range(size.num_orchestrators)
    return [replace(fault, replica=replica, link=link) for replica in replicas for link in links]


@contextlib.asynccontextmanager
async def _disturbed(link: Relay, fault: Fault) -> AsyncIterator[None]:
    """For the time of a block."""
    kind = fault.kind
    if kind is Kind.SLOW:
        link.delay_s = _SLOW_S
    elif kind in (Kind.HOLD, Kind.DROP):
        link.hold()
    elif kind is Kind.HALF_CLOSE:
        link.end(End.FAR if fault.link else End.NEAR)
    else:
        link.refuses = kind is Kind.CUT
        link.reset()
    try:
        yield
    finally:
        link.delay_s, link.refuses = 0.0, False
        if kind in (Kind.DROP, Kind.HALF_CLOSE):
            link.reset()
        link.release()
